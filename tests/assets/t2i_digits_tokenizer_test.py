"""The shipped tokenizer of the canvases: small, right at every size, good on digits never seen."""

import importlib.resources

import numpy as np
import pytest

import maskgil_jax
from maskgil_jax.data.canvases import COLOURS, SIZES, CanvasSource
from maskgil_jax.data.transforms import to_float
from maskgil_jax.evals.canvases import canvases_report, cut_digit
from maskgil_jax.pictures import to_uint8

NAME = "t2i_digits_tokenizer"
# Small canvases have more ink for their area, and black is rebuilt without error.
PSNR_FLOOR_DB = {
    (64, 64): 25.0,
    (64, 96): 26.3,
    (96, 64): 26.3,
    (64, 128): 26.3,
    (128, 64): 26.3,
    (96, 96): 26.3,
}


@pytest.fixture(scope="module")
def tokenizer():
    return maskgil_jax.load_tokenizer(f"asset:{NAME}")


def rebuild(tokenizer, images):
    tokens = tokenizer.encode(to_float(images))
    return tokens, np.asarray(tokenizer.decode(tokens)).clip(-1, 1)


def test_it_is_small(tokenizer):
    folder = importlib.resources.files("maskgil_jax.assets") / NAME
    assert sum(len(file.read_bytes()) for file in folder.iterdir()) < 4_000_000
    assert tokenizer.spec.downsample_factor == 8
    assert tokenizer.spec.codebook_size == 512


@pytest.mark.parametrize("size", SIZES)
def test_it_rebuilds_held_out_canvases_of_every_size(tokenizer, size):
    images = np.stack([CanvasSource("test", size)[index]["image"] for index in range(6)])
    tokens, rebuilt = rebuild(tokenizer, images)
    assert tokens.shape == (6, size[0] // 8, size[1] // 8)
    psnr_db = 10 * np.log10(4 / np.mean((rebuilt - to_float(images)) ** 2))
    assert psnr_db > PSNR_FLOOR_DB[size]


def test_rebuilt_digits_keep_what_they_are_and_their_colours(tokenizer):
    drawn = [CanvasSource("test", (96, 96)).draw(index) for index in range(60)]
    known = [CanvasSource("train", (96, 96)).draw(index) for index in range(600)]
    rebuilt = to_uint8(rebuild(tokenizer, np.stack([image for image, _ in drawn]))[1])

    def cut(images, canvases):
        pairs = zip(images, canvases, strict=True)
        return np.stack([cut_digit(image, o.box) for image, (_, s) in pairs for o in s.objects])

    objects = [o for _, scene in drawn for o in scene.objects]
    result = canvases_report(
        cut(rebuilt, drawn),
        cut([image for image, _ in drawn], drawn),
        np.array([o.digit for o in objects]),
        np.array([tuple(COLOURS).index(o.colour) for o in objects]),
        palette=np.array(list(COLOURS.values())),
        train=(
            cut([image for image, _ in known], known),
            np.array([o.digit for _, scene in known for o in scene.objects]),
        ),
    )
    assert result["svm_accuracy"] > 0.95
    assert result["agreement"] > result["svm_accuracy"] - 0.05
    assert result["colour_agreement"] > 0.97
    assert result["colour_error_deg"] < 5
