"""An exported model gives the generator's images where this package is not, or says why not."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
import references
import tiny

from maskgil_jax import ImageGenerator, checkpoints, sharding

TOOLS = tiny.ROOT / "tools"
# Labels and seed; with a batch of 4 they fill one, leave one unfilled, and need several.
CALLS = [
    ([1, 0, 3, 2], 0),
    ([2, 1, 0], 2**31),
    ([0, 1, 2, 3, 2, 1, 0, 0, 1, 2, 3], 2**32 - 1),
]

ALONE = """
import json, sys
# As if neither were installed: importing them is an error.
sys.modules["maskgil_jax"] = sys.modules["flax"] = None
import load_exported
import numpy as np
path, calls = sys.argv[1], json.loads(sys.argv[2])
generator = load_exported.ExportedGenerator(path)
np.savez("images.npz", *[generator(labels, seed=seed) for labels, seed in calls])
load_exported.ExportedGenerator = {path: generator}.get  # compiled already
assert load_exported.main([path, "--labels=1,0,3,2", "--seed=0", "--out=new/images.npy"]) == 0
known = {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
assert not known & {"maskgil_jax", "flax", "optax", "absl", "safetensors", "PIL"}, known
"""


@pytest.fixture(autouse=True)
def _tools_importable(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model of random weights and its tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.make_tokenizer_dir(folder / "tokenizer")
    config = references.tiny_config(codebook_size=32, num_classes=3, grid_size=(4, 4))
    checkpoints.write_model_dir(
        folder / "model",
        kind="model",
        family=config.family,
        config=config.to_dict(),
        params=references.random_params(config),
    )
    return folder


def run_tool(inputs, out, **changes):
    import export_model

    values = {
        "workdir": inputs / "model",
        "tokenizer": inputs / "tokenizer",
        "out": out,
        "batch_size": 4,
        "num_steps": 3,
    } | changes
    arguments = [f"--{name}={value}" for name, value in values.items() if value is not True]
    return export_model.main(arguments + [f"--{k}" for k, v in values.items() if v is True])


@pytest.fixture(scope="module")
def exported(inputs, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.mgx"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        assert run_tool(inputs, path) == 0
    return path


@pytest.fixture
def load():
    import load_exported

    return load_exported.ExportedGenerator


def make_generator(inputs):
    return ImageGenerator.from_checkpoint(
        inputs / "model",
        tokenizer=inputs / "tokenizer",
        batch_size=4,
        mesh=sharding.make_mesh({"data": 1}, jax.devices()[:1]),
    )


def rewrite(source, target, change):
    """Copy an artefact with `change(name, bytes) → bytes` applied to its parts."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def test_another_process_without_the_package_makes_the_same_images(inputs, exported, tmp_path):
    shutil.copy(TOOLS / "load_exported.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ALONE, exported, json.dumps(CALLS)],
        env=tiny.environment() | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "images.npz") as stored:
        images = list(stored.values())
    generator = make_generator(inputs)
    for (labels, seed), made in zip(CALLS, images, strict=True):
        assert (made.shape, made.dtype) == ((len(labels), 16, 16, 3), np.uint8)
        expected = generator(labels, seed=seed, num_steps=3)
        np.testing.assert_array_equal(made, expected)
    assert len({image.tobytes() for image in images[2]}) == len(CALLS[2][0])
    np.testing.assert_array_equal(np.load(tmp_path / "new/images.npy"), images[0])
    assert os.listdir(tmp_path / "new") == ["images.npy"]


def test_size_and_settings_are_exported(inputs, load, tmp_path, capsys):
    path = tmp_path / "deep" / "model.mgx"
    settings = {
        "num_steps": 17,  # more than the trained grid has tokens
        "schedule": "cosine",
        "guidance_scale": 3.0,
        "temperature_annealing": 0.5,
        "top_k": 9,
        "order": "halton",
        "halton_roll": True,
    }
    assert run_tool(inputs, path, size="16x24", platforms="cpu", norescale=True, **settings) == 0
    assert "16×24 pixels, 3 classes, 17 steps, for cpu;" in capsys.readouterr().out
    settings |= {"rescale": False}
    expected = make_generator(inputs)([2, 0, 1], seed=3, size=(16, 24), **settings)
    made = load(path)
    np.testing.assert_array_equal(made([2, 0, 1], seed=3), expected)
    assert made.header["sampler"].items() >= settings.items()
    assert os.listdir(path.parent) == ["model.mgx"]


def test_equal_models_make_equal_files_of_what_is_read(inputs, exported, tmp_path):
    assert run_tool(inputs, tmp_path / "again.mgx") == 0
    assert (tmp_path / "again.mgx").read_bytes() == exported.read_bytes()
    assert str(tiny.ROOT).encode() not in exported.read_bytes()
    names = zipfile.ZipFile(exported).namelist()
    assert any(name.startswith("weights/tokenizer/decoder/") for name in names)
    assert not any(name.startswith("weights/tokenizer/encoder/") for name in names)


def test_damage_anywhere_is_noticed(exported, tmp_path):
    import load_exported

    whole, path = exported.read_bytes(), tmp_path / "damaged.mgx"
    header, program, weights = load_exported.read_file(exported)
    rng = np.random.default_rng(0)
    noticed = 0
    ends = rng.integers(len(whole) - 3000, len(whole), 100)
    for place in [*rng.integers(0, len(whole), 100), *ends]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            other = load_exported.read_file(path)
        except ValueError:
            noticed += 1
        else:  # a date, say
            assert other[:2] == (header, program)
            jax.tree.map(np.testing.assert_array_equal, other[2], weights)
    assert noticed > 150
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            load_exported.read_file(path)


def test_parts_must_be_those_of_the_header(exported, load, tmp_path):
    def flip(name, part):
        return part[:-1] + bytes([part[-1] ^ 1]) if name.endswith("kernel.npy") else part

    with pytest.raises(ValueError, match=r"kernel\.npy does not match its SHA-256"):
        load(rewrite(exported, tmp_path / "a.mgx", flip))

    def forget(name, part):
        if name != "header.json":
            return part
        header = json.loads(part)
        del header["sha256"]["program.stablehlo"]
        return json.dumps(header).encode()

    with pytest.raises(ValueError, match="parts are not those its header lists"):
        load(rewrite(exported, tmp_path / "b.mgx", forget))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 2, r"version 2 of the format; this loader reads 1"),
        ("format", "other", r"no exported model"),
        ("platforms", ["cuda", "tpu"], r"for cuda, tpu, but JAX runs on cpu.*--platforms cpu"),
    ],
)
def test_what_this_loader_cannot_run_is_refused(exported, load, tmp_path, field, value, message):
    def change(name, part):
        header = name == "header.json"
        return json.dumps(json.loads(part) | {field: value}).encode() if header else part

    with pytest.raises(ValueError, match=message):
        load(rewrite(exported, tmp_path / "x.mgx", change))


