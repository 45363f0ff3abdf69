"""A file whose header says too little is refused in words, whatever is missing."""

import json
import re
import zipfile

import numpy as np
import pytest
import tiny

HEADER = {
    "format": "maskgil_jax.exported",
    "version": 1,
    "jax": "0",
    "platforms": ["cpu"],
    "image_size": [8, 8],
    "image_channels": 3,
    "num_classes": 2,
    "batch_size": 4,
}
WEIGHTS = {"model/bias": np.arange(3, dtype=np.float32)}


@pytest.fixture(autouse=True)
def _tools_importable(monkeypatch):
    monkeypatch.syspath_prepend(tiny.ROOT / "tools")


@pytest.fixture
def whole(tmp_path):
    import export_model

    path = tmp_path / "whole.mgx"
    export_model.write_file(path, HEADER, b"a program", WEIGHTS)
    return path


def rewrite(source, target, change):
    """Copy a file with `change(header)` applied to its header."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            if name == "header.json":
                header = json.loads(part)
                change(header)
                part = json.dumps(header).encode()
            new.writestr(name, part)
    return target


def test_what_was_written_is_read(whole):
    import load_exported

    header, program, weights = load_exported.read_file(whole)
    assert header.items() >= HEADER.items()
    assert program == b"a program"
    np.testing.assert_array_equal(weights["model/bias"], WEIGHTS["model/bias"])
    assert weights.keys() == WEIGHTS.keys()


@pytest.mark.parametrize("name", [*HEADER, "sha256"])
def test_a_header_without_a_field_is_refused(whole, tmp_path, name):
    import load_exported

    path = rewrite(whole, tmp_path / "x.mgx", lambda header: header.pop(name))
    reason = {
        "format": "is no exported model",
        "version": "has version None of the format",
    }.get(name, f"is damaged: its header lacks {name}; copy or export it again")
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path} {reason}')}"):
        load_exported.read_file(path)


@pytest.mark.parametrize("name", ["image_size", "num_classes", "platforms", "sha256"])
def test_a_field_of_another_type_is_as_good_as_none(whole, tmp_path, name):
    import load_exported

    path = rewrite(whole, tmp_path / "x.mgx", lambda header: header.update({name: None}))
    with pytest.raises(ValueError, match=f"its header lacks {name}"):
        load_exported.read_file(path)


def test_a_file_without_a_program_is_refused(whole, tmp_path):
    import load_exported

    path = rewrite(whole, tmp_path / "x.mgx", lambda header: header["sha256"].clear())
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "y.mgx", "w") as new:
        new.writestr("header.json", old.read("header.json"))
    with pytest.raises(ValueError, match="parts are not those its header lists"):
        load_exported.read_file(tmp_path / "y.mgx")
