import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from goldens_lib import load_golden

from maskgil_jax.checkpoints import file_sha256, read_model_dir
from maskgil_jax.convert.files import write_checkpoint
from tools import convert_checkpoint


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command line in tmp_path: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(command):
        status = convert_checkpoint.main(command.split())
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def vq():
    return load_golden("llamagen_vq_tiny").state_dict


@pytest.fixture(scope="module")
def released():
    return load_golden("maskgil_released_tiny").state_dict


def assert_same_tensors(loaded, state):
    assert loaded.keys() == state.keys()
    for key, tensor in loaded.items():
        assert tensor.numpy().tobytes() == state[key].tobytes(), key


@pytest.mark.parametrize("wrapper", ["ema", "model", "state_dict"])
def test_a_published_tokenizer_file_comes_back_bit_for_bit(wrapper, vq, run, tmp_path):
    torch = pytest.importorskip("torch")
    full = {**vq, "quantize.codebook_used": np.zeros(65536, np.float32)}
    saved = {key: torch.from_numpy(value) for key, value in full.items()}
    other = {"ema": {"model": {"x": torch.zeros(1)}}, "model": {"state_dict": {}}}.get(wrapper, {})
    torch.save({**other, wrapper: saved, "steps": 7}, "vq.pt")
    status, out, err = run("import --family llamagen-vq --src vq.pt --dst vq")
    assert (status, err) == (0, "")
    for text in (
        f"sha256 {file_sha256('vq.pt')}",
        f"weights under: {wrapper}",
        "ignored the buffer quantize.codebook_used",
        "channel_multipliers [1, 1, 2]",
        "parameters: 813,995",
    ):
        assert text in out
    found = read_model_dir("vq")
    assert (found.kind, found.family) == ("tokenizer", "llamagen-vq")
    assert sum(leaf.size for leaf in flatten_dict(found.params).values()) == 813_995
    if wrapper == "ema":
        assert run("export --src vq --dst back.pt")[0] == 0
        assert_same_tensors(torch.load("back.pt", weights_only=True)["model"], full)
    assert not list(tmp_path.glob(".*"))


def test_a_released_checkpoint_comes_back_bit_for_bit(released, run):
    torch = pytest.importorskip("torch")
    saved = {f"module.{key}": torch.from_numpy(value) for key, value in released.items()}
    saved["module.freqs_cis"] = torch.zeros(257, 16, 2)
    torch.save({"model_state_dict": saved, "epoch": 3}, "released.pth")
    options = "--family maskgil-released --num_heads 2 --grid_size 8x32"
    status, out, _ = run(f"import {options} --src released.pth --dst model")
    assert (status, "removed the prefix 'module.'" in out) == (0, True)
    found = read_model_dir("model")
    assert (found.kind, found.family) == ("model", "maskgil")
    assert found.config["grid_size"] == [8, 32]
    assert found.source["sha256"] == file_sha256("released.pth")
    assert run("export --src model --dst back.ckpt")[0] == 0
    assert_same_tensors(torch.load("back.ckpt", weights_only=True)["model_state_dict"], released)


def test_safetensors_go_both_ways_without_torch(released, run):
    write_checkpoint("one.safetensors", released, wrapper="")
    options = "--family maskgil-released --num_heads 2"
    assert run(f"import {options} --src one.safetensors --dst one")[0] == 0
    assert run("export --src one --dst two.safetensors")[0] == 0
    assert run(f"import {options} --src two.safetensors --dst two")[0] == 0
    one, two = (flatten_dict(read_model_dir(name).params, sep="/") for name in ("one", "two"))
    assert all(one[path].tobytes() == two[path].tobytes() for path in one)