def test_a_program_that_jax_cannot_read_names_both_versions(exported, load, tmp_path):
    import export_model
    import load_exported

    header, _, weights = load_exported.read_file(exported)
    header |= {"jax": "9.9.9"}
    export_model.write_file(tmp_path / "x.mgx", header, b"from the future" * 9, weights)
    with pytest.raises(ValueError, match=rf"JAX 9\.9\.9, and JAX {re.escape(jax.__version__)} can"):
        load(tmp_path / "x.mgx")


def test_pixels_that_are_no_numbers_are_refused(exported, load, tmp_path):
    import export_model
    import load_exported

    header, program, weights = load_exported.read_file(exported)
    weights = {
        name: np.full_like(array, np.nan) if "label_embed" in name else array
        for name, array in weights.items()
    }
    tokenizer = next(name for name in weights if name.endswith("conv_out/bias"))
    weights[tokenizer] = np.full_like(weights[tokenizer], np.nan)
    export_model.write_file(tmp_path / "x.mgx", header, program, weights)
    with pytest.raises(ValueError, match="image 0 has pixel values that are NaN"):
        load(tmp_path / "x.mgx")([0])


def test_bad_requests_are_refused(exported, load, tmp_path, capsys):
    import load_exported

    generator = load(exported)
    for labels, message in [
        ([0, 4], r"label 4 is out of range; allowed: 0 to 2, and 3 for none"),
        ([-1], r"label -1 is out of range"),
        ([0.5], r"labels have type float64"),
        ([[0, 1]], r"labels have shape \(1, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            generator(labels)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"seed {seed} is out of range; allowed: 0 to 42949"):
            generator([0], seed=seed)
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        generator([0], batch_size=0)
    assert generator([]).shape == (0, 16, 16, 3)
    out = tmp_path / "x.npy"
    for arguments, message in [
        ([exported, "--labels=0,x", f"--out={out}"], "'x' is no class"),
        ([exported, "--labels=0", "--out=x.png"], r"--out x.png does not end in \.npy"),
        ([exported, "--labels=9", f"--out={out}"], "label 9 is out of range"),
        ([tmp_path / "none.mgx", "--labels=0", f"--out={out}"], "none.mgx"),
    ]:
        assert load_exported.main(list(map(str, arguments))) == 1
        assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platforms": "cpu,gpu"}, r"platform 'gpu'.*cpu"),
        ({"platforms": "cpu,cpu"}, r"names a platform twice"),
        ({"size": "16"}, r"--size '16' is no size"),
        ({"size": "16x18"}, r"width 18 is not a multiple"),
        ({"size": "4x4"}, r"num_steps 3 is out of range; allowed: 1 to 1"),
        ({"num_steps": 17}, r"num_steps 17 is out of range"),
        ({"schedule": "cosin"}, r"'cosin'.*cosine"),
        ({"batch_size": 0}, r"batch_size 0 must be at least 1"),
        ({"workdir": "/nowhere"}, r"/nowhere"),
        ({"tokenizer": "asset:digits_tokenizer"}, r"codebook_size 32 must be the tokenizer's 128"),
    ],
)
def test_bad_exports_are_refused_and_nothing_is_written(inputs, tmp_path, capsys, changes, message):
    assert run_tool(inputs, tmp_path / "x.mgx", **changes) == 1
    errors = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", errors), errors
    assert not list(tmp_path.iterdir())


