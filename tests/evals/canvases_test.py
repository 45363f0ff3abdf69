import numpy as np
import pytest

from maskgil_jax.data.canvases import COLOURS, CanvasSource
from maskgil_jax.evals.canvases import canvases_report, cut_digit

PALETTE = np.array(list(COLOURS.values()))


def crops_of(split, count):
    drawn = [CanvasSource(split).draw(index) for index in range(count)]
    objects = [o for _, scene in drawn for o in scene.objects]
    crops = np.stack([cut_digit(image, o.box) for image, scene in drawn for o in scene.objects])
    colours = np.array([tuple(COLOURS).index(o.colour) for o in objects])
    return crops, np.array([o.digit for o in objects]), colours


@pytest.fixture(scope="module")
def train():
    return crops_of("train", 400)


@pytest.fixture(scope="module")
def heldout():
    return crops_of("test", 200)


def report(rebuilt, heldout, known, **changes):
    originals, digits, colours = heldout
    arguments = {"originals": originals, "digits": digits, "colours": colours, "palette": PALETTE}
    return canvases_report(rebuilt, **({**arguments, "train": known[:2]} | changes))


def paint(ink, colours):
    return ink * colours[:, None, None, :]


def test_a_perfect_tokenizer_loses_nothing(heldout, train):
    result = report(heldout[0], heldout, train)
    assert result["svm_accuracy"] > 0.95
    assert result["agreement"] == result["svm_accuracy"]
    assert result["colour_agreement"] == 1
    assert result["colour_error_deg"] < 0.1


def test_wrong_colours_cost_colours_alone(heldout, train):
    crops, _, colours = heldout
    ink = crops.max(-1, keepdims=True) / 255
    result = report(paint(ink, PALETTE[(colours + 1) % len(PALETTE)]), heldout, train)
    assert result["agreement"] == pytest.approx(result["svm_accuracy"], abs=0.005)
    assert result["colour_agreement"] == 0
    assert result["colour_error_deg"] > 15
    tinted = report(paint(ink, 0.9 * PALETTE[colours] + 25), heldout, train)
    assert tinted["colour_agreement"] > 0.95
    assert 1 < tinted["colour_error_deg"] < 8


def test_wrong_digits_cost_agreement_alone(heldout, train):
    crops, _, colours = heldout
    ink = crops[np.random.default_rng(0).permutation(len(crops))].max(-1, keepdims=True) / 255
    result = report(paint(ink, PALETTE[colours]), heldout, train)
    assert result["svm_accuracy"] > 0.95
    assert result["agreement"] < 0.3
    assert result["colour_agreement"] == 1


def test_nothing_drawn_is_no_colour(heldout, train):
    result = report(np.zeros_like(heldout[0]), heldout, train)
    assert result["colour_agreement"] == 0
    assert result["colour_error_deg"] == pytest.approx(90)
    assert result["agreement"] < 0.3


def test_a_cut_keeps_shape_and_place():
    image = np.zeros((40, 50, 3), np.uint8)
    image[4:36, 10:26] = COLOURS["yellow"]
    crop = cut_digit(image, (4, 10, 36, 26))
    assert crop.shape == (16, 16, 3)
    # 32×16 pixels become 16×8 in the middle of the square.
    np.testing.assert_allclose(crop[1:-1, 5:11], np.broadcast_to(COLOURS["yellow"], (14, 6, 3)))
    assert not crop[:, :3].any()
    assert not crop[:, -3:].any()
    # Only the box: what is beside it does not come in.
    np.testing.assert_allclose(
        cut_digit(image, (4, 10, 20, 26)), np.full((16, 16, 3), COLOURS["yellow"])
    )


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 5), (3, 9, 8, 9), (-1, 0, 5, 5), (0, 0, 41, 5), (0, 0, 5, 51)]
)
def test_boxes_outside_of_the_image_are_refused(box):
    with pytest.raises(ValueError, match="outside of the image of 40x50"):
        cut_digit(np.zeros((40, 50, 3), np.uint8), box)


def refusals(heldout):
    crops, digits, colours = heldout
    nan = crops.copy()
    nan[0, 0, 0, 0] = np.nan
    return {
        r"rebuilt: crops have shape \(0,": (crops[:0], {}),
        "rebuilt: crops have shape": (crops[:, :8], {}),
        "rebuilt: pixels": (nan, {}),
        r"originals: pixels -.*allowed 0\.\.255": (crops, {"originals": -crops}),
        "rebuilt: digits have shape .* one integer": (crops[1:], {}),
        "digits have .* float64": (crops, {"digits": digits * 1.0}),
        "colours are 0..6; allowed: rows of the palette, 0..5": (crops, {"palette": PALETTE[:6]}),
        "train: digits have": (crops, {"train": (crops, digits[1:])}),
        "colours have shape": (crops, {"colours": colours[:, None]}),
    }


@pytest.mark.parametrize("index", range(9))
def test_what_does_not_fit_is_refused(index, heldout, train):
    match, (rebuilt, changes) = list(refusals(heldout).items())[index]
    with pytest.raises(ValueError, match=match):
        report(rebuilt, heldout, train, **changes)
