import numpy as np
import pytest
from PIL import Image

from maskgil_jax import config as schema
from maskgil_jax.build import captions as build_captions
from maskgil_jax.build import data as build
from maskgil_jax.build.training import validate
from maskgil_jax.data.canvases import CanvasSource


@pytest.fixture
def canvases():
    config = schema.preset()
    config.kind = "tokenizer"
    config.vq.channels = 32
    config.vq.channel_multipliers = (1, 1, 1, 2)
    config.data.name = "canvases"
    config.data.image_size = (64, 96)
    config.data.flip = False
    return config


def test_canvases_are_drawn_in_the_size_asked_for_and_scaled(canvases):
    validate(canvases)
    source = build.make_source(canvases)
    assert isinstance(source, CanvasSource)
    assert (source.split, source.size) == ("train", (64, 96))
    image, transform = source[0]["image"], build.image_transform(canvases)
    scaled = transform(source[0], np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(scaled, image / np.float32(127.5) - np.float32(1))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data.image_size": (64, 72)}, r"canvas size \(64, 72\); allowed"),
        ({"data.flip": True}, "flip True would mirror the digits"),
        ({"report.name": "digits"}, "report.name 'digits' needs data.name 'digits'"),
        ({"data.crop": "random"}, "crop 'random' has no meaning with data.name 'canvases'"),
        ({"data.name": "digits"}, r"\(64, 96\) must be square"),
        (
            {
                "data.name": "digits",
                "data.image_size": (64, 64),
                "report.name": "canvases",
            },
            "report.name 'canvases' needs data.name 'canvases'",
        ),
        ({"kind": "maskgil", "report.name": "canvases"}, "is for kind 'tokenizer'"),
    ],
)
def test_what_canvases_cannot_be_used_for_is_refused(canvases, changes, match):
    canvases.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=match):
        validate(canvases)


def test_an_unknown_split_of_the_canvases_is_refused(canvases):
    canvases.data.split = "val"
    with pytest.raises(ValueError, match="split 'val' of the canvases"):
        build.make_source(canvases)


@pytest.fixture
def captions(tmp_path):
    for number, size in enumerate([(64, 64), (128, 32), (40, 150), (200, 51)]):
        Image.new("RGB", size, (number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    config = schema.preset()
    config.data.name, config.data.format, config.data.path = "captions", "folder", str(tmp_path)
    config.data.image_size, config.data.flip = (64, 64), False
    config.data.num_threads, config.training.batch_size = 2, 4
    return config


def test_captions_go_into_buckets(captions):
    captions.data.buckets, captions.data.bucket_multiple = "area", 16
    captions.model.family = "maskgil-text"
    sources = build.make_sources(captions)
    assert {size: len(part) for size, part in sources.items()} == {
        (32, 128): 2,
        (64, 64): 1,
        (128, 32): 1,
    }
    batches = build.make_batches(
        captions, sources, lambda size: build.image_transform(captions, size)
    )
    found = {}
    for _ in range(8):
        batch = next(batches)
        assert batch["image"].dtype == np.float32
        found.setdefault(batch["image"].shape[1:3], set()).update(batch["caption"].tolist())
    assert found == {
        (32, 128): {"text 1", "text 3"},
        (64, 64): {"text 0"},
        (128, 32): {"text 2"},
    }


def test_captions_without_buckets_have_one_size_of_any_shape(captions):
    captions.data.image_size = (32, 64)
    source = build.make_source(captions)
    assert build.make_sources(captions).keys() == {(32, 64)}
    transform = build.image_transform(captions)
    record = transform(source[0], np.random.default_rng(0))
    assert record["image"].shape == (32, 64, 3)
    assert record["caption"] == "text 0"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, r"of texts \(maskgil-text, llamagen-text\); family 'maskgil' would not learn"),
        ({"kind": "tokenizer"}, "a tokenizer would not learn from the captions"),
        ({"data.name": "folder"}, "'folder' has no captions: data.format 'folder' must be ''"),
        (
            {
                "data.name": "digits",
                "data.format": "",
                "data.buckets": "area",
                "data.bucket_max_ratio": 2.0,
                "data.allow_incomplete": True,
            },
            "allow_incomplete True must be False; data.buckets 'area' must be 'none'; "
            "data.bucket_max_ratio 2.0 must be 4.0",
        ),
    ],
)
def test_captions_where_nothing_learns_from_them_are_refused(captions, changes, match):
    captions.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=match):
        validate(captions)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data.format": "jsnl"}, "data.format 'jsnl' is unknown; .*Did you mean 'jsonl'"),
        (
            {"data.format": ""},
            "data.format '' is unknown; allowed: folder, jsonl, webdataset",
        ),
        ({"data.split": "val"}, "data.split 'val' is not for data.format 'folder'"),
        ({"data.caption_key": "text"}, "caption_key 'text' must be 'captions/text'"),
        ({"data.format": "tfds", "data.allow_incomplete": True}, "allow_incomplete True must be"),
        ({"data.bucket_multiple": 16}, "bucket_multiple 16 must be 32"),
        ({"data.buckets": "areas"}, "data.buckets 'areas' is unknown.*'area'"),
        ({"data.buckets": "area", "data.image_size": (64, 96)}, r"\(64, 96\) must be square with"),
        ({"data.buckets": "area", "data.bucket_multiple": 48}, "size 64 and multiple 48"),
    ],
)
def test_fields_of_captions_are_checked(captions, changes, match):
    captions.model.family, captions.model.text = "maskgil-text", "bytes"
    build_captions.check_settings(captions)
    captions.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=match):
        build_captions.check_settings(captions)


def test_captions_are_not_mirrored(captions):
    captions.data.flip = True
    with pytest.raises(ValueError, match="flip True would mirror what captions say of left"):
        build.image_transform(captions)


@pytest.mark.parametrize("form", build_captions.FORMATS)
def test_every_format_is_opened(captions, form, tmp_path):
    captions.data.format, captions.data.path = form, str(tmp_path / "none")
    captions.data.tfds_name = "nosuch"
    match = {
        "folder": "no folder",
        "jsonl": "cannot read the table",
        "webdataset": r"expected \*.tar",
        "tfds": "'nosuch' is not prepared",
    }
    with pytest.raises(ValueError, match=match[form]):
        build.make_source(captions)
