"""Features that are kept with tokens: those of the encoder, whatever happens to the extraction."""

import json

import numpy as np
import pytest
import tiny
import tiny_text

from maskgil_jax.data.token_buckets import open_token_buckets
from maskgil_jax.data.token_dataset import FeaturedRecord, TokenRecord
from maskgil_jax.data.token_records import TokenRecordSource
from maskgil_jax.loading import load_text_encoder

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def _tools_importable(monkeypatch):
    monkeypatch.syspath_prepend(tiny.ROOT / "tools")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tokenizer, two text encoders, and pictures of two shapes with one text or two."""
    sizes = [(16, 16)] * 5 + [(40, 20)] * 2
    seven = [f"a {'red ' * i}seven" for i in range(7)]
    texts = [[text, "two apples"] if i % 2 else text for i, text in enumerate(seven)]
    return tiny_text.make_featured_inputs(tmp_path_factory.mktemp("inputs"), sizes, texts)


def run_tool(inputs, out, *flags, **changes):
    import extract_tokens

    values = {
        "tokenizer": inputs / "tokenizer",
        "data": "captions",
        "format": "jsonl",
        "path": inputs / "pictures",
        "image_size": 16,
        "batch_size": 4,
        "num_shards": 3,
        "out": out,
        "text_encoder": inputs / "gemma2",
        "text_length": 40,
        "text_dtype": "float32",
    } | changes
    named = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return extract_tokens.main(["--captions", *named, *flags])


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("dtype", "layer", "atol"), [("float32", -1, 1e-5), ("bfloat16", 1, 0.1)])
def test_every_text_has_the_features_of_its_tokens(inputs, tmp_path, capsys, dtype, layer, atol):
    out = tmp_path / "tokens"
    options = {"text_dtype": dtype, "hidden_layer": layer, "text_length": 10}
    assert run_tool(inputs, out, **options) == 0
    encoder = load_text_encoder(inputs / "gemma2", max_length=10, hidden_layer=layer, dtype=dtype)
    output = capsys.readouterr().out.splitlines()
    assert json.loads(output[-1])["features"] == encoder.fingerprint[:12]
    assert output[-2].endswith("now have more than --text_length 10 tokens and are cut")
    source = TokenRecordSource(out)
    origin = source.dataset.text
    assert (origin.name, origin.path) == ("gemma2", str(inputs / "gemma2"))
    assert origin.fingerprint == encoder.fingerprint
    assert (origin.hidden_layer, origin.width) == (layer, 24)
    assert (origin.dtype, origin.length) == (dtype, 10)
    counts = []
    for index in range(7):
        record = source.read(index)
        counts.append(len(record.captions))
        tokens = encoder.tokenize(record.captions)
        expected = np.asarray(encoder.encode(tokens.ids, tokens.lengths), np.float32)
        assert list(map(len, record.features)) == tokens.lengths.tolist()
        for found, row in zip(record.features, expected, strict=True):
            assert (found.dtype.name, found.shape[1]) == (dtype, 24)
            np.testing.assert_allclose(
                found.astype(np.float32), row[: len(found)], atol=atol, rtol=0
            )
            assert np.abs(row[: len(found)]).max() > 0.5
    assert counts == [1, 2, 1, 2, 1, 2, 1]


def test_every_bucket_has_features_and_the_texts_are_those_without(inputs, tmp_path):
    options = {"buckets": "area", "bucket_multiple": 4, "bucket_max_ratio": 2.0}
    assert run_tool(inputs, tmp_path / "with", **options) == 0
    none = dict.fromkeys(("text_encoder", "text_length", "text_dtype"))
    assert run_tool(inputs, tmp_path / "without", **options, **none) == 0
    featured = open_token_buckets(tmp_path / "with", captions=True, features=True)
    plain = open_token_buckets(tmp_path / "without", captions=True, features=True)
    assert {size: len(source) for size, source in featured.items()} == {(12, 20): 2, (16, 16): 5}
    for size, source in featured.items():
        for index in range(len(source)):
            one, other = source[index], plain[size][index]
            assert len(one.pop("features")) == np.size(one["caption"])
            assert one.keys() == other.keys() == {"tokens", "caption"}
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])
    versions = {
        name: json.loads((tmp_path / name / "16x16/dataset.json").read_text())["version"]
        for name in ("with", "without")
    }
    assert versions == {"with": 2, "without": 1}


def test_an_extraction_that_stopped_goes_on_and_another_encoder_is_refused(
    inputs, tmp_path, monkeypatch, capsys
):
    from extraction.features import TextReader

    assert run_tool(inputs, tmp_path / "whole") == 0
    out, read, calls = tmp_path / "tokens", TextReader._read, []

    def stop(self, texts):
        calls.append(texts)
        if len(calls) > 2:
            raise OSError("unplugged")
        return read(self, texts)

    monkeypatch.setattr(TextReader, "_read", stop)
    assert run_tool(inputs, out) == 1
    assert "unplugged" in capsys.readouterr().err
    monkeypatch.setattr(TextReader, "_read", read)
    assert len(list(out.glob("tokens-*"))) == 2
    others = {
        "text_encoder": (inputs / "gemma1", "text.fingerprint: '"),
        "hidden_layer": (1, "text.hidden_layer: -1 → 1"),
        "text_length": (30, "text.length: 40 → 30"),
        "text_dtype": ("bfloat16", "text.dtype: 'float32' → 'bfloat16'"),
    }
    for finish in (False, True):
        if finish:
            assert run_tool(inputs, out) == 0
            assert "2 of 3 shards are there already" in capsys.readouterr().out
            assert contents(out) == contents(tmp_path / "whole")
        for name, (value, message) in others.items():
            assert run_tool(inputs, out, **{name: value}) == 1
            error = capsys.readouterr().err
            assert "extracted with other settings" in error
            assert message in error
            assert "text.fingerprint: '" in error
        none = dict.fromkeys(("text_encoder", "text_length", "text_dtype"))
        assert run_tool(inputs, out, **none) == 1
        assert "text.width: 24 → None" in capsys.readouterr().err
    assert TokenRecordSource(out).dataset.text.length == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder": None}, "--text_length, --text_dtype without --text_encoder; name it"),
        ({"text_length": 1}, "max_length 1 leaves no room"),
        ({"hidden_layer": 9}, "hidden_layer 9 is out of range"),
    ],
)
def test_bad_flags_are_refused(inputs, tmp_path, capsys, changes, message):
    assert run_tool(inputs, tmp_path / "tokens", **changes) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()


def test_features_need_texts_to_be_kept(inputs, tmp_path, capsys):
    import extract_tokens

    tiny.make_image_folder(tmp_path / "images", count=2)
    flags = ["--data=folder", f"--path={tmp_path / 'images'}", "--image_size=16"]
    flags += [f"--tokenizer={inputs / 'tokenizer'}", f"--text_encoder={inputs / 'gemma2'}"]
    assert extract_tokens.main([*flags, f"--out={tmp_path / 'tokens'}"]) == 1
    assert "without --captions has no texts to read; add it" in capsys.readouterr().err


def test_texts_are_read_in_batches_of_one_size_and_records_keep_their_order():
    from extraction.features import TextReader

    sizes = []

    def tokenize(texts):
        lengths = np.array(list(map(len, texts)))
        return np.array([[ord(text[0])] * 5 for text in texts]), lengths, lengths > 4

    def encode(ids, lengths):
        sizes.append(len(ids))
        return ids[..., None] * np.ones(2) + np.arange(5)[:, None]

    def make(captions):
        return TokenRecord(tokens=np.zeros((1, 1, 1), int), index=len(captions), captions=captions)

    texts = [("a",), ("bb", "ccc", "dddd", "eeeee"), ("ff",), ("g", "h")]
    reader = TextReader(tokenize, encode, batch_size=3, dtype=np.dtype(np.float32))
    found = list(reader.add_features(make(captions) for captions in texts))
    assert [record.captions for record in found] == texts
    assert sizes == [3, 3, 3]
    assert (reader.count, reader.cut) == (8, 1)
    for record in found:
        assert isinstance(record, FeaturedRecord)
        for text, features in zip(record.captions, record.features, strict=True):
            expected = ord(text[0]) + np.arange(len(text), dtype=np.float32)
            np.testing.assert_array_equal(features, np.stack([expected, expected], axis=1))
