import hashlib
import json
import struct
import sys
import zipfile

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
