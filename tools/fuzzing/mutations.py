"""Damaged copies of a good checkpoint file: bytes changed, or members of its archive.

A case is a pure function of (file, seed): `mutate` needs nothing else.
"""

import dataclasses
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping

import numpy as np

Rng = np.random.Generator
DTYPES = {"F32": np.float32, "F64": np.float64, "F16": np.float16, "I32": np.int32}


@dataclasses.dataclass(frozen=True)
class Case:
    """A file to be tried.

    Attributes:
        kind: what was done to it.
        data: its bytes.
        repaired: whether its checksums are right, so that it is another whole file: it may be
            accepted, with values of its own.
    """

    kind: str
    data: bytes
    repaired: bool = False


def _span(rng: Rng, size: int, most: int) -> tuple[int, int]:
    start = int(rng.integers(size))
    return start, min(size, start + 1 + int(rng.integers(most)))


def _flip(rng: Rng, data: bytearray, at: Callable[[], int]) -> bytearray:
    for _ in range(int(rng.choice([1, 1, 2, 8]))):
        data[at()] ^= 1 << int(rng.integers(8))
    return data


def _truncate(rng: Rng, data: bytearray, at: Callable[[], int]) -> bytearray:
    return data[: at()]


def _zero(rng: Rng, data: bytearray, at: Callable[[], int]) -> bytearray:
    start = at()
    stop = min(len(data), start + int(rng.choice([1, 4, 64, 4096])))
    data[start:stop] = bytes(stop - start)
    return data


def _delete(rng: Rng, data: bytearray, at: Callable[[], int]) -> bytearray:
    start = at()
    del data[start : start + int(rng.choice([1, 4, 64, 4096]))]
    return data


def _splice(rng: Rng, data: bytearray, at: Callable[[], int]) -> bytearray:
    start, stop = _span(rng, len(data), 256)
    piece = data[start:stop] if rng.random() < 0.5 else rng.bytes(stop - start)
    where = at()
    over = len(piece) if rng.random() < 0.5 else 0
    data[where : where + over] = piece
    return data


def _set_byte(rng: Rng, data: bytearray, at: Callable[[], int]) -> bytearray:
    data[at()] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
    return data


BYTE_EDITS = {
    "flip": _flip,
    "truncate": _truncate,
    "zero": _zero,
    "delete": _delete,
    "splice": _splice,
    "set": _set_byte,
}


def _edit_bytes(rng: Rng, data: bytes, structure: list[range]) -> Case:
    """Edit the bytes of a file, half of the time where its structure is and not its weights."""

    def at() -> int:
        if rng.random() < 0.5:
            return int(rng.choice(structure[int(rng.integers(len(structure)))]))
        return int(rng.integers(len(data)))

    name = str(rng.choice(list(BYTE_EDITS)))
    return Case(name, bytes(BYTE_EDITS[name](rng, bytearray(data), at)))


def mutate_safetensors(data: bytes, seed: int) -> Case:
    """Return a damaged copy of a `.safetensors` file."""
    rng = np.random.default_rng([1, seed])
    header = range(8 + struct.unpack("<Q", data[:8])[0])
    if rng.random() < 0.8:
        return _edit_bytes(rng, data, [header, range(8)])
    return _edit_header(rng, data, header.stop)


def _edit_header(rng: Rng, data: bytes, start: int) -> Case:
    """Change one entry of the header, which stays valid JSON."""
    header = json.loads(data[8:start])
    names = [name for name in header if name != "__metadata__"]
    one, two = (str(name) for name in rng.choice(names, 2, replace=False))
    entry = header[one]
    kind = str(rng.choice(["rename", "drop", "add", "shape", "dtype", "offsets", "swap", "huge"]))
    if kind == "rename":
        header[one + "x"] = header.pop(one)
    elif kind == "drop":
        del header[one]
    elif kind == "add":
        header["extra"] = entry
    elif kind == "shape":
        entry["shape"] = [*entry["shape"][::-1], 1]
    elif kind == "dtype":
        entry["dtype"] = str(rng.choice(["F64", "F16", "BF16", "I32", "BOOL", "F8_E4M3", "X"]))
    elif kind == "offsets":
        entry["data_offsets"] = [int(x) for x in rng.integers(-8, 1 << 16, 2)]
    elif kind == "swap":
        header[one], header[two] = header[two], header[one]
    else:
        entry["shape"] = [int(x) for x in rng.choice([1 << 20, 1 << 40, 100_000, 3], 2)]
    text = json.dumps(header).encode()
    return Case(f"header {kind}", struct.pack("<Q", len(text)) + text + data[start:])