def test_a_checkpoint_that_does_not_fit_writes_nothing(released, run, tmp_path):
    wrong = dict(released)
    del wrong["norm.weight"]
    wrong["extra"] = np.zeros(1, np.float32)
    wrong["output.weight"] = wrong["output.weight"].astype(np.float64)
    wrong["layers.1.attention.wo.weight"] = np.zeros((64, 32), np.float32)
    write_checkpoint("wrong.safetensors", wrong, wrapper="")
    status, _, err = run(
        "import --family maskgil-released --num_heads 2 --src wrong.safetensors --dst model"
    )
    assert status == 1
    assert err.startswith("error: not a maskgil-released checkpoint of these sizes:")
    for text in (
        "missing norm.weight [64]",
        "unexpected extra",
        "wrong dtype of output.weight: float64, expected float32",
        "wrong shape of layers.1.attention.wo.weight: [64, 32], expected [64, 64]",
    ):
        assert text in err
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.safetensors"]


def test_refusals_name_the_cause_and_change_nothing(released, run, tmp_path):
    write_checkpoint("one.safetensors", released, wrapper="")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("kept")
    begin = "import --family maskgil-released --num_heads 2 --src"
    for command, message in (
        (f"{begin} one.safetensors --dst taken", "taken exists and is not empty"),
        (f"{begin} one.safetensors --dst new --sha256 abc", "expected abc"),
        (f"{begin.replace('--num_heads 2', '')} one.safetensors --dst new", "give num_heads"),
        (f"{begin} none.safetensors --dst new", "No such file"),
        (f"{begin} one.safetensors --dst new --cond_rope zero", "has no option cond_rope"),
        ("export --src taken --dst new.safetensors", "config.json is missing"),
        ("export --src taken --dst one.safetensors", "one.safetensors exists"),
        ("export --src taken --dst new.bin", "allowed: .pt"),
    ):
        status, _, err = run(command)
        assert (status, err.count("\n"), message in err) == (1, 1, True), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "taken"]
    with pytest.raises(SystemExit):
        run(f"{begin} one.safetensors --dst new --grid_size 16")


def test_the_family_is_found_where_it_is_not_given(vq, released, run, tmp_path):
    write_checkpoint("vq.safetensors", vq, wrapper="")
    status, out, _ = run("import --src vq.safetensors --dst vq")
    assert (status, "family: llamagen-vq" in out) == (0, True)
    assert read_model_dir("vq").family == "llamagen-vq"
    write_checkpoint("one.safetensors", released, wrapper="")
    status, _, err = run("import --src one.safetensors --dst one")
    assert (status, "give num_heads (--num_heads)" in err) == (1, True)
    assert run("import --src one.safetensors --dst one --num_heads 2")[0] == 0
    assert read_model_dir("one").source["converted_from"] == "maskgil-released"
    write_checkpoint("odd.safetensors", {"w": np.zeros(3, np.float32)}, wrapper="")
    status, _, err = run("import --src odd.safetensors --dst odd")
    assert (status, "no family fits; tried: llamagen-vq" in err) == (1, True)
    assert not (tmp_path / "odd").exists()


def test_a_detected_family_takes_the_entry_it_prefers(released, run):
    """`ema` comes first in the files of other families; in this one it is something else."""
    torch = pytest.importorskip("torch")
    good = {key: torch.from_numpy(value) for key, value in released.items()}
    other = {key: value + 1 for key, value in good.items()}
    torch.save({"ema": other, "model_state_dict": good}, "two.pt")
    status, out, _ = run("import --src two.pt --dst two --num_heads 2")
    assert (status, "weights under: model_state_dict" in out) == (0, True)
    found = read_model_dir("two").params["transformer"]["final_norm"]["scale"]
    np.testing.assert_array_equal(found, released["norm.weight"])


