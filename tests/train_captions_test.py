"""Training from captions, in batches of several sizes."""

import json
import re
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest
import tiny
import tiny_text
from PIL import Image
from train_test import final_state, losses

from maskgil_jax import ImageGenerator, checkpoints, sharding
from maskgil_jax.build import captions
from maskgil_jax.build import data as build
from maskgil_jax.build import training as build_training
from maskgil_jax.text.base import Tokenized
from maskgil_jax.train import _open_batches, _open_text_encoder, _open_tokenizer, train


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.make_tokenizer_dir(tmp_path_factory.mktemp("inputs") / "tokenizer")


@pytest.fixture
def config(tokenizer):
    config = tiny.get_config("captions")
    config.tokenizer.path = str(tokenizer)
    config.training.num_steps = 4
    return config


@pytest.fixture(scope="module")
def finished(tokenizer, tmp_path_factory):
    """A run of 12 steps that nothing disturbed."""
    path = tmp_path_factory.mktemp("finished") / "run"
    result = tiny.run(*flags(tokenizer), f"--workdir={path}")
    assert result.returncode == 0, result.stderr
    return path, result.stdout


def flags(tokenizer):
    file = tiny.ROOT / "tests" / "tiny.py"
    return [f"--config={file}:captions", f"--config.tokenizer.path={tokenizer}"]


def open_batches(config, encoder=None):
    sources, mesh = build.make_sources(config), sharding.make_mesh({"data": -1})
    tokenizer = _open_tokenizer(config, sources)
    return _open_batches(config, sources, tokenizer, encoder, mesh)