def mutate_pickle(data: bytes, seed: int) -> Case:
    """Return a damaged copy of a `.pt` file."""
    rng = np.random.default_rng([2, seed])
    if rng.random() < 0.75:
        return _edit_bytes(rng, data, _find_structure(data))
    return _edit_archive(rng, data)


def _find_structure(data: bytes) -> list[range]:
    """Return where the headers of members, the pickle and the directory lie."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        directory = archive.start_dir
    headers = [range(m.header_offset, m.header_offset + 30 + len(m.filename)) for m in members]
    pickled = next(m for m in members if m.filename.endswith("data.pkl"))
    start = data.index(b"\x80\x02", pickled.header_offset)
    return [
        headers[int(len(headers) / 2)],
        headers[0],
        range(start, start + pickled.file_size),
        range(directory, len(data)),
        range(len(data) - 22, len(data)),
    ]


def read_members(data: bytes) -> dict[str, bytes]:
    """Return the members of an archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive of members, with right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return out.getvalue()


def _edit_archive(rng: Rng, data: bytes) -> Case:
    """Change members of the archive and write it whole again."""
    members = read_members(data)
    storages = [name for name in members if "/data/" in name]
    pickled = next(name for name in members if name.endswith("data.pkl"))
    one, two = (str(name) for name in rng.choice(storages, 2, replace=False))
    edits = ["drop", "rename", "deflate", "weights", "longer", "shorter", "pickle", "pickle", "crc"]
    kind = str(rng.choice([*edits, "swap", "encrypted", "duplicate", "prefix", "nested"]))
    if kind == "drop":
        del members[str(rng.choice(list(members)))]
    elif kind == "rename":
        name = str(rng.choice(list(members)))
        members[name + "x"] = members.pop(name)
    elif kind == "weights":
        members[one] = rng.permutation(np.frombuffer(members[one], np.uint8)).tobytes()
    elif kind == "longer":
        members[one] += rng.bytes(1 + int(rng.integers(64)))
    elif kind == "shorter":
        members[one] = members[one][:-1]
    elif kind == "pickle":
        edit = BYTE_EDITS[str(rng.choice(list(BYTE_EDITS)))]
        content = bytearray(members[pickled])
        members[pickled] = bytes(edit(rng, content, lambda: int(rng.integers(len(content)))))
    elif kind == "swap":
        members[one], members[two] = members[two], members[one]
    elif kind == "nested":
        members = {"archive/data.pkl": data}
    compression = zipfile.ZIP_DEFLATED if kind == "deflate" else zipfile.ZIP_STORED
    out = write_members(members, compression)
    if kind == "crc":
        at = out.index(struct.pack("<L", zlib.crc32(members[one])))
        out = out[:at] + rng.bytes(4) + out[at + 4 :]
    elif kind == "encrypted":
        at = out.rindex(b"PK\x01\x02") + 8
        out = out[:at] + b"\x01" + out[at + 1 :]
    elif kind == "duplicate":
        out = out.replace(one.encode(), two.encode()) if len(one) == len(two) else out[:-1]
    elif kind == "prefix":
        out = rng.bytes(16) + out
    repaired = kind in ("weights", "longer", "pickle", "swap", "drop")
    return Case(f"archive {kind}", out, repaired=repaired)


def read_safetensors(data: bytes) -> dict[str, np.ndarray] | None:
    """Read a `.safetensors` file by its specification alone; None where it is not one."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        header.pop("__metadata__", None)
        arrays = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            values = np.frombuffer(body[start:stop], DTYPES[entry["dtype"]])
            arrays[name] = values.reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    return arrays
