"""The sample command: what it writes, what it takes from the run, what it refuses."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from absl import flags
from flax import linen as nn
from PIL import Image

from maskgil_jax import ImageGenerator, SamplerConfig, checkpoints, load_model, pictures, sharding
from maskgil_jax import config as schema
from maskgil_jax.asked import parse_labels
from maskgil_jax.build import data as build_data
from maskgil_jax.build import models as build
from maskgil_jax.cli import parse_size
from maskgil_jax.data.token_records import TokenRecordSource
from maskgil_jax.decoding.autoregressive import AutoregressiveConfig
from maskgil_jax.models.base import ClassModelConfig
from maskgil_jax.photo_edit import Edit
from maskgil_jax.sample import describe_records, parse_outpaint, sample
from maskgil_jax.tokenizers.base import Tokenizer
from maskgil_jax.train import _open_batches, _open_tokenizer
from maskgil_jax.workdir import claim_workdir
from tools.export_weights import export_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")


class NoData:
    def get_state(self):
        return b"{}"


CLASS_MODELS = [name for name, kind in build.MODELS.items() if issubclass(kind, ClassModelConfig)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer") / "vq")


@pytest.fixture(scope="module")
def config(tokenizer, request):
    """A MaskGIL, or the family by which a test is parametrised."""
    config = tiny.get_config()
    tiny.set_family(config, getattr(request, "param", "maskgil"))
    config.tokenizer.path = str(tokenizer)
    return config


@pytest.fixture(scope="module")
def params(config):
    """Random weights, the head's too, so that samples depend on everything."""
    init = jax.jit(build.init_model(build.model_config(config)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.asarray(x) + rng.normal(0, 0.3, x.shape).astype(np.float32),
        nn.unbox(init(jax.random.key(0))),
    )


@pytest.fixture(scope="module")
def run_dir(config, params, tmp_path_factory):
    """A run directory with one checkpoint."""
    path = tmp_path_factory.mktemp("run")
    with claim_workdir(path, config), contextlib.closing(checkpoints.Checkpoints(path)) as store:
        store.save(1, {"params": jax.tree.map(jax.numpy.asarray, params)}, NoData())
    return path


@pytest.fixture(scope="module")
def model_dir(run_dir, tmp_path_factory):
    """The same weights as a model directory."""
    path = tmp_path_factory.mktemp("model") / "model"
    export_weights(run_dir, path)
    return path


def read_npz(path):
    with np.load(path) as stored:
        return stored["arr_0"], stored["labels"]


def read_png(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_grid_arrays_and_single_pictures_show_the_same_images(run_dir, tmp_path):
    labels = [1, 0, 1]
    for name, batch_size in (("a/x.png", 64), ("a/x.npz", 1), ("each", 2)):
        sample(run_dir, tmp_path / name, labels=labels, seed=3, batch_size=batch_size)
    images, stored = read_npz(tmp_path / "a/x.npz")
    assert (images.shape, images.dtype) == ((3, 16, 16, 3), np.uint8)
    assert stored.tolist() == labels
    assert len({image.tobytes() for image in images}) == 3
    names = sorted(os.listdir(tmp_path / "each"))
    assert names == ["000000_label1.png", "000001_label0.png", "000002_label1.png"]
    for name, image in zip(names, images, strict=True):
        np.testing.assert_array_equal(read_png(tmp_path / "each" / name), image)
    grid = read_png(tmp_path / "a/x.png")
    assert grid.shape == (20, 3 * 18 + 2, 3)
    np.testing.assert_array_equal(grid[2:18, 38:54], images[2])
    assert sorted(os.listdir(tmp_path / "a")) == ["x.npz", "x.png"]


@pytest.mark.parametrize("name", ["x.npz", "x"])
def test_chunks_are_the_images_of_one_call(run_dir, tmp_path, name):
    sample(run_dir, tmp_path / name, num_per_class=5, seed=2, batch_size=4)
    generator = ImageGenerator.from_checkpoint(run_dir, batch_size=4)
    expected = generator([0] * 5 + [1] * 5, seed=2)
    if name == "x.npz":
        images, labels = read_npz(tmp_path / name)
        assert labels.tolist() == [0] * 5 + [1] * 5
    else:
        images = np.stack([read_png(path) for path in sorted((tmp_path / name).iterdir())])
    np.testing.assert_array_equal(images, expected)
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(ValueError, match="first_index -1 is out of range"):
        generator([0], first_index=-1)


def test_records_are_codes_that_a_run_trains_on(
    config, run_dir, tokenizer, tmp_path, capsys, monkeypatch
):
    settings = {"num_per_class": 9, "seed": 2, "batch_size": 4}
    expected = ImageGenerator.from_checkpoint(run_dir, batch_size=4).tokens(
        [0] * 9 + [1] * 9, seed=2
    )
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "decode", lambda *_, **__: pytest.fail("pixels were made"))
        sample(run_dir, tmp_path / "tokens", records=True, **settings)
    assert "18 records of 16×16 pixels" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["tokens"]
    config = config.copy_and_resolve_references()
    config.data.update(name="tokens", path=str(tmp_path / "tokens"), flip=False)
    sources = build_data.make_sources(config)
    [source] = sources.values()
    np.testing.assert_array_equal([source[i]["tokens"][0] for i in range(18)], expected)
    assert [int(source[i]["label"]) for i in range(18)] == [0] * 9 + [1] * 9
    # As a run begins: what does not fit its tokenizer and its model is refused.
    vq = _open_tokenizer(config, sources)
    batch = next(_open_batches(config, sources, vq, None, sharding.make_mesh({"data": -1})))
    known = {(codes.tobytes(), i // 9) for i, codes in enumerate(expected)}
    pairs = zip(np.asarray(batch["tokens"]), np.asarray(batch["label"]), strict=True)
    assert {(codes.tobytes(), int(label)) for codes, label in pairs} <= known
    # Another seed makes another data set, and of other codes.
    sample(run_dir, tmp_path / "other", records=True, **settings | {"seed": 3})
    other = build_data.make_source(config).name, TokenRecordSource(tmp_path / "other").name
    assert other[0] != other[1]
    config.tokenizer.path = "asset:digits_tokenizer"
    with pytest.raises(ValueError, match="they were made by another tokenizer"):
        _open_tokenizer(config, sources)


@pytest.mark.parametrize(("count", "shards"), [(1, 1), (4096, 1), (4097, 2), (1_000_000, 16)])
def test_records_lie_in_few_files(run_dir, count, shards):
    settings = {"labels": [1], "num_per_class": count, "size": [8, 24], "batch_size": 4}
    generator = ImageGenerator.from_checkpoint(run_dir)
    dataset = describe_records(generator, "vq", settings)
    assert (dataset.num_shards, dataset.source_records, dataset.grid) == (shards, count, (2, 6))


def test_other_sizes_than_the_trained_one(run_dir, tmp_path, capsys):
    sample(run_dir, tmp_path / "x.npz", size=(16, 24), batch_size=4)
    assert "2 images of 16×24 pixels" in capsys.readouterr().out
    images, _ = read_npz(tmp_path / "x.npz")
    expected = ImageGenerator.from_checkpoint(run_dir, batch_size=4)([0, 1], size=(16, 24))
    np.testing.assert_array_equal(images, expected)


def test_tiles_of_the_tokenizer_are_asked_for_and_belong_to_the_job(run_dir, tmp_path, monkeypatch):
    settings = dict(size=(16, 36), batch_size=2)
    sample(run_dir, tmp_path / "x.npz", tile_size=16, **settings)
    tiled = ImageGenerator.from_checkpoint(run_dir, tile_size=16, batch_size=2)
    images = read_npz(tmp_path / "x.npz")[0]
    np.testing.assert_array_equal(images, tiled([0, 1], size=(16, 36)))
    whole = ImageGenerator.from_checkpoint(run_dir, batch_size=2)
    assert (images != whole([0, 1], size=(16, 36))).any()

    def fail(generator, labels, *, first_index, **options):
        if first_index:
            raise KeyboardInterrupt
        return np.zeros((4, 16, 36, 3), np.uint8)

    monkeypatch.setattr(ImageGenerator, "__call__", fail)
    settings |= {"num_per_class": 4}
    with pytest.raises(KeyboardInterrupt):
        sample(run_dir, tmp_path / "y.npz", tile_size=16, **settings)
    with pytest.raises(ValueError, match="tile_size: 16 there, null now"):
        sample(run_dir, tmp_path / "y.npz", **settings)


def test_images_computed_alone_belong_to_the_job(run_dir, tmp_path, monkeypatch):
    settings = dict(labels=[0, 1], num_per_class=3, batch_invariant=True)
    sample(run_dir, tmp_path / "x.npz", batch_size=4, **settings)
    alone = ImageGenerator.from_checkpoint(run_dir, batch_size=1, batch_invariant=True)
    images, labels = read_npz(tmp_path / "x.npz")
    np.testing.assert_array_equal(images, alone(labels))
    seen = []

    def stop(generator, labels, *, first_index, **options):
        seen.append((generator.batch_invariant, len(labels)))
        if first_index:
            raise KeyboardInterrupt
        return np.zeros((4, 16, 16, 3), np.uint8)

    monkeypatch.setattr(ImageGenerator, "__call__", stop)
    for name, changes in (("y.npz", {}), ("z.npz", {"batch_invariant": False})):
        with pytest.raises(KeyboardInterrupt):
            sample(run_dir, tmp_path / name, batch_size=4, **settings | changes)
    # Padding that is not computed needs no filling up.
    assert seen == [(True, 4), (True, 2), (False, 4), (False, 4)]
    with pytest.raises(ValueError, match="batch_invariant: true there, false now"):
        sample(run_dir, tmp_path / "y.npz", batch_size=4, **settings | {"batch_invariant": False})


def make_edit(**fields):
    photo = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[:, 8:] = True
    return Edit(photo=photo, **fields or {"mask": mask})


def test_an_edit_keeps_what_is_not_marked(run_dir, tmp_path):
    edit = make_edit()
    sample(run_dir, tmp_path / "x.npz", edit=edit, labels=[0, 1], num_per_class=2)
    images, labels = read_npz(tmp_path / "x.npz")
    assert labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(images[:, :, :8], edit.photo[None, :, :8].repeat(4, 0))
    assert len({image.tobytes() for image in images}) == 4
    sample(run_dir, tmp_path / "x.png", edit=edit, labels=[0])
    assert read_png(tmp_path / "x.png").shape == (16, 16, 3)
    soft = dataclasses.replace(edit, grow=1, feather=3.0)
    sample(run_dir, tmp_path / "soft.npz", edit=soft, labels=[0, 1], num_per_class=2)
    blended, _ = read_npz(tmp_path / "soft.npz")
    np.testing.assert_array_equal(blended[:, :, :5], edit.photo[None, :, :5].repeat(4, 0))
    assert (blended[:, :, 5:8] != images[:, :, 5:8]).any()


def test_outpainting_and_variations(run_dir, tmp_path):
    edit = make_edit(outpaint=(0, 0, 4, 4))
    sample(run_dir, tmp_path / "wide.npz", edit=edit, labels=[1, 0], num_per_class=2)
    images, _ = read_npz(tmp_path / "wide.npz")
    np.testing.assert_array_equal(images[:, :, 4:20], edit.photo[None].repeat(4, 0))
    edit = make_edit(vary=0.5)
    sample(run_dir, tmp_path / "x.npz", edit=edit, labels=[1, 0], num_per_class=2, seed=5)
    generator = ImageGenerator.from_checkpoint(run_dir)
    photos = edit.photo[None].repeat(4, 0)
    expected = generator.vary(photos, [1, 1, 0, 0], keep=0.5, seed=5).images
    np.testing.assert_array_equal(read_npz(tmp_path / "x.npz")[0], expected)


@pytest.mark.parametrize("name", ["x.npz", "x.png"])
@pytest.mark.parametrize("task", ["mask", "vary"])
def test_an_edit_of_more_images_than_a_chunk_is_one_call(run_dir, tmp_path, task, name):
    edit = make_edit(vary=0.5) if task == "vary" else make_edit()
    sample(run_dir, tmp_path / name, edit=edit, labels=[1], num_per_class=10, batch_size=4, seed=5)
    generator = ImageGenerator.from_checkpoint(run_dir, batch_size=4)
    photos = edit.photo[None].repeat(10, 0)
    if task == "vary":
        expected = generator.vary(photos, [1] * 10, keep=0.5, seed=5).images
    else:
        masks = edit.mask[None].repeat(10, 0)
        expected = generator.edit(photos, masks, [1] * 10, seed=5).images
    if name == "x.npz":
        np.testing.assert_array_equal(read_npz(tmp_path / name)[0], expected)
    else:
        grid = pictures.make_grid(expected, columns=10)
        np.testing.assert_array_equal(read_png(tmp_path / name), grid)


def test_an_interrupted_edit_makes_only_what_is_missing(run_dir, tmp_path, monkeypatch, capsys):
    settings = {"edit": make_edit(vary=0.5), "labels": [1, 0], "num_per_class": 5, "batch_size": 4}
    sample(run_dir, tmp_path / "whole.npz", **settings)
    apply, starts = Edit.apply, []

    def fail(edit, generator, count, *, first_index, **options):
        starts.append(first_index)
        if first_index == 8 and starts.count(8) == 1:
            raise KeyboardInterrupt
        return apply(edit, generator, count, first_index=first_index, **options)

    monkeypatch.setattr(Edit, "apply", fail)
    with pytest.raises(KeyboardInterrupt):
        sample(run_dir, tmp_path / "x.npz", **settings)
    capsys.readouterr()
    sample(run_dir, tmp_path / "x.npz", **settings)
    assert starts == [0, 4, 8, 8]
    assert "8 of them kept from an earlier start" in capsys.readouterr().out
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["whole.npz", "x.npz"]


def test_larger_results_may_have_more_steps(run_dir, tmp_path, capsys):
    sample(run_dir, tmp_path / "x.npz", labels=[0], size=(16, 24), num_steps=24)
    edit = make_edit(outpaint=(0, 0, 4, 4))
    sample(run_dir, tmp_path / "wide.npz", labels=[0], edit=edit, num_steps=24)
    assert capsys.readouterr().out.count("; 24 steps") == 2
    with pytest.raises(ValueError, match="num_steps 5 is out of range; allowed: 1 to 4"):
        sample(run_dir, tmp_path / "y.npz", labels=[0], size=(8, 8), num_steps=5)


def test_another_number_of_devices_is_another_job(run_dir, tmp_path, monkeypatch):
    settings = {"labels": [0], "num_per_class": 8, "batch_size": 4}

    def fail(generator, labels, *, first_index, **options):
        if first_index:
            raise KeyboardInterrupt
        return np.zeros((4, 16, 16, 3), np.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(ImageGenerator, "__call__", fail)
        with pytest.raises(KeyboardInterrupt):
            sample(run_dir, tmp_path / "x.npz", **settings)
    devices = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    with pytest.raises(ValueError, match="devices: 4 there, 2 now"):
        sample(run_dir, tmp_path / "x.npz", **settings)


def test_settings_are_the_runs_unless_given(run_dir, tmp_path, capsys):
    sample(run_dir, tmp_path / "a.npz", labels=[0, 1], num_steps=None)
    assert "2 steps, arccos increments, linear guidance 2, temp" in capsys.readouterr().out
    sample(
        run_dir,
        tmp_path / "b.npz",
        labels=[0, 1],
        num_steps=5,
        schedule="root",
        schedule_form="mask_ratio",
        guidance_scale=3.0,
        guidance_schedule="constant",
        temperature=0.0,
        gumbel_temperature=0.0,
    )
    out = capsys.readouterr().out
    assert "2 images of 16×16 pixels" in out
    assert out.count("\n") == 1
    assert "5 steps, root mask_ratio, constant guidance 3, temperature 0, Gumbel 0, seed 0" in out
    assert (read_npz(tmp_path / "a.npz")[0] != read_npz(tmp_path / "b.npz")[0]).any()


def test_every_class_by_default_one_row_each(run_dir, tmp_path):
    sample(run_dir, tmp_path / "x.npz", num_per_class=3)
    assert read_npz(tmp_path / "x.npz")[1].tolist() == [0, 0, 0, 1, 1, 1]
    sample(run_dir, tmp_path / "x.png", num_per_class=3)
    assert read_png(tmp_path / "x.png").shape == (2 * 18 + 2, 3 * 18 + 2, 3)


@pytest.mark.parametrize("config", CLASS_MODELS, indirect=True)
def test_model_directory_needs_a_tokenizer_and_gives_the_runs_images(
    config, run_dir, model_dir, tokenizer, tmp_path
):
    assert checkpoints.read_model_dir(model_dir).family == config.model.family
    with pytest.raises(ValueError, match="--tokenizer"):
        sample(model_dir, tmp_path / "x.png")
    causal = build.find_model(config.model.family).causal
    settings = {"labels": [0, 1, 2]} | ({"top_k": 20} if causal else {"num_steps": 2})
    sample(model_dir, tmp_path / "a.npz", tokenizer=str(tokenizer), **settings)
    sample(run_dir, tmp_path / "b.npz", **settings)
    images = [read_npz(tmp_path / name)[0] for name in ("a.npz", "b.npz")]
    np.testing.assert_array_equal(*images)
    assert len({image.tobytes() for image in images[0]}) == 3


@pytest.mark.parametrize("config", CLASS_MODELS, indirect=True)
def test_a_loaded_model_gives_logits_that_follow_the_label(config, run_dir, model_dir):
    model, stored = load_model(run_dir), load_model(model_dir)
    assert stored.config == model.config == build.model_config(config)
    assert build.model_config(stored.run) == stored.config
    last = model.config.num_tokens - 1  # the mask, where there is one
    tokens, labels = np.full((2, 4, 4), last), np.array([0, 2])
    logits = np.asarray(model.logits(tokens, labels))
    assert logits.shape == (2, 16, last + 1)
    with pytest.raises(ValueError, match=f"token {last + 1} is out of range; allowed: 0 to {last}"):
        model.logits(tokens + 1, labels)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    narrow = stored.logits(tokens.astype(np.uint16), labels.astype(np.uint8))
    np.testing.assert_array_equal(narrow, logits)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("x.png", {"schedule": "arcos"}, "Did you mean 'arccos'"),
        ("x.png", {"schedule_form": "ratio"}, "Did you mean 'mask_ratio'"),
        ("x.png", {"num_steps": 0}, "num_steps 0 is out of range"),
        ("x.npz", {"num_steps": 17}, "num_steps 17 is out of range; allowed: 1 to 16"),
        ("x", {"labels": [0, 3]}, "label 3 is out of range; allowed: 0 to 2"),
        ("x", {"labels": [2**32]}, "label 4294967296 is out of range"),
        ("x.png", {"num_per_class": 0}, "there are no labels"),
        (".", {}, r"--out \. has no name; allowed: FILE\.png, FILE\.npz, a new directory"),
        ("x.png", {"temperature": -1.0}, "temperature -1.0 is out of range"),
        ("x.jpg", {}, r"ends in \.jpg; allowed: \.png, \.npz"),
        ("x.npz", {"seed": 2**32}, "seed 4294967296 is out of range"),
        ("x.npz", {"tile_size": 10}, "tile_size is 10; .* factor 4, and at least 8, for example 8"),
        ("x.npz", {"size": (16, 18)}, "width 18 is not a multiple .* for example to 16"),
        ("x.npz", {"edit": make_edit(), "labels": [0], "size": (16, 16)}, "exclude each other"),
        ("x.npz", {"edit": make_edit()}, "--edit needs --labels"),
        ("x.npz", {"records": True}, r"ends in \.npz; with --records name a new directory"),
        ("x.png", {"records": True}, r"ends in \.png; with --records name a new directory"),
        ("x.bin", {"records": True}, r"ends in \.bin; allowed: \.png, \.npz, or a directory"),
        ("x", {"records": True, "labels": [2]}, "label 2 is out of range; allowed: 0 to 1"),
        ("x", {"records": True, "labels": [0], "edit": make_edit()}, "--records and --edit excl"),
        ("x", {"edit": make_edit(outpaint=(1, 0, 0, 0)), "labels": [0]}, "height 17 is not a mult"),
        ("x", {"edit": make_edit(outpaint=(0, 0, 0, 0)), "labels": [0]}, "padding .* out of range"),
        ("x", {"edit": make_edit(vary=1.0), "labels": [0]}, r"keep 1\.0 is out of range"),
        ("x", {"edit": make_edit(mask=np.ones((16, 16), bool)), "labels": [0]}, "the whole image"),
    ],
)
def test_bad_settings_are_refused_and_nothing_is_written(
    run_dir, tmp_path, name, settings, message
):
    with contextlib.chdir(tmp_path), pytest.raises(ValueError, match=message):
        sample(run_dir, name, **settings)
    assert not os.listdir(tmp_path)


def test_a_tokenizer_that_does_not_fit_is_refused(run_dir, tokenizer, tmp_path):
    half = checkpoints.read_model_dir(tokenizer)
    half.params["quantizer"]["codebook"] = half.params["quantizer"]["codebook"][:16]
    checkpoints.write_model_dir(
        tmp_path / "half",
        kind="tokenizer",
        family=half.family,
        config=half.config | {"codebook_size": 16},
        params=half.params,
    )
    with pytest.raises(ValueError, match=r"model\.codebook_size 32 must be the tokenizer's 16"):
        sample(run_dir, tmp_path / "x.png", tokenizer=str(tmp_path / "half"))


def test_a_directory_that_holds_something_is_refused(run_dir, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        sample(run_dir, tmp_path, labels=[0])
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_a_missing_run_or_checkpoint_is_named(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is neither a run directory"):
        sample(tmp_path / "nowhere", tmp_path / "x.png")
    with claim_workdir(tmp_path / "fresh", config):
        pass
    with pytest.raises(FileNotFoundError, match="no finished checkpoint yet"):
        sample(tmp_path / "fresh", tmp_path / "x.png")


def test_labels_are_numbers_between_commas():
    assert parse_labels("3, 1,4") == [3, 1, 4]
    for text in ("", "3,", "3;1", "-1", "cat", "1.5"):
        with pytest.raises(ValueError, match="--labels"):
            parse_labels(text)


def test_sizes_and_paddings_are_read():
    assert parse_size(" 16x24 ") == parse_size("16×24") == (16, 24)
    assert parse_outpaint("0, 4,8,12") == (0, 4, 8, 12)
    for text in ("16", "16x", "16*24", "x", "-16x24", "1.5x2"):
        with pytest.raises(ValueError, match="--size"):
            parse_size(text)
    for text in ("", "1,2,3", "1,2,3,-4", "a,b,c,d"):
        with pytest.raises(ValueError, match="--outpaint"):
            parse_outpaint(text)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The user's cache directory of the commands below."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(cache, run_dir):
    """Starts a command, optimised as it is for users: `command(*arguments, **variables)`."""

    def start(*arguments, devices=1, **variables):
        return subprocess.Popen(
            [sys.executable, "-m", "maskgil_jax.sample", f"--workdir={run_dir}", *arguments],
            env=tiny.environment(devices) | {"XDG_CACHE_HOME": str(cache)} | variables,
            cwd=tiny.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


# The same programs as in this process, for images that are the same to the byte.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def finish(process):
    """Wait for a command; return its status, output and errors."""
    out, errors = process.communicate(timeout=240)
    return process.returncode, out, errors


def test_every_setting_of_the_sampler_is_a_flag_and_in_the_configuration():
    masked, causal = (
        {field.name for field in dataclasses.fields(kind)}
        for kind in (SamplerConfig, AutoregressiveConfig)
    )
    assert masked | causal | {f"ar_{name}" for name in causal} <= set(flags.FLAGS)
    assert masked | causal == set(schema.default().sampler)


def test_command_line(command, cache, tmp_path):
    out = tmp_path / "grid.png"
    flags = ["--labels=1,0", "--num_steps=4", "--guidance_scale=2", "--schedule=cosine", "--seed=0"]
    status, said, errors = finish(command(f"--out={out}", *flags))
    assert status == 0, errors
    assert said.startswith(f"{out}: 2 images")
    assert "4 steps, cosine" in said
    assert read_png(out).shape == (20, 2 * 18 + 2, 3)
    assert list((cache / "maskgil_jax").glob("jit_run-*"))
    status, _, errors = finish(command(f"--out={tmp_path / 'b.png'}", "--labels=1,x"))
    assert status == 1
    assert errors.strip() == "error: --labels '1,x': 'x' is no class; write numbers: 3,1,4"


def test_a_broken_picture_is_one_line_and_nothing_is_written(command, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    out = tmp_path / "x.npz"
    edit = [f"--edit={tmp_path / 'photo.png'}", "--labels=0", "--vary=0.5"]
    status, said, errors = finish(command(f"--out={out}", *edit))
    assert (status, said, errors.count("\n")) == (1, "", 1)
    assert errors.startswith(f"error: --edit {tmp_path / 'photo.png'}: ")
    assert os.listdir(tmp_path) == ["photo.png"]


def test_a_killed_command_goes_on_where_it_was(command, run_dir, tmp_path):
    flags = ["--num_per_class=200", "--batch_size=4"]
    # As many devices as this process has: pixels are rounded as the batch is split.
    same = QUICK | {"devices": jax.device_count()}
    process = command(f"--out={tmp_path / 'x.npz'}", *flags, **same)
    chunks = tmp_path / ".x.npz.work" / "chunks"
    while process.poll() is None and not (chunks.is_dir() and len(os.listdir(chunks)) > 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert not (tmp_path / "x.npz").exists()
    status, said, errors = finish(command(f"--out={tmp_path / 'x.npz'}", *flags, **same))
    assert status == 0, errors
    assert "of them kept from an earlier start" in said
    sample(run_dir, tmp_path / "whole.npz", num_per_class=200, batch_size=4)
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert len(read_npz(tmp_path / "x.npz")[0]) == 400
    assert sorted(os.listdir(tmp_path)) == ["whole.npz", "x.npz"]


def test_two_processes_write_what_one_does(command, run_dir, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ["--num_per_class=9", "--batch_size=4", f"--coordinator=localhost:{port}"]
    flags += ["--records", f"--out={tmp_path / 'tokens'}", "--num_processes=2"]
    started = [command(*flags, f"--process_id={index}", **QUICK) for index in range(2)]
    try:
        results = [finish(process) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [status for status, _, _ in results] == [0, 0], results
    assert ["18 records of" in said for _, said, _ in results] == [True, False]
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    sample(run_dir, tmp_path / "whole", records=True, num_per_class=9, batch_size=4)
    names = sorted(os.listdir(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path / "tokens")) == names
    for name in names:
        contents = [(tmp_path / folder / name).read_bytes() for folder in ("tokens", "whole")]
        assert contents[0] == contents[1]
    assert sorted(os.listdir(tmp_path)) == ["tokens", "whole"]


def test_a_causal_model_begins_what_the_run_completes(run_dir, tokenizer, tmp_path, capsys):
    causal = tiny.make_generator(tokenizer, "llamagen").model
    checkpoints.write_model_dir(
        tmp_path / "ar",
        kind="model",
        family="llamagen",
        config=causal.config.to_dict(),
        params=causal.params,
    )
    settings = {"labels": [0, 1], "num_steps": 2, "ar_temperature": 0.0}
    begin = {"ar_checkpoint": str(tmp_path / "ar"), "ar_share": 0.5}
    sample(run_dir, tmp_path / "a.npz", **begin, **settings)
    assert "the first 50% of the tokens token by token" in capsys.readouterr().out
    generator = ImageGenerator.from_checkpoint(run_dir, **begin)
    expected = generator([0, 1], num_steps=2, ar_temperature=0.0)
    np.testing.assert_array_equal(read_npz(tmp_path / "a.npz")[0], expected)
    sample(run_dir, tmp_path / "b.npz", labels=[0, 1], num_steps=2)
    assert (read_npz(tmp_path / "b.npz")[0] != expected).any()
    with pytest.raises(ValueError, match="ar_temperature: there is no causal model"):
        sample(run_dir, tmp_path / "c.npz", **settings)
    with pytest.raises(ValueError, match="share 2.0 of the tokens is out of range"):
        sample(run_dir, tmp_path / "c.npz", **begin | {"ar_share": 2.0}, **settings)
    assert not (tmp_path / "c.npz").exists()