def test_a_killed_run_ends_with_the_same_bits(tokenizer, finished, tmp_path):
    path = tmp_path / "run"
    arguments = [*flags(tokenizer), f"--workdir={path}", "--config.logging.every=1"]
    with subprocess.Popen(
        tiny.command(*arguments),
        env=tiny.environment(),
        cwd=tiny.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("step 10/"):
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    result = tiny.run(*arguments)
    assert result.returncode == 0, result.stderr
    assert re.search("resumed from step [48]", result.stdout)
    expected, actual = final_state(finished[0]), final_state(path)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def test_a_run_draws_its_prompts_and_generates_from_them(finished):
    path, output = finished
    assert json.loads(output.splitlines()[-1])["steps"] == 12
    assert losses(output).keys() == {2, 4, 6, 8, 10, 12}
    assert (path / "samples" / "0000012.png").is_file()
    generator = ImageGenerator.from_checkpoint(path)
    prompts = ["a red seven", "two blue ones"]
    images = generator(prompts=prompts, size=(64, 96))
    assert images.shape == (2, 64, 96, 3)
    np.testing.assert_array_equal(
        generator(prompts=prompts[1:], size=(64, 96), first_index=1)[0], images[1]
    )
    with pytest.raises(ValueError, match="size 64x128.*nearest is 64x96; allowed: 64x64, 64x96"):
        generator(prompts=prompts, size=(64, 128))


def test_batches_are_of_one_bucket_and_the_same_from_a_cache(config):
    shapes, captions = [], set()
    batches = open_batches(config)
    for _ in range(6):
        batch = next(batches)
        shapes.append(batch["tokens"].shape)
        assert batch["caption"].shape == (8, 64)
        for ids, length in zip(np.asarray(batch["caption"]), batch["caption_length"], strict=True):
            captions.add(bytes(ids[:length].tolist()).decode())
            assert not ids[length:].any()
    assert sorted(shapes) == [(8, 16, 16)] * 3 + [(8, 16, 24)] * 3
    assert len(captions) > 40
    source = build.make_sources(config)[64, 64]
    assert any(source[i]["caption"].split()[0] in ("a", "an", "two", "three") for i in range(20))

    config.data.num_records = 12
    config.data.cache_tokens = True
    cached = next(open_batches(config))
    config.data.cache_tokens = False
    whole = next(open_batches(config))
    # Of the same twelve canvases, in another order.
    known = {row.tobytes() for row in np.asarray(cached["caption"])}
    assert cached["tokens"].shape == whole["tokens"].shape
    assert len(known & {row.tobytes() for row in np.asarray(whole["caption"])}) >= 4


def test_the_step_is_compiled_once_for_each_bucket(config):
    mesh = sharding.make_mesh({"data": -1})
    with jax.set_mesh(mesh):
        task = build_training.make_maskgil_task(config, mesh)
        batches, state, metrics = open_batches(config), task.init(), task.empty_metrics()
        for _ in range(6):
            state, metrics = task.step(state, metrics, next(batches))
    [jitted] = task.step._jitted.values()
    assert jitted._cache_size() == 2
    assert np.isfinite(float(metrics.compute()["loss"]))


class Spelling:
    """A text encoder whose features are the codes of letters, outside of JAX."""

    jittable = False
    name, width, max_length, fingerprint = "spelling", 5, 64, "0"

    def tokenize(self, prompts):
        ids = np.zeros((len(prompts), 64), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            letters = [ord(letter) for letter in prompt[:64]]
            row[: len(letters)] = letters
        lengths = np.array([min(len(prompt), 64) for prompt in prompts], np.int32)
        return Tokenized(ids, lengths, np.array([len(prompt) > 64 for prompt in prompts]))

    def encode(self, ids, lengths):
        assert isinstance(ids, np.ndarray)
        return np.where(ids > 0, ids / 128, 0)[..., None].repeat(5, -1).astype(np.float32)


def test_a_run_on_the_features_of_an_encoder(config, tmp_path, monkeypatch):
    opened = []

    def load(path, **options):
        opened.append((path, options))
        return Spelling()

    monkeypatch.setattr("maskgil_jax.loading.load_text_encoder", load)
    config.model.update(text="features", text_width=5, text_length=64)
    config.text.encoder = str(tmp_path / "encoder")
    config.training.num_steps = 2
    config.logging.every = 1
    train(config, tmp_path / "run")
    options = {"max_length": 64, "hidden_layer": -1, "dtype": None}
    assert opened == [(str(tmp_path / "encoder"), options)]
    batch = next(open_batches(config, Spelling()))
    assert batch["caption"].shape == (8, 64, 5)
    generator = ImageGenerator.from_checkpoint(tmp_path / "run")
    assert generator(prompts=["a red seven"]).shape == (1, 64, 64, 3)
    config.model.text_width = 6
    with pytest.raises(ValueError, match="spelling gives up to 64 features of width 5, but.*6"):
        train(config, tmp_path / "other")


def test_gemma_computes_on_all_devices(config, tmp_path):
    shape = tiny_text.gemma_config(2)
    checkpoints.write_model_dir(
        tmp_path / "gemma",
        kind="text-encoder",
        family="gemma",
        config=shape.to_dict(),
        params=tiny_text.make_params(shape),
        files=[tiny_text.make_tokenizer_file(tmp_path / "tokenizer.json")],
    )
    config.model.update(text="features", text_width=shape.width, text_length=40)
    config.text.encoder = str(tmp_path / "gemma")
    encoder = _open_text_encoder(config)
    mesh = sharding.make_mesh({"data": -1})
    source = build.make_sources(config)[64, 64]
    tokens = encoder.tokenize([source[index]["caption"] for index in range(8)])
    batch = {"caption": tokens.ids, "caption_length": tokens.lengths}
    found = captions.make_encoder(encoder, mesh)(sharding.put_batch(batch, mesh))["caption"]
    assert len(found.sharding.device_set) == jax.device_count() == 4
    expected = np.asarray(encoder.encode(tokens.ids, tokens.lengths))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert next(open_batches(config, encoder))["caption"].shape == (8, 40, shape.width)


def test_captions_that_are_too_long_are_cut_and_that_is_said(config, capsys):
    config.model.text_length = 16
    batch = next(open_batches(config))
    said = r"\d+ of the first 100 captions of 64x64 are longer than model.text_length 16"
    assert re.search(said, capsys.readouterr().out)
    assert batch["caption"].shape == (8, 16)
    assert (batch["caption_length"] == 16).any()
    read = captions.make_transform(config, None)
    record = read({"caption": "a red seven in à"}, np.random.default_rng(0))
    assert record["caption_length"] == 15  # not half of à


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data.name": "digits", "data.buckets": "none"}, "'digits' has no captions"),
        ({"text.encoder": "gemma"}, "model.text 'bytes' and text.encoder '.*gemma'"),
        ({"model.text": "features"}, "features need the directory of their encoder"),
        ({"data.bucket_sizes": ((64, 96),)}, r"image_size \(64, 64\) among them"),
        ({"data.bucket_sizes": ((64, 64), 3)}, "3 is no size"),
        ({"data.flip": True}, "captions of canvases would become wrong: data.flip True"),
        ({"evaluation.every_steps": 10}, "evaluation.every_steps"),
        ({"text.hidden_layer": 3}, "text.hidden_layer 3 .* bytes have none"),
        ({"text.dtype": "bfloat16"}, "text.dtype bfloat16 .* bytes have none"),
        ({"model.family": "maskgil"}, "'canvases' has no captions: data.buckets 'listed'"),
        ({"report.name": "digits"}, "report.name 'digits' needs data.name 'digits'"),
    ],
)
def test_settings_that_do_not_go_together(config, changes, match, tmp_path):
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=match):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stored_tokens_are_the_same_batches(config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tiny.ROOT / "tools")
    import extract_tokens

    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(70, 70, 3), (40, 150, 3)] * 6):
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    config.data.update(name="captions", format="folder", path=str(folder))
    config.data.update(buckets="area", bucket_sizes=())
    flags = ["--data=captions", "--captions", "--format=folder", f"--path={folder}"]
    flags += [f"--tokenizer={tokenizer}", f"--out={tmp_path / 'tokens'}", "--batch_size=4"]
    flags += ["--image_size=64", "--buckets=area"]
    assert extract_tokens.main(flags) == 0
    expected = [jax.tree.map(np.asarray, next(open_batches(config))) for _ in range(2)]
    config.data.update(name="tokens", format="", path=str(tmp_path / "tokens"))
    found = [jax.tree.map(np.asarray, next(open_batches(config))) for _ in range(2)]
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    config.data.num_records = 5
    with pytest.raises(ValueError, match="data.num_records 5 must be 0"):
        train(config, tmp_path / "run")