def test_inspect_tells_what_a_file_holds(vq, released, run, tmp_path):
    full = {**vq, "quantize.codebook_used": np.zeros(65536, np.float32)}
    write_checkpoint("vq.safetensors", full, wrapper="")
    status, out, err = run("inspect --src vq.safetensors")
    assert (status, err) == (0, "")
    for text in (
        f"vq.safetensors: sha256 {file_sha256('vq.safetensors')}",
        "weights under: (top level)",
        f"tensors: {len(full)}, 879,531 elements, dtypes float32 ({len(full)})",
        "ignored the buffer quantize.codebook_used",
        "family: llamagen-vq",
        "channel_multipliers [1, 1, 2]",
        "parameters: 813,995",
    ):
        assert text in out
    write_checkpoint("one.safetensors", released, wrapper="")
    _, out, _ = run("inspect --src one.safetensors")
    assert "the shapes do not tell num_heads: an import needs --num_heads" in out
    assert "the shapes do not tell grid_size: an import may be given --grid_size" in out
    assert "num_heads 1" not in out
    _, out, _ = run("inspect --src one.safetensors --num_heads 2")
    assert "num_heads 2" in out
    status, out, err = run("inspect --src vq.safetensors --family maskgil")
    assert (status, "sha256" in out) == (1, True)
    assert err.startswith("error: the file is not of the family maskgil:\n  missing ")
    damaged = {key: value for key, value in vq.items() if key != "quant_conv.bias"}
    write_checkpoint("damaged.safetensors", damaged, wrapper="")
    status, out, err = run("inspect --src damaged.safetensors")
    assert status == 1
    assert "The nearest is llamagen-vq, of which this is wrong:\n  missing quant_conv.bias" in err
    status, _, err = run("inspect --src vq.safetensors --sha256 00")
    assert (status, "expected 00" in err) == (1, True)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


def test_inspect_tells_what_a_model_directory_holds(vq, run):
    write_checkpoint("vq.safetensors", vq, wrapper="")
    run("import --src vq.safetensors --dst vq")
    status, out, err = run("inspect --src vq")
    assert (status, err) == (0, "")
    for text in (
        f"params.safetensors sha256 {file_sha256('vq/params.safetensors')}",
        "source file: vq.safetensors",
        "kind: tokenizer",
        "family: llamagen-vq",
        "parameters: 813,995",
        "an export has the layout of llamagen-vq",
    ):
        assert text in out
    status, _, err = run("inspect --src vq --family maskgil")
    assert (status, "leave out --family" in err) == (1, True)


def test_a_terminated_import_leaves_nothing(tmp_path):
    """The reader waits in a torch of our own making until the import is told to end."""
    (tmp_path / "path").mkdir()
    (tmp_path / "temporary").mkdir()
    (tmp_path / "path" / "torch.py").write_text(
        "import pathlib, time\npathlib.Path('reading').touch()\ntime.sleep(600)\n"
    )
    with zipfile.ZipFile(tmp_path / "some.pt", "w") as archive:
        archive.writestr("some/data.pkl", b"")
    root = Path(convert_checkpoint.__file__).parents[1]
    command = [sys.executable, str(root / "tools" / "convert_checkpoint.py"), "import"]
    process = subprocess.Popen(
        [*command, "--src", "some.pt", "--dst", "dst"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), str(root)]),
            "TMPDIR": str(tmp_path / "temporary"),
        },
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "reading").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert [path.name[:11] for path in (tmp_path / "temporary").iterdir()] == ["maskgil_jax"]
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert not list((tmp_path / "temporary").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "path",
        "reading",
        "some.pt",
        "temporary",
    ]


def test_half_precision_is_taken_only_where_it_is_asked_for(run):
    full = load_golden("llamagen_vq_tiny").state_dict
    half = {key: value.astype(np.float16) for key, value in full.items()}
    write_checkpoint("half.safetensors", half, wrapper="")
    status, _, err = run("import --src half.safetensors --dst vq")
    assert (status, "--widen" in err, Path("vq").exists()) == (1, True, False)
    status, out, _ = run("import --widen --src half.safetensors --dst vq")
    assert status == 0
    assert f"widened {len(half)} of {len(half)} tensors" in out
    kernel = read_model_dir("vq").params["quantizer"]["codebook"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, half["quantize.embedding.weight"])


def test_two_files_of_one_checkpoint_must_not_overlap(run):
    tensor = {"lin0.model.1.weight": np.zeros((1, 64, 1, 1), np.float32)}
    write_checkpoint("vgg.safetensors", tensor, wrapper="")
    options = "--family lpips --src vgg.safetensors --heads vgg.safetensors --dst lpips"
    status, _, err = run(f"import {options}")
    assert (status, Path("lpips").exists()) == (1, False)
    assert "1 tensors are in --src and in --heads too: lin0.model.1.weight" in err
