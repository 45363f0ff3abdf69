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
