"""Damaged and malicious files are refused by one documented error, and the harness sees faults."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maskgil_jax.checkpoints import read_model_dir
from maskgil_jax.convert import export_state_dict, find_family, import_state_dict
from maskgil_jax.convert.files import write_checkpoint
from maskgil_jax.models.maskgil import MaskGILConfig
from tools import convert_checkpoint

pytest.importorskip("torch", reason="pickles are read by PyTorch: pip install .[torch]")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="memory is measured and limited as Linux does it"
)
TOOLS = Path(__file__).parents[2] / "tools"


def run_harness(*arguments):
    """Run the harness: exit status, and the report of every format."""
    child = subprocess.run(
        [sys.executable, str(TOOLS / "fuzz_converter.py"), *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.stdout, child.stderr
    return child.returncode, {r["format"]: r for r in map(json.loads, child.stdout.splitlines())}


def test_damaged_and_malicious_files_do_no_harm():
    status, reports = run_harness("--cases", "500,500,50")
    for report in reports.values():
        assert report["violations"] == {}, report["examples"]
        assert sum(report["outcomes"].values()) == report["cases"]
        assert report["with_sha256"].keys() == {"refused"}
        assert len(report["kinds"]) >= 5
    assert {name: report["cases"] for name, report in reports.items()} == {
        "pt": 500,
        "safetensors": 500,
        "hostile": 50,
    }
    # Some must be whole files, or nothing but refusal was tried.
    for name in ("pt", "safetensors"):
        assert reports[name]["outcomes"]["accepted, values of the undamaged file"] > 0
        assert reports[name]["with_sha256"]["refused"] > 450
    assert status == 0


def test_an_importer_that_trusts_is_found_out():
    status, reports = run_harness(
        "--cases", "40,20,40", "--plant", "skip_checksums,unsafe_load,write_first"
    )
    assert status == 1
    assert reports["pt"]["violations"]["silently wrong values"] > 0
    assert reports["hostile"]["violations"]["code run"] > 0
    for report in reports.values():
        assert report["violations"]["partial output"] > 0


def test_an_importer_that_errs_is_found_out():
    status, reports = run_harness(
        *("--cases", "1,60,1", "--first_seed", "50"),
        *("--plant", "misread,no_limits,other_error,ignore_sha256"),
    )
    assert status == 1
    assert reports["hostile"]["violations"]["memory"] > 0
    violations = reports["safetensors"]["violations"]
    assert violations["error SafetensorError"] > 0
    assert violations["values that the file does not have"] > 0
    assert violations["with sha256: accepted"] > 0


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Config, state dict, and the bytes of a good `.pt` file."""
    config = MaskGILConfig(
        num_layers=1,
        width=16,
        num_heads=2,
        mlp_width=24,
        codebook_size=12,
        num_classes=3,
        grid_size=(2, 3),
        **find_family("maskgil-released").layout,
    )
    rng = np.random.default_rng(0)
    template = find_family("maskgil-released").abstract_tree(config)
    from flax.traverse_util import unflatten_dict

    leaves = {p: rng.standard_normal(leaf.shape, np.float32) for p, leaf in template.items()}
    state = export_state_dict("maskgil-released", config, unflatten_dict(leaves, sep="/"))
    path = tmp_path_factory.mktemp("good") / "good.pt"
    write_checkpoint(path, state, wrapper="model_state_dict")
    return config, state, path.read_bytes()


@pytest.mark.parametrize("case", ["good", "flipped", "code", "huge"])
def test_the_real_command_does_the_same(case, good, tmp_path, monkeypatch, capsys):
    """What the harness forks, the command starts anew; the rest is the same code."""
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.chdir(tmp_path)
    from fuzzing import hostile

    _, state, data = good
    weights = hostile.Weights(state, "model_state_dict")
    canary = tmp_path / "canary"
    data = {
        "good": lambda: data,
        "flipped": lambda: data.replace(
            state["norm.weight"].tobytes(), np.nextafter(state["norm.weight"], 9).tobytes()
        ),
        "code": lambda: weights.replace(hostile.call("os.system", f"touch {canary}")),
        "huge": lambda: weights.replace(
            hostile.tensor("0", weights.first_size, (100_000, 100_000), (0, 0))
        ),
    }[case]()
    Path("src.pt").write_bytes(data)
    options = "--family maskgil-released --num_heads 2 --grid_size 2x3"
    status = convert_checkpoint.main(f"import {options} --src src.pt --dst dst".split())
    assert not canary.exists()
    if case == "good":
        _, params = import_state_dict("maskgil-released", state, num_heads=2, grid_size=(2, 3))
        found = read_model_dir("dst").params
        np.testing.assert_array_equal(found["head"]["kernel"], params["head"]["kernel"])
        assert status == 0
    else:
        messages = {"flipped": "checksum", "code": "could run code", "huge": "repeats elements"}
        error = capsys.readouterr().err
        assert (status, error.count("\n"), messages[case] in error) == (1, 1, True), error
        assert [path.name for path in tmp_path.iterdir()] == ["src.pt"]