def test_a_causal_model_is_exported_and_one_of_captions_refused(inputs, load, tmp_path, capsys):
    for family in ("llamagen", "maskgil-text"):
        model = tiny.make_generator(inputs / "tokenizer", family).model
        checkpoints.write_model_dir(
            tmp_path / family,
            kind="model",
            family=family,
            config=model.config.to_dict(),
            params=jax.tree.map(np.asarray, model.params),
        )
    path = tmp_path / "model.mgx"
    # As nobody gives them, the settings of the masked decoder are none of its.
    arguments = [f"--tokenizer={inputs / 'tokenizer'}", f"--out={path}", "--batch_size=4"]
    import export_model

    run = [f"--workdir={tmp_path / 'llamagen'}", "--platforms=cpu", *arguments]
    assert export_model.main([*run, "--guided_tokens=5"]) == 0
    assert "2 classes, token by token, for cpu" in capsys.readouterr().out
    one = ImageGenerator.from_checkpoint(
        tmp_path / "llamagen",
        tokenizer=inputs / "tokenizer",
        batch_size=4,
        mesh=sharding.make_mesh({"data": 1}, jax.devices()[:1]),
    )
    expected = one([1, 0, 1], seed=3, guided_tokens=5)
    np.testing.assert_array_equal(load(path)([1, 0, 1], seed=3), expected)
    assert export_model.main([*run, "--num_steps=4"]) == 1
    assert "num_steps" in capsys.readouterr().err
    run[0] = f"--workdir={tmp_path / 'maskgil-text'}"
    assert export_model.main([*run, f"--out={tmp_path / 'none.mgx'}"]) == 1
    assert "has no classes: it is conditioned on captions" in capsys.readouterr().err
    assert not (tmp_path / "none.mgx").exists()
