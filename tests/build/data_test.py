import numpy as np
import pytest

from maskgil_jax import config as schema
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
    config.data.image_size = (48, 64)
    config.data.crop = "window"
    config.data.flip = False
    return config


def test_canvases_are_cropped_anywhere_and_scaled(canvases):
    validate(canvases)
    source = build.make_source(canvases)
    assert isinstance(source, CanvasSource)
    assert (source.split, source.size) == ("train", None)
    image, transform = source[0]["image"], build.image_transform(canvases)
    crops = [
        transform(source[0], np.random.default_rng(seed))["image"].tobytes() for seed in range(20)
    ]
    scaled = image / np.float32(127.5) - np.float32(1)
    height, width = image.shape[:2]
    windows = {
        np.ascontiguousarray(scaled[i : i + 48, j : j + 64]).tobytes()
        for i in range(height - 47)
        for j in range(width - 63)
    }
    assert set(crops) <= windows
    assert len(set(crops)) > 5


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data.image_size": (64, 72)}, r"image_size \(64, 72\) is larger than the smallest"),
        ({"data.flip": True}, "flip True would mirror the digits"),
        ({"report.name": "digits"}, "report.name 'digits' needs data.name 'digits'"),
        ({"data.crop": "center"}, "crop 'center' does not go with data.name 'canvases'"),
        ({"data.name": "digits"}, "crop 'window' does not go with data.name 'digits'"),
        ({"data.name": "digits", "data.crop": "center"}, r"\(48, 64\) must be square"),
        (
            {
                "data.name": "digits",
                "data.crop": "center",
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
