"""Checkpoint files of other programs: open them safely, write them whole or not at all.

`.safetensors`, in one file or in shards with an index, is read in this process. `.pt`, `.pth` and
`.ckpt` are pickles: a child process with limited memory and time (`torch_io.py`) copies their
weights into a temporary safetensors file. Neither format verifies its contents: a bit flipped in
the weights of a `.safetensors` file makes another valid file. So the SHA-256 is always computed and
may be required.

Temporary files are removed at every end but a kill that a process cannot see (SIGKILL, power): that
leaves `maskgil_jax_*` in the system's temporary folder or `.NAME.*` beside what was to be written,
either of which may be deleted.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
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
from maskgil_jax.convert.rules import ConversionError, show_name
from maskgil_jax.convert.torch_io import EXIT_NO_TORCH, EXIT_REFUSED, NO_TORCH, save_pickle
from maskgil_jax.hub import SCHEME, HubError, HubFile

PICKLES = (".pt", ".pth", ".ckpt")
SUFFIXES = (*PICKLES, ".safetensors")
INDEX = ".safetensors.index.json"
_MOST_INDEX_BYTES = 64 << 20
_SHARD_NAME = re.compile(r"\w[\w.-]{0,199}\.safetensors", re.ASCII)
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


class _Reader:
    """Read tensors of several safetensors files, of which one at most is open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None

    def open(self, path: Path) -> Any:
        if self._path != path:
            self.close()
            self._file = safetensors.safe_open(path, framework="np").__enter__()
            self._path = path
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)
        self._path = self._file = None


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a safetensors file; `np.asarray` reads it."""

    reader: _Reader
    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read the tensor from the file."""
        tensor = self.reader.open(self.path).get_tensor(self.key)
        return tensor if dtype is None else tensor.astype(dtype)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        state_dict: torch key -> tensor, not yet read.
        weights_under: the entry of the file that holds the weights; "" if they lie at top level.
        sha256: of the file; for a checkpoint in shards, of `sha256sum`'s lines of its index and
            shards in the order of their names.
        files: name -> SHA-256 of every file.
    """

    state_dict: Mapping[str, LazyTensor]
    weights_under: str
    sha256: str
    files: Mapping[str, str]


def parse_source(text: str) -> Path | HubFile:
    """Return a local path, or a file of the hub from `hf://owner/repo/path[@revision]`.

    Raises:
        ConversionError: an address of the hub that is none.
    """
    if not text.startswith(SCHEME):
        return Path(text)
    with _as_ours():
        return HubFile.parse(text)


@contextlib.contextmanager
def _as_ours() -> Iterator[None]:
    """Turn the hub's refusals into the converters'."""
    try:
        yield
    except HubError as error:
        raise ConversionError(str(error)) from error


def _download(source: HubFile) -> Path:
    with _as_ours():
        return source.download()


@contextlib.contextmanager
def open_checkpoint(
    source: os.PathLike | str | HubFile,
    *,
    wrappers: tuple[str, ...] = (),
    sha256: str | None = None,
) -> Iterator[Checkpoint]:
    """Open a checkpoint; its tensors can be read inside the `with` block.

    An expected SHA-256 is compared before anything of the file is parsed (of a checkpoint in
    shards, the index has to be read to know which files there are). At the end of the block it is
    an error if a file was changed meanwhile.

    Args:
        source: a `.pt`, `.pth`, `.ckpt`, `.safetensors` or `.safetensors.index.json` file, on this
            machine or `hf://owner/repo/path[@revision]`.
        wrappers: entries of a pickle that may hold the weights, the preferred one first.
        sha256: the checkpoint must have it, if given; see `Checkpoint.sha256`.

    Raises:
        ConversionError: the file is damaged, not of these formats, not the expected one, contains
            anything but plain tensors, or the hub does not give it.
        ImportError: a pickle without PyTorch, or a file of the hub without its client.
        OSError: the file cannot be read.
    """
    if isinstance(source, str):
        source = parse_source(source)
    if not isinstance(source, HubFile):
        source = Path(source)
    check_suffix(source)
    local = _download(source) if isinstance(source, HubFile) else source
    shards = _find_shards(source, local) if _is_index(local) else {}
    paths = sorted({local, *shards})
    marks = [_mark(path) for path in paths]
    files = {path.name: file_sha256(path) for path in paths}
    found = files[local.name] if not shards else _hash_lines(files)
    if sha256 is not None and found != sha256.strip().lower():
        raise ConversionError(
            f"{source} has SHA-256 {found}, expected {sha256}: the file is damaged or another one; "
            "download it again"
        )
    reader = _Reader()
    with contextlib.ExitStack() as stack:
        under, plain = "", local
        stack.callback(reader.close)
        if local.suffix in PICKLES:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="maskgil_jax_"))
            plain = Path(folder) / "weights.safetensors"
            _extract_in_child(local, plain, wrappers)
        try:
            state = _describe_shards(reader, source, shards) if shards else _describe(reader, plain)
            if plain != local:
                under = (reader.open(plain).metadata() or {}).get("weights_under", "")
        except safetensors.SafetensorError as error:
            raise ConversionError(f"{source} is no whole safetensors file: {error}") from error
        yield Checkpoint(state_dict=state, weights_under=under, sha256=found, files=files)
    # Else what was read need not be what the SHA-256 is of.
    if changed := [p.name for p, mark in zip(paths, marks, strict=True) if _mark(p) != mark]:
        raise ConversionError(f"{source} was written while it was read: {', '.join(changed)}")


def _mark(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is written or replaced."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def check_suffix(path: Path | HubFile) -> None:
    """Raise `ConversionError` unless the name ends like that of a checkpoint."""
    name = Path(path.path if isinstance(path, HubFile) else path)
    if name.suffix not in SUFFIXES and not _is_index(name):
        raise ConversionError(
            f"{path} has the suffix {name.suffix!r}; allowed: {', '.join((*SUFFIXES, INDEX))}"
        )


def check_target(path: Path) -> None:
    """Raise `ConversionError` unless the suffix is one of `SUFFIXES`, in which we write."""
    if path.suffix not in SUFFIXES:
        raise ConversionError(
            f"{path} has the suffix {path.suffix!r}; allowed: {', '.join(SUFFIXES)}"
        )


def _is_index(path: Path) -> bool:
    return path.name.endswith(INDEX)


def _hash_lines(files: Mapping[str, str]) -> str:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _describe(reader: _Reader, path: Path) -> dict[str, LazyTensor]:
    file = reader.open(path)
    tensors = {}
    for key in file.keys():  # noqa: SIM118
        header = file.get_slice(key)
        dtype = header.get_dtype()
        shape, name = tuple(header.get_shape()), _DTYPES.get(dtype, dtype.lower())
        tensors[key] = LazyTensor(reader, path, key, shape, name)
    return tensors


def _find_shards(source: Path | HubFile, index: Path) -> dict[Path, set[str]]:
    """Return the local files of a checkpoint in shards, with the tensors that each should hold."""
    if index.stat().st_size > _MOST_INDEX_BYTES:
        raise ConversionError(f"{source} is larger than any index, {_MOST_INDEX_BYTES >> 20} MiB")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        tensors: dict[str, set[str]] = {}
        for key, name in weight_map.items():
            tensors.setdefault(name, set()).add(key)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {show_name(error)}"
        raise ConversionError(f"{source} is no index of safetensors files ({reason})") from error
    odd = [name for name in tensors if not _SHARD_NAME.fullmatch(str(name))]
    if odd or not tensors:
        raise ConversionError(
            f"{source} must name .safetensors files of its own folder:",
            [f"not one: {show_name(name)}" for name in odd] or ["it names none"],
        )
    if isinstance(source, HubFile):
        return {_download(source.sibling(name)): keys for name, keys in tensors.items()}
    missing = [name for name in tensors if not (index.parent / name).is_file()]
    if missing:
        raise ConversionError(
            f"{source} names files that are not beside it:", [f"missing {name}" for name in missing]
        )
    return {index.parent / name: keys for name, keys in tensors.items()}


def _describe_shards(
    reader: _Reader, source: Path | HubFile, shards: Mapping[Path, set[str]]
) -> dict[str, LazyTensor]:
    state: dict[str, LazyTensor] = {}
    problems: list[str] = []
    for path, named in shards.items():
        held = _describe(reader, path)
        problems += [f"{path.name} lacks {show_name(key)}" for key in sorted(named - held.keys())]
        problems += [
            f"{path.name} holds {show_name(key)}, which the index does not place there"
            for key in sorted(held.keys() - named)
        ]
        state |= held
    if problems:
        raise ConversionError(f"{source} does not describe its files:", problems)
    return state


def _extract_in_child(path: Path, plain: Path, wrappers: tuple[str, ...]) -> None:
    """Have a child process copy the weights of a pickle into a safetensors file."""
    seconds = 120 + path.stat().st_size / 2e7
    try:
        child = run_reader([str(path), str(plain), *wrappers], seconds)
    except subprocess.TimeoutExpired as error:
        raise ConversionError(f"{path} was not read within {seconds:.0f} seconds") from error
    if child.returncode == EXIT_NO_TORCH:
        raise ImportError(NO_TORCH)
    if child.returncode == EXIT_REFUSED:
        raise ConversionError(f"{path}: {child.stdout.strip()}")
    if child.returncode == -getattr(signal, "SIGXCPU", 24):
        raise ConversionError(f"{path} took more processor time than a file of its size can need")
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConversionError(
            f"{path}: the process that reads it ended with status {child.returncode} ({last})"
        )


def run_reader(arguments: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run `torch_io.main` in a process of its own.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    search = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-P", "-m", "maskgil_jax.convert.torch_io", *arguments],
        env={**os.environ, "PYTHONPATH": search, "PYTHONIOENCODING": "utf-8:backslashreplace"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=seconds,
        check=False,
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
    check_target(path)
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
