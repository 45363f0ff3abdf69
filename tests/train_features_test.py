"""Training from stored features: the same as from those computed on the way, without an encoder."""

import jax
import numpy as np
import pytest
import tiny
import tiny_text
from train_test import final_state, losses

from maskgil_jax import ImageGenerator, loading, sharding
from maskgil_jax.build import captions as build_captions
from maskgil_jax.build import data as build
from maskgil_jax.train import _open_batches, _open_text_encoder, _open_tokenizer, train

LENGTH, WIDTH = 40, 24


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tokenizer, two text encoders, and tokens with texts alone and with features."""
    texts = [[f"a {'red ' * (i % 5)}seven", "two apples", "a dog"][: 1 + i % 3] for i in range(12)]
    folder = tiny_text.make_featured_inputs(
        tmp_path_factory.mktemp("inputs"), [(16, 16)] * 12, texts
    )
    flags = ["--data=captions", "--format=jsonl", "--captions", "--image_size=16"]
    flags += [f"--path={folder / 'pictures'}", f"--tokenizer={folder / 'tokenizer'}"]
    flags += ["--batch_size=4", "--num_shards=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tiny.ROOT / "tools")
        import extract_tokens

        text = [f"--text_encoder={folder / 'gemma2'}", f"--text_length={LENGTH}"]
        for name, more in {
            "texts": [],
            "float32": [*text, "--text_dtype=float32"],
            "bfloat16": text,
        }.items():
            assert extract_tokens.main([*flags, *more, f"--out={folder / name}"]) == 0
    return folder


@pytest.fixture
def config(inputs):
    config = tiny.get_config("captions")
    config.tokenizer.path = str(inputs / "tokenizer")
    config.text.encoder = str(inputs / "gemma2")
    config.model.update(text="features", text_width=WIDTH, text_length=LENGTH, grid_size=(4, 4))
    config.data.update(name="tokens", path=str(inputs / "float32"), image_size=(16, 16))
    config.data.update(buckets="none", bucket_sizes=())
    # One caption on each device, as when they were stored: their number decides the last bits.
    config.training.update(num_steps=2, batch_size=4)
    config.logging.every = 1
    return config


def take_batches(config, count):
    sources, mesh = build.make_sources(config), sharding.make_mesh({"data": -1})
    tokenizer = _open_tokenizer(config, sources)
    encoder = _open_text_encoder(config, build_captions.find_stored_features(config, sources))
    with jax.set_mesh(mesh):
        batches = _open_batches(config, sources, tokenizer, encoder, mesh)
        return [jax.tree.map(np.asarray, next(batches)) for _ in range(count)]


def refuse(*_, **__):
    raise AssertionError("a text encoder is opened")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_are_those_that_are_computed_on_the_way(config, inputs, monkeypatch, dtype):
    config.text.dtype = dtype
    config.data.path = str(inputs / "texts")
    computed = take_batches(config, 6)
    config.data.path = str(inputs / dtype)
    monkeypatch.setattr(loading, "load_text_encoder", refuse)
    stored = take_batches(config, 6)
    lengths = set()
    for one, other in zip(computed, stored, strict=True):
        assert one.keys() == other.keys() == {"tokens", "caption", "caption_length"}
        assert one["caption"].shape == (4, LENGTH, WIDTH)
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])
        lengths |= set(one["caption_length"].tolist())
    assert len(lengths) > 3


def test_a_run_on_stored_features_is_the_same_and_opens_no_encoder(
    config, inputs, tmp_path, monkeypatch, capsys
):
    config.data.path = str(inputs / "texts")
    train(config, tmp_path / "computed")
    expected = losses(capsys.readouterr().out)
    config.data.path = str(inputs / "float32")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_text_encoder", refuse)
        train(config, tmp_path / "stored")
    assert losses(capsys.readouterr().out) == expected
    assert expected.keys() == {1, 2}
    one, other = (final_state(tmp_path / name, 2) for name in ("computed", "stored"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value, err_msg=name)
    assert (tmp_path / "stored/samples/0000002.png").is_file()
    generator = ImageGenerator.from_checkpoint(tmp_path / "stored")
    assert generator(prompts=["a red seven"]).shape == (1, 16, 16, 3)


def test_a_run_may_name_no_encoder(config, tmp_path):
    config.text.update(encoder="", dtype="float32")
    [batch] = take_batches(config, 1)
    assert batch["caption"].shape == (4, LENGTH, WIDTH)
    train(config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"names no text encoder; name the right one, --text_enc"):
        ImageGenerator.from_checkpoint(tmp_path / "run")


def test_all_that_differs_is_listed(config, inputs, tmp_path):
    config.text.update(encoder=str(inputs / "gemma1"), hidden_layer=2, dtype="bfloat16")
    config.model.update(text_width=32, text_length=30)
    with pytest.raises(ValueError, match="do not fit") as error:
        train(config, tmp_path / "run")
    for part in (
        rf"the features in {inputs / 'float32'} (gemma2, {inputs / 'gemma2'}, fingerprint ",
        f"text.encoder {inputs / 'gemma1'} (fingerprint ",
        "text.hidden_layer 2 must be -1",
        "text.dtype bfloat16 must be 'float32'",
        "model.text_width 32 must be 24",
        "model.text_length 30 must be 40, at which their captions were cut",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text.encoder": ""}, "fit: text.dtype None must be 'float32'. Or extract"),
        ({"text.encoder": "gemma1"}, "fit: text.encoder .*gemma1 .* is another encoder; name"),
        ({"text.encoder": "gone"}, "gone.* It may be empty: the tokens .* hold the features"),
        ({"data.path": "bfloat16"}, "fit: text.dtype None must be 'bfloat16'. Or"),
        ({"data.path": "texts", "text.encoder": ""}, "texts hold no features, .* --text_encoder"),
    ],
)
def test_what_does_not_fit_is_refused(config, inputs, tmp_path, changes, message):
    paths = {name: value and str(inputs / value) for name, value in changes.items()}
    config.update_from_flattened_dict(paths)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_of_bytes_reads_the_texts_that_lie_beside_features(config):
    config.model.update(text="bytes", text_width=16)
    config.text.encoder = ""
    [batch] = take_batches(config, 1)
    assert batch["caption"].shape == (4, LENGTH)
    texts = {bytes(row[row > 0].tolist()).decode() for row in batch["caption"]}
    assert texts & {"two apples", "a dog", "a seven", "a red seven"}
