"""The only file that uses PyTorch: read the weights of its pickles, and write such files.

Run as a program, `python -m maskgil_jax.convert.torch_io SRC OUT [WRAPPER …]` copies the weights
of one `.pt` file into a safetensors file, as a child of `files.py` with limited memory. A hostile
file must get nothing run and little allocated, hence, in this order:

* the archive is checked: stored members only, in total no larger than the file, each with a right
  checksum (`torch.load` itself loads damaged weights silently);
* `torch.load(weights_only=True)` with no added globals, of a torch that compares the size a pickle
  declares for a storage with that of its member (2.10 and later do);
* tensors may be views larger than their storage, so nothing is copied before each is known to be
  dense and to share memory with no other;
* a pickle can make tensors of any size without filling them, so the memory of each must be, byte
  for byte, a member of the archive.

Files from before torch 1.6 are not archives and are refused: their sizes cannot be checked ahead.
"""

import itertools
import math
import pickle
import re
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maskgil_jax.convert.rules import show_name

EXIT_REFUSED, EXIT_NO_TORCH = 3, 4
NO_TORCH = (
    "reading and writing .pt files needs PyTorch 2.10 or later: "
    'pip install "maskgil_jax[torch]" (.safetensors files need none)'
)
# What reading may take beyond what the file's size explains.
_SPARE_MEMORY = 1 << 30
_SPARE_SECONDS = 10
_BYTES_PER_SECOND = 2e7
_LONGEST_REASON = 4000
_FOLDER = 0x10  # the bit of a member's external attributes
# What zipfile raises, besides BadZipFile, for a damaged directory.
_DAMAGE = (EOFError, OSError, NotImplementedError, OverflowError, RuntimeError, LookupError)


class RefusedError(ValueError):
    """The file is damaged or holds something other than plain tensors."""


def _check_archive(path: Path) -> set[tuple[int, int]]:
    """Refuse the file unless every member of the archive is stored, unique and undamaged.

    Returns:
        Size and CRC-32 of every member.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise RefusedError(
                "not a zip archive: either no PyTorch file, or one from before torch 1.6; load it "
                "where you trust it and torch.save it again"
            )
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(members, path.stat().st_size)
            damaged = archive.testzip()
    except (zipfile.BadZipFile, *_DAMAGE) as error:
        raise RefusedError(f"the zip archive is damaged or truncated: {error}") from error
    if damaged is not None:
        raise RefusedError(f"damaged: the checksum of {damaged!r} is wrong; get the file again")
    return {(member.file_size, member.CRC) for member in members}


def _check_members(members: list[zipfile.ZipInfo], file_size: int) -> None:
    odd = [
        member.filename
        for member in members
        if member.compress_type != zipfile.ZIP_STORED
        or member.compress_size != member.file_size
        or member.flag_bits & 1
    ]
    if odd:
        raise RefusedError(f"compressed or encrypted members, which torch.save never writes: {odd}")
    # torch takes such a member for a folder and leaves the tensor's memory as it happens to be.
    folders = [m.filename for m in members if m.external_attr & _FOLDER or m.is_dir()]
    if folders:
        raise RefusedError(f"members marked as folders, which torch.save never writes: {folders}")
    names = {member.filename for member in members}
    if len(names) != len(members) or sum(member.file_size for member in members) > file_size:
        raise RefusedError("members of the zip archive overlap")


def _load(path: Path) -> Any:
    """Load what was saved, or say what kept it from being plain data."""
    import torch

    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        what = f" ({named.group(1)})" if named else ""
        raise RefusedError(
            f"the pickle holds more than tensors{what}, and reading that could run code; where "
            "you trust the file, load it with weights_only=False and torch.save a dict of its "
            "tensors alone"
        ) from error


def _select_weights(saved: Any, wrappers: tuple[str, ...]) -> tuple[dict[Any, Any], str]:
    """Return the state dict in what was saved, and the entry that held it ("" for none)."""
    if not isinstance(saved, dict):
        raise RefusedError(f"the file holds a {type(saved).__name__}, not a dict of tensors")
    # A pickle can give a dict attributes that hide its methods, but not its entries.
    saved = _plain(saved)
    for wrapper in wrappers:
        if isinstance(saved.get(wrapper), dict):
            return _plain(saved[wrapper]), wrapper
    if not saved or not all(hasattr(value, "data_ptr") for value in saved.values()):
        entries = ", ".join(repr(name) for name in list(saved)[:20]) or "none"
        raise RefusedError(f"no weights under {' or '.join(wrappers)}; its entries are: {entries}")
    return saved, ""


def _plain(mapping: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in dict.items(mapping)}


def _check_tensor(name: Any, tensor: Any) -> None:
    """Refuse all but a strided tensor whose elements lie in a row, in any order of axes."""
    import torch

    if not isinstance(name, str):
        raise RefusedError(f"the key {name!r} is no string")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise RefusedError(f"{name!r} is of type {type(tensor).__name__}, not a plain tensor")
    strided = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not strided or tensor.is_quantized or tensor.is_neg() or tensor.is_conj():
        raise RefusedError(f"{name!r} is sparse, quantised, without data, or lazily negated")
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1 and stride != expected:
            raise RefusedError(
                f"{name!r} {list(tensor.shape)} is a view that skips or repeats elements; save a "
                ".contiguous() copy"
            )
        expected *= max(length, 1)


def _check_overlap(state: Mapping[Any, Any]) -> None:
    """Refuse tensors that share memory: each weight has its own."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name)
        for name, tensor in state.items()
        if tensor.nbytes
    )
    for (_, end, one), (start, _, two) in itertools.pairwise(spans):
        if start < end:
            raise RefusedError(f"{one!r} and {two!r} share memory; save a .clone() of one")


