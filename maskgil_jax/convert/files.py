"""Checkpoint files of other programs: open them safely, write them whole or not at all.

`.safetensors` is read in this process. `.pt`, `.pth` and `.ckpt` are pickles: a child process with
limited memory and time (`torch_io.py`) copies their weights into a temporary safetensors file.
Neither format verifies its contents, so the SHA-256 is always computed and may be required.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from maskgil_jax.checkpoints import file_sha256
from maskgil_jax.convert.rules import ConversionError
from maskgil_jax.convert.torch_io import EXIT_NO_TORCH, EXIT_REFUSED, NO_TORCH, save_pickle

PICKLES = (".pt", ".pth", ".ckpt")
SUFFIXES = (*PICKLES, ".safetensors")
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
_PACKAGE_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in an open safetensors file; `np.asarray` reads it."""

    file: Any
    key: str
    shape: tuple[int, ...]
    dtype: str

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read the tensor from the file."""
        tensor = self.file.get_tensor(self.key)
        return tensor if dtype is None else tensor.astype(dtype)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint file.

    Attributes:
        state_dict: torch key -> tensor, not yet read.
        weights_under: the entry of the file that holds the weights; "" if they lie at top level.
        sha256: of the file.
    """

    state_dict: Mapping[str, LazyTensor]
    weights_under: str
    sha256: str


@contextlib.contextmanager
def open_checkpoint(
    path: os.PathLike | str, *, wrappers: tuple[str, ...] = (), sha256: str | None = None
) -> Iterator[Checkpoint]:
    """Open a checkpoint; its tensors can be read inside the `with` block.

    Args:
        path: a `.pt`, `.pth`, `.ckpt` or `.safetensors` file.
        wrappers: entries of a pickle that may hold the weights, the preferred one first.
        sha256: the file must have it, if given.

    Raises:
        ConversionError: the file is damaged, not of these formats, not the expected one, or
            contains anything but plain tensors.
        ImportError: a pickle without PyTorch installed.
        OSError: the file cannot be read.
    """
    path = Path(path)
    check_suffix(path)
    found = file_sha256(path)
    if sha256 is not None and found != sha256.strip().lower():
        raise ConversionError(
            f"{path} has SHA-256 {found}, expected {sha256}: the file is damaged or another one; "
            "download it again"
        )
    with contextlib.ExitStack() as stack:
        plain = path
        if path.suffix in PICKLES:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="maskgil_jax_"))
            plain = Path(folder) / "weights.safetensors"
            _extract_in_child(path, plain, wrappers)
        try:
            file = stack.enter_context(safetensors.safe_open(plain, framework="np"))
            state = {key: _describe(file, key) for key in file.keys()}  # noqa: SIM118
            under = (file.metadata() or {}).get("weights_under", "") if plain != path else ""
        except safetensors.SafetensorError as error:
            raise ConversionError(f"{path} is no whole safetensors file: {error}") from error
        yield Checkpoint(state_dict=state, weights_under=under, sha256=found)


def check_suffix(path: Path) -> None:
    """Raise `ConversionError` unless the suffix is one of `SUFFIXES`."""
    if path.suffix not in SUFFIXES:
        raise ConversionError(
            f"{path} has the suffix {path.suffix!r}; allowed: {', '.join(SUFFIXES)}"
        )


def _describe(file: Any, key: str) -> LazyTensor:
    header = file.get_slice(key)
    dtype = header.get_dtype()
    return LazyTensor(file, key, tuple(header.get_shape()), _DTYPES.get(dtype, dtype.lower()))


def _extract_in_child(path: Path, plain: Path, wrappers: tuple[str, ...]) -> None:
    """Have a child process copy the weights of a pickle into a safetensors file."""
    command = [sys.executable, "-P", "-m", "maskgil_jax.convert.torch_io"]
    search = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    seconds = 120 + path.stat().st_size / 2e7
    try:
        child = subprocess.run(
            [*command, str(path), str(plain), *wrappers],
            env={**os.environ, "PYTHONPATH": search, "PYTHONIOENCODING": "utf-8:backslashreplace"},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConversionError(f"{path} was not read within {seconds:.0f} seconds") from error
    if child.returncode == EXIT_NO_TORCH:
        raise ImportError(NO_TORCH)
    if child.returncode == EXIT_REFUSED:
        raise ConversionError(f"{path}: {child.stdout.strip()}")
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConversionError(
            f"{path}: the process that reads it ended with status {child.returncode} ({last})"
        )


def write_checkpoint(
    path: os.PathLike | str, state_dict: Mapping[str, Any], *, wrapper: str
) -> None:
    """Write a state dict under torch names; the path appears only when all of it is written.

    Args:
        path: a new `.safetensors` file, or a `.pt`, `.pth` or `.ckpt` one, which needs PyTorch.
        state_dict: torch key -> array.
        wrapper: the entry of a pickle that holds the weights.

    Raises:
        ConversionError: another suffix.
        FileExistsError: the path exists.
        ImportError: a pickle without PyTorch installed.
    """
    path = Path(path)
    check_suffix(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another path or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        if path.suffix in PICKLES:
            save_pickle(temporary, {wrapper: state_dict})
        else:
            safetensors.numpy.save_file(dict(state_dict), temporary)
        temporary.replace(path)
