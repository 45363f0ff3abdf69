import hashlib
import json
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from maskgil_jax.convert import ConversionError
from maskgil_jax.convert.files import open_checkpoint, write_checkpoint

STATE = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}


@pytest.fixture
def path(tmp_path):
    write_checkpoint(tmp_path / "some.safetensors", STATE, wrapper="model")
    return tmp_path / "some.safetensors"


def refused(path, message, error=ConversionError, **options):
    with pytest.raises(error, match=message), open_checkpoint(path, **options):
        pass


def test_shapes_and_dtypes_are_known_and_values_read(path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with open_checkpoint(path, sha256=digest.upper()) as checkpoint:
        tensor = checkpoint.state_dict["a.weight"]
        assert (tensor.shape, tensor.dtype) == ((2, 3), "float32")
        np.testing.assert_array_equal(np.asarray(tensor), STATE["a.weight"])
        assert (checkpoint.sha256, checkpoint.weights_under) == (digest, "")


def test_another_sha256_is_refused(path):
    refused(path, "expected 00ff", sha256="00ff")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_changes_while_it_is_read_is_refused(path, replaced):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")

    def read():
        with open_checkpoint(path) as checkpoint:
            if replaced:
                other.replace(path)
            else:
                path.write_bytes(other.read_bytes())
            return checkpoint.sha256

    with pytest.raises(ConversionError, match="was written while it was read: some.safetensors"):
        read()


def test_damaged_safetensors_are_refused(path):
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    header["a.weight"]["shape"] = [100_000, 100_000]
    huge = json.dumps(header).encode()
    for data in (
        whole[:-1],
        whole[:20],
        b"",
        struct.pack("<Q", len(huge)) + huge + whole[8 + length :],
    ):
        path.write_bytes(data)
        refused(path, "no whole safetensors file")


@pytest.fixture
def shards(tmp_path):
    """A checkpoint in two shards: the path of its index, and the index."""
    weight_map = {}
    for i, (key, value) in enumerate(STATE.items()):
        name = f"part-{i}.safetensors"
        write_checkpoint(tmp_path / name, {key: value}, wrapper="")
        weight_map[key] = name
    path = tmp_path / "some.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path, weight_map


def test_shards_are_read_as_one_with_one_file_open(shards):
    path, _ = shards
    names = ["part-0.safetensors", "part-1.safetensors", path.name]
    digests = [hashlib.sha256(path.with_name(n).read_bytes()).hexdigest() for n in names]
    lines = "".join(f"{d}  {n}\n" for d, n in zip(digests, names, strict=True))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    with open_checkpoint(path, sha256=digest) as checkpoint:
        assert checkpoint.files == dict(zip(names, digests, strict=True))
        for _ in range(2):
            for key, value in STATE.items():
                tensor = checkpoint.state_dict[key]
                assert (tensor.shape, tensor.dtype) == (value.shape, str(value.dtype))
                np.testing.assert_array_equal(np.asarray(tensor), value)
                maps = Path("/proc/self/maps").read_text()
                assert maps.count("part-0") + maps.count("part-1") <= 1
    path.with_name("part-1.safetensors").write_bytes(b"")
    refused(path, "expected", sha256=digest)
    refused(path, "no whole safetensors file")


def test_an_index_that_does_not_describe_its_files_is_refused(shards, tmp_path):
    path, weight_map = shards

    def write(**changes):
        path.write_text(json.dumps({"weight_map": {**weight_map, **changes}}))

    write(more="part-0.safetensors")
    refused(path, "part-0.safetensors lacks more")
    write(b="part-0.safetensors")
    refused(path, "part-0.safetensors lacks b")
    path.write_text(json.dumps({"weight_map": {"b": "part-1.safetensors", "a.weight": "no.x"}}))
    refused(path, "not one: no.x")
    write(b="part-9.safetensors")
    refused(path, "missing part-9.safetensors")
    (tmp_path / "in").mkdir()
    for name in ("../part-1.safetensors", "/etc/passwd", "in/x.safetensors", "in", 3, None, "a\n"):
        write(b=name)
        refused(path, "must name .safetensors files of its own folder|no index|names files")
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000, "\xff"):
        path.write_text(text, "latin-1")
        refused(path, "no index of safetensors files|it names none")


def test_other_suffixes_and_missing_files_are_refused(tmp_path):
    refused(tmp_path / "some.bin", r"'\.bin'; allowed: \.pt, \.pth, \.ckpt, \.safetensors")
    refused(tmp_path / "some.pt", "No such file", FileNotFoundError)
    with pytest.raises(ConversionError, match="allowed"):
        write_checkpoint(tmp_path / "some.bin", STATE, wrapper="model")


def test_an_existing_file_is_kept(path):
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="choose another path"):
        write_checkpoint(path, {}, wrapper="model")
    assert path.read_bytes() == before


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(Exception, match="object"):
        write_checkpoint(tmp_path / "x.safetensors", {"a": np.array([None])}, wrapper="model")
    assert not list(tmp_path.iterdir())


def test_without_torch_the_error_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "some.pt", "w") as archive:
        archive.writestr("some/data.pkl", b"")
    refused(tmp_path / "some.pt", r"pip install \"maskgil_jax\[torch\]\"", ImportError)


def test_a_reader_that_dies_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "some.pt").write_bytes(b"PK\x03\x04")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    refused(tmp_path / "some.pt", "ended with status 1")