def _check_storages(state: Mapping[Any, Any], members: set[tuple[int, int]]) -> None:
    """Refuse tensors whose memory is not, byte for byte, a member of the archive.

    A pickle may make tensors without filling them, and torch may find other members than we do.
    """
    import torch

    storages = {tensor.untyped_storage().data_ptr(): name for name, tensor in state.items()}
    sizes = {size for size, _ in members}
    for name in storages.values():
        storage = state[name].untyped_storage()
        whole = storage.nbytes() in sizes or storage.nbytes() == 0
        if whole and storage.nbytes():
            content: Any = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            whole = (storage.nbytes(), zlib.crc32(content)) in members
        if not whole:
            raise RefusedError(f"{name!r} has values that are not in the file")


def extract_weights(path: Path, out: Path, wrappers: tuple[str, ...]) -> None:
    """Copy the weights of a PyTorch file into a new safetensors file.

    Args:
        path: the PyTorch file.
        out: the safetensors file; its metadata `weights_under` names the entry they were under.
        wrappers: entries that may hold the weights, the preferred one first.

    Raises:
        RefusedError: the file is damaged or holds something other than plain tensors.
        ImportError: PyTorch is not installed.
    """
    members = _check_archive(path)
    import safetensors.torch

    # Only now, as the libraries of torch take whatever address space and time they take.
    size = path.stat().st_size
    _limit_memory(_SPARE_MEMORY + 4 * size)
    _limit_time(_SPARE_SECONDS + size / _BYTES_PER_SECOND)
    state, wrapper = _select_weights(_load(path), wrappers)
    for name, tensor in state.items():
        _check_tensor(name, tensor)
    _check_overlap(state)
    _check_storages(state, members)
    plain = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(plain, out, {"weights_under": wrapper})


def _limit_memory(extra: int) -> None:
    """Let this process map only `extra` more bytes of memory (where the system can say)."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return
    import resource

    mapped = int(status.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + extra, mapped + extra))


def _limit_time(seconds: float) -> None:
    """Have the system end this process after so many more seconds of processor time.

    A few hundred bytes can describe a nest of tuples whose hash takes years.
    """
    if sys.platform == "win32":
        return
    import resource

    spent = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(spent.ru_utime + spent.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))


def save_pickle(path: Path, state_dicts: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write `{wrapper: {key: tensor}}` as torch.save does.

    Raises:
        ImportError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(NO_TORCH) from error

    def to_tensor(array: np.ndarray) -> Any:
        # A copy, since torch wants writable memory and would save the whole of what a view is part
        # of. It does not know NumPy's bfloat16.
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    torch.save(
        {
            wrapper: {key: to_tensor(array) for key, array in state.items()}
            for wrapper, state in state_dicts.items()
        },
        path,
    )


def main(arguments: list[str]) -> int:
    """Run `extract_weights` as a program; the reason for a refusal goes to the standard output."""
    path, out, *wrappers = arguments
    try:
        extract_weights(Path(path), Path(out), tuple(wrappers))
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return EXIT_NO_TORCH
    except RefusedError as error:
        print(_shorten(str(error)))
        return EXIT_REFUSED
    # A damaged pickle may raise anything, MemoryError too; whatever it was, the file is unreadable.
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        print(f"damaged or not a PyTorch file ({type(error).__name__}: {show_name(reason)})")
        return EXIT_REFUSED
    return 0


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "…"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