def test_pictures_with_long_captions_are_shown_while_a_run_learns(config, tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number in range(8):
        Image.new("RGB", (70, 70), (30 * number, 0, 0)).save(folder / f"{number}.png")
        texts = [f"picture {number}, " + "which has much to say " * 9] * 2
        lines.append(json.dumps({"file_name": f"{number}.png", "caption": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    config.data.update(name="captions", format="jsonl", path=str(folder))
    config.data.update(buckets="none", bucket_sizes=())
    config.training.num_steps = 1
    opened, open_again = [], build.make_source
    monkeypatch.setattr(build, "make_source", lambda c: opened.append(1) or open_again(c))
    train(config, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "0000001.png").is_file()
    # Headers of millions of pictures are read once, not for every grid.
    assert opened == [1]


def test_a_cache_does_not_freeze_one_of_several_captions(config, tmp_path):
    lines = []
    for number in range(4):
        Image.new("RGB", (70, 70), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
        texts = ["one", "two"] if number == 3 else ["one"]
        lines.append(json.dumps({"file_name": f"{number}.png", "caption": texts}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    config.data.update(name="captions", format="jsonl", path=str(tmp_path), cache_tokens=True)
    config.data.update(buckets="none", bucket_sizes=())
    with pytest.raises(ValueError, match=r"would freeze one of the 2 captions of 3\.png; use more"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.data.num_records = 3
    build.check_cached_captions(config, build.make_sources(config))


def test_a_second_stage_begins_with_the_parameters_of_the_first(finished, config, tmp_path, capsys):
    first = ImageGenerator.from_checkpoint(finished[0])
    config.init_from = str(finished[0])
    config.model.grid_size = (24, 24)
    config.data.image_size = (96, 96)
    config.data.bucket_sizes = ((96, 96), (64, 128))
    config.optimizer.learning_rate = 1e-30
    config.training.num_steps = 2
    train(config, tmp_path / "second")
    second = ImageGenerator.from_checkpoint(tmp_path / "second")
    for a, b in zip(
        jax.tree.leaves(first.model.params), jax.tree.leaves(second.model.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    # Once it has a checkpoint of its own, the first stage may go.
    shutil.copytree(finished[0], tmp_path / "first")
    config.init_from = str(tmp_path / "first")
    train(config, tmp_path / "other")
    shutil.rmtree(tmp_path / "first")
    train(config, tmp_path / "other")
    assert "resumed from step 2" in capsys.readouterr().out
    config.init_from = str(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="gone"):
        train(config, tmp_path / "third")
    config.init_from = str(finished[0])
    config.model.width = 64
    with pytest.raises(ValueError, match="other shapes than the run's model: .*width 32 there, 64"):
        train(config, tmp_path / "third")
    assert not (tmp_path / "third").exists()


@pytest.mark.usefixtures("quick_compilation")
def test_a_causal_model_learns_from_captions_and_draws_from_prompts(tokenizer, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (20, 20), (30 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("red " * number + "picture")
    config = tiny.get_config("causal_captions")
    config.tokenizer.path = str(tokenizer)
    config.data.update(name="captions", format="folder", path=str(folder))
    config.data.update(image_size=(16, 16), buckets="none", bucket_sizes=())
    config.model.grid_size = (4, 4)
    config.optimizer.learning_rate = 1e-2
    config.training.update(num_steps=8, condition_dropout=0.3)
    config.logging.every = 1
    train(config, tmp_path / "run")
    learned = losses(capsys.readouterr().out)
    assert learned[8] < learned[1]
    assert (tmp_path / "run" / "samples" / "0000008.png").is_file()
    generator = ImageGenerator.from_checkpoint(tmp_path / "run")
    assert {"byte_encoder", "caption_embed"} <= generator.model.params.keys()
    tokens = generator.tokens(prompts=["red picture"], seed=1)
    assert tokens.shape == (1, 4, 4)
    config.model.null_length = 2
    with pytest.raises(ValueError, match="model.null_length 2 has no meaning for .*llamagen-text"):
        train(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()
