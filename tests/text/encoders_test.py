"""What `load_text_encoder` gives: Gemma in JAX, and T5 and CLIP in torch."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_text

from maskgil_jax import checkpoints
from maskgil_jax.loading import identify_text_encoder, load_model, load_text_encoder
from maskgil_jax.text.base import TextEncoder, Tokenized
from maskgil_jax.text.gemma import take_layers
from tools.export_weights import export_weights

PROMPTS = ["a red seven left of a green bicycle", "a café", ""]


def write_gemma(path, config, tokenizer=True):
    files = [tiny_text.make_tokenizer_file(path.parent / "tokenizer.json")] if tokenizer else []
    checkpoints.write_model_dir(
        path,
        kind="text-encoder",
        family="gemma",
        config=config.to_dict(),
        params=tiny_text.make_params(config),
        files=files,
    )
    return path


@pytest.fixture(scope="module")
def config():
    return tiny_text.gemma_config(2)


@pytest.fixture(scope="module")
def gemma(config, tmp_path_factory):
    return write_gemma(tmp_path_factory.mktemp("gemma") / "dir", config)


def test_gemma_from_prompts_to_features(gemma, config):
    encoder = load_text_encoder(gemma, max_length=30)
    assert isinstance(encoder, TextEncoder)
    assert (encoder.name, encoder.width, encoder.max_length) == ("dir", 24, 30)
    assert encoder.jittable
    tokens = encoder.tokenize(PROMPTS)
    assert isinstance(tokens, Tokenized)
    features = encoder.encode(*tokens[:2])
    assert (features.shape, features.dtype) == ((3, 30, 24), jnp.float32)
    expected = config.make_module().apply({"params": tiny_text.make_params(config)}, *tokens[:2])
    np.testing.assert_allclose(np.asarray(features), np.asarray(expected), atol=1e-5)
    valid = np.arange(30) < tokens.lengths[:, None]
    assert not np.asarray(features)[~valid].any()
    assert np.abs(np.asarray(features)[valid]).max(axis=-1).min() > 0

    @jax.jit
    def program(params, ids, lengths):
        return encoder.apply(params, ids, lengths) * 2, encoder.encode(ids, lengths)

    doubled, same = program(encoder.params, *tokens[:2])
    np.testing.assert_allclose(np.asarray(doubled), 2 * np.asarray(features), atol=1e-5)
    np.testing.assert_allclose(np.asarray(same), np.asarray(features), atol=1e-5)


def test_a_hidden_layer_and_a_type_are_chosen(gemma, config):
    encoder = load_text_encoder(gemma, max_length=12, hidden_layer=-2, dtype="bfloat16")
    tokens = encoder.tokenize(["a dog"])
    assert {leaf.dtype for leaf in jax.tree.leaves(encoder.params)} == {jnp.dtype("bfloat16")}
    assert len(encoder.params["layers"]["mlp"]["down"]["kernel"]) == 2
    assert "final_norm" not in encoder.params
    features = encoder.encode(*tokens[:2])
    assert features.dtype == jnp.bfloat16
    module = config.make_module(hidden_layer=2)
    kept = take_layers(tiny_text.make_params(config), config, 2)
    expected = np.asarray(module.apply({"params": kept}, *tokens[:2]))
    error = np.abs(np.asarray(features, np.float32) - expected).max()
    assert error < 0.05 * np.abs(expected).max()


def test_fingerprints_tell_encoders_apart(gemma, config, tmp_path):
    def fingerprint(path=gemma, **options):
        return load_text_encoder(path, **{"max_length": 8} | options).fingerprint

    first = fingerprint()
    assert (len(first), first) == (64, fingerprint())
    params = tiny_text.make_params(config)
    params["final_norm"]["scale"] = params["final_norm"]["scale"] + 1
    fields = dict(kind="text-encoder", family="gemma", config=config.to_dict())
    file = gemma / "tokenizer.json"
    checkpoints.write_model_dir(tmp_path / "weights", **fields, params=params, files=[file])
    words = json.loads(file.read_text())
    words["truncation"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    checkpoints.write_model_dir(
        tmp_path / "words",
        **fields,
        params=tiny_text.make_params(config),
        files=[tmp_path / "tokenizer.json"],
    )
    others = [
        fingerprint(max_length=9),
        fingerprint(hidden_layer=1),
        fingerprint(dtype="bfloat16"),
        fingerprint(tmp_path / "weights"),
        fingerprint(tmp_path / "words"),
    ]
    assert len({first, *others}) == 6
    checkpoints.write_model_dir(
        tmp_path / "copy", **fields, params=tiny_text.make_params(config), files=[file]
    )
    assert fingerprint(tmp_path / "copy") == first


def test_an_encoder_is_identified_without_its_weights(gemma, config, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((gemma / "config.json").read_bytes())
    (bare / "params.safetensors").touch()
    for options in (
        {"max_length": 9, "hidden_layer": -1, "dtype": "float32"},
        {"max_length": 8, "hidden_layer": 1, "dtype": "bfloat16"},
    ):
        found = identify_text_encoder(bare, **options)
        assert found == (load_text_encoder(gemma, **options).fingerprint, config.param_dtype)
    vq = tiny.make_tokenizer_dir(tmp_path / "vq")
    settings = {"max_length": 8, "hidden_layer": -1, "dtype": "float32"}
    with pytest.raises(ValueError, match="holds a tokenizer, but a text-encoder is needed"):
        identify_text_encoder(vq, **settings)
    with pytest.raises(FileNotFoundError, match="gone"):
        identify_text_encoder(tmp_path / "gone", **settings)


def test_ids_and_lengths_that_do_not_fit_are_refused(gemma):
    encoder = load_text_encoder(gemma, max_length=8)
    ids, lengths = np.zeros((2, 8), np.int32), np.array([8, 3], np.int32)
    for wrong, message in (
        ((ids + 128, lengths), "id 128 is out of range; allowed: 0 to 127"),
        ((ids - 1, lengths), "id -1 is out of range"),
        ((jnp.asarray(ids + 128), lengths), "id 128 is out of range"),
        ((ids, lengths + 1), "length 9 is out of range; allowed: 0 to 8"),
        ((ids, lengths - 4), "length -1 is out of range"),
        ((np.zeros((2, 65), np.int32), lengths), "with s from 1 to 64"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.encode(*wrong)
    # Unknown while JAX traces; then the features are not numbers.
    found = jax.jit(encoder.encode)(ids + 128, lengths)
    assert np.isnan(np.asarray(found)[1, :3]).all()


def test_settings_and_directories_that_do_not_fit_are_refused(gemma, config, tmp_path):
    for options, message in (
        ({"max_length": 65}, "max_length 65 is more than the 64 tokens"),
        ({"max_length": 1}, "max_length 1 leaves no room"),
        ({"hidden_layer": 4}, "hidden_layer 4 is out of range; allowed: 0 .embeddings. to 3"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown; allowed: float32, bfloat16"),
        ({"device": "cuda:0"}, "device 'cuda:0' is for encoders in torch"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text_encoder(gemma, **{"max_length": 8} | options)
    with pytest.raises(ValueError, match="holds a text-encoder, but a model is needed"):
        load_model(gemma)
    vq = tiny.make_tokenizer_dir(tmp_path / "vq")
    with pytest.raises(ValueError, match="holds a tokenizer, but a text-encoder is needed"):
        load_text_encoder(vq)
    with pytest.raises(FileNotFoundError, match="no directory"):
        load_text_encoder(tmp_path / "gone")
    bare = write_gemma(tmp_path / "bare", config, tokenizer=False)
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json; convert"):
        load_text_encoder(bare)
    whole = write_gemma(tmp_path / "whole", config)
    (whole / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json has SHA-256 .* expects"):
        load_text_encoder(whole)
    (whole / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        load_text_encoder(whole)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.T5Config(
        vocab_size=128,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    path = tmp_path_factory.mktemp("t5") / "tiny"
    transformers.T5EncoderModel(settings).save_pretrained(path)
    tiny_text.make_tokenizer_file(path / "tokenizer.json", end=True)
    return path


def test_t5_from_prompts_to_features(t5):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    encoder = load_text_encoder(t5, max_length=30)
    assert isinstance(encoder, TextEncoder)
    assert (encoder.name, encoder.width, encoder.max_length) == ("tiny", 16, 30)
    assert not encoder.jittable
    tokens = encoder.tokenize(PROMPTS)
    assert tokens.ids[2].tolist() == [1] + [0] * 29, "what T5 puts at the end of every prompt"
    features = encoder.encode(*tokens[:2])
    assert (type(features), features.shape, features.dtype) == (np.ndarray, (3, 30, 16), np.float32)
    model = transformers.T5EncoderModel.from_pretrained(t5).eval()
    for row, ids, length in zip(features, *tokens[:2], strict=True):
        assert not row[length:].any()
        one = torch.from_numpy(ids[None, :length].astype(np.int64))
        with torch.no_grad():
            expected = model(input_ids=one).last_hidden_state[0].numpy()
        np.testing.assert_allclose(row[:length], expected, atol=1e-5)
        # LlamaGen pads on the left: the features are the same, in other places.
        padded = torch.zeros((1, 30), dtype=torch.int64)
        padded[0, 30 - length :] = one[0]
        mask = (torch.arange(30) >= 30 - length)[None].long()
        with torch.no_grad():
            left = model(input_ids=padded, attention_mask=mask).last_hidden_state[0].numpy()
        np.testing.assert_allclose(row[:length], left[30 - length :], atol=1e-5)
    empty = encoder.encode(tokens.ids, np.array([0, 3, 1], np.int32))
    assert np.isfinite(empty).all()
    assert not empty[0].any()


def test_t5_takes_settings_and_refuses_others(t5, tmp_path):
    encoder = load_text_encoder(t5, max_length=10, hidden_layer=0)
    tokens = encoder.tokenize(["a dog"])
    table = encoder.model.get_input_embeddings().weight.numpy()
    valid = np.arange(10) < tokens.lengths[:, None]
    np.testing.assert_allclose(encoder.encode(*tokens[:2])[valid], table[tokens.ids[valid]])
    prints = {
        load_text_encoder(t5, **options).fingerprint
        for options in ({}, {"max_length": 6}, {"hidden_layer": 1}, {"dtype": "bfloat16"})
    }
    assert len(prints) == 4
    assert load_text_encoder(t5).fingerprint in prints
    with pytest.raises(ValueError, match="computes in torch and cannot be part of a JAX program"):
        jax.jit(encoder.encode)(*tokens[:2])
    with pytest.raises(ValueError, match=r"id \d{3} is out of range; allowed: 0 to 127"):
        encoder.encode(tokens.ids + 128, tokens.lengths)
    assert encoder.tokenize(PROMPTS[:1]).cut.tolist() == [True]
    for options, message in (
        ({"hidden_layer": 3}, "hidden_layer 3 is out of range; allowed: 0 to 2, or -1"),
        ({"dtype": "float16"}, "allowed: float32, bfloat16"),
        ({"device": "cuda:99"}, "torch has no device 'cuda:99' here"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text_encoder(t5, **options)
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    with pytest.raises(ValueError, match=r"holds a gemma, .* convert it with tools/convert_ch"):
        load_text_encoder(tmp_path)
    for text, message in (
        ('{"model_type": "vit"}', "is no text encoder that transformers knows"),
        ("{}", "names no model_type"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_text_encoder(tmp_path)


def test_t5_is_identified_by_its_files(t5, tmp_path):
    settings = {"max_length": 9, "hidden_layer": 1, "dtype": "bfloat16"}
    first = identify_text_encoder(t5, **settings)
    assert first == (load_text_encoder(t5, **settings).fingerprint, "float32")

    def copy(name, data):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        for path in t5.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).write_bytes(data)
        return identify_text_encoder(folder, **settings).fingerprint

    weights = bytearray((t5 / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    words = (t5 / "tokenizer.json").read_bytes() + b"\n"
    changed = json.loads((t5 / "config.json").read_text()) | {"d_ff": 25}
    found = {
        copy("model.safetensors", bytes(weights)),
        copy("tokenizer.json", words),
        copy("config.json", json.dumps(changed).encode()),
    }
    assert len(found | {first.fingerprint}) == 4
    named = json.loads((t5 / "config.json").read_text()) | {"_name_or_path": "elsewhere"}
    (tmp_path / "config" / "config.json").write_text(json.dumps(named))
    assert identify_text_encoder(tmp_path / "config", **settings) == first
    # An index names the shards.
    shards = tmp_path / "config"
    (shards / "model.safetensors").rename(shards / "model-1.safetensors")
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert identify_text_encoder(shards, **settings) == first
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json names no files of weights"):
        identify_text_encoder(shards, **settings)


def test_weights_that_are_not_whole_are_refused(t5, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((t5 / name).read_bytes())
    state = safetensors.load_file(t5 / "model.safetensors")
    del state["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    safetensors.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors .* such as encoder.block.1"):
        load_text_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((t5 / "model.safetensors").read_bytes())
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        load_text_encoder(tmp_path)


def test_clip_text_is_read_too(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.CLIPTextConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=12,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=1,
    )
    model = transformers.CLIPTextModel(settings).eval()
    model.save_pretrained(tmp_path)
    tiny_text.make_tokenizer_file(tmp_path / "tokenizer.json", end=True)
    encoder = load_text_encoder(tmp_path, max_length=12)
    tokens = encoder.tokenize(["a dog", "a red"])
    assert (tokens.ids[0, tokens.lengths[0] :] == 1).all()
    features = encoder.encode(*tokens[:2])
    for row, ids, length in zip(features, *tokens[:2], strict=True):
        with torch.no_grad():
            one = torch.from_numpy(ids[None, :length].astype(np.int64))
            expected = model(input_ids=one).last_hidden_state[0].numpy()
        np.testing.assert_allclose(row[:length], expected, atol=1e-5)
    with pytest.raises(ValueError, match="max_length 13 is more than the 12 tokens"):
        load_text_encoder(tmp_path, max_length=13)


def test_loading_warns_of_nothing(gemma):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_text_encoder(gemma, max_length=40).tokenize(PROMPTS)


# Trained on stored features, it may name no encoder.
@pytest.mark.parametrize("encoder", ["gemma", ""])
def test_an_exported_model_reads_the_layer_that_it_was_trained_with(encoder, tmp_path, monkeypatch):
    vq = tiny.make_tokenizer_dir(tmp_path / "vq")
    model = tiny.make_generator(vq, "maskgil-text", {"text": "features"}).model
    model.run.text.update(encoder=encoder, hidden_layer=-2, dtype="bfloat16")
    exported = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr("maskgil_jax.workdir.read_run_config", lambda path: model.run)
        patch.setattr("maskgil_jax.loading.load_model", lambda path: model)
        export_weights("run", exported)
    text = load_model(exported).run.text
    assert (text.encoder, text.hidden_layer, text.dtype) == ("", -2, "bfloat16")
    header = json.loads((exported / "config.json").read_text())
    header["source"]["text"]["hidden_layer"] = "last"
    (exported / "config.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="'hidden_layer': 'last'.*export it again"):
        load_model(exported)
