import dataclasses
import re

import numpy as np
import pytest
from scipy import ndimage

from maskgil_jax.data.canvas_captions import KINDS as PROMPT_KINDS
from maskgil_jax.data.canvas_captions import Expectation, Group
from maskgil_jax.data.canvases import COLOURS, SIZES, CanvasSource, draw_digits
from maskgil_jax.evals.canvas_checker import (
    KINDS,
    CanvasChecker,
    FoundDigit,
    Verdict,
    canvas_geneval_report,
    find_relations,
    judge,
    score,
)
from maskgil_jax.evals.canvases import cut_digit


@pytest.fixture(scope="module")
def train():
    drawn = [CanvasSource("train").draw(index) for index in range(700)]
    crops = [cut_digit(image, o.box) for image, scene in drawn for o in scene.objects]
    return np.stack(crops), np.array([o.digit for _, scene in drawn for o in scene.objects])


@pytest.fixture(scope="module")
def checker(train):
    return CanvasChecker(palette=COLOURS, train=train)


@pytest.fixture(scope="module")
def drawn():
    return [CanvasSource("test", SIZES[i % len(SIZES)]).draw(i) for i in range(120)]


def expect(kind, *groups, relation=None):
    return Expectation(
        kind=kind, groups=tuple(Group(*group) for group in groups), relation=relation
    )


def read(found):
    return sorted((one.digit, one.colour) for one in found)


def boxes_of(found):
    return sorted(one.box for one in found)


def test_both_rooms_name_the_same_columns():
    assert KINDS == PROMPT_KINDS


def test_digits_colours_and_boxes_of_real_canvases_are_found(checker, drawn):
    found = checker.find(image for image, _ in drawn)
    right = [
        read(digits) == sorted((o.digit, o.colour) for o in scene.objects)
        for digits, (_, scene) in zip(found, drawn, strict=True)
    ]
    assert np.mean(right) > 0.93
    for digits, (_, scene) in zip(found, drawn, strict=True):
        # The reader may err, the segmentation not.
        assert sorted(one.colour for one in digits) == sorted(o.colour for o in scene.objects)
        # The faint end of a stroke may be missing.
        errors = np.subtract(boxes_of(digits), sorted(o.box for o in scene.objects))
        assert np.abs(errors).max() < 8
        assert np.abs(errors).mean() < 2
        confidences = [one.confidence for one in digits]
        assert confidences == sorted(confidences, reverse=True)


def test_specks_and_noise_are_overlooked(checker, drawn):
    rng = np.random.default_rng(0)
    plain = checker.find(image for image, _ in drawn[:40])
    spoilt = []
    for image, scene in drawn[:40]:
        noisy = image + rng.normal(0, 6, image.shape)
        free = np.ones(scene.size, bool)
        for o in scene.objects:
            top, left, bottom, right = o.box
            free[max(top - 12, 0) : bottom + 12, max(left - 12, 0) : right + 12] = False
        for row, column in rng.permutation(np.argwhere(free[:-4, :-4]))[:3]:
            noisy[row : row + 4, column : column + 4] = COLOURS["green"]
        spoilt.append(noisy.clip(0, 255).astype(np.uint8))
    again = checker.find(spoilt)
    assert np.mean([read(a) == read(b) for a, b in zip(plain, again, strict=True)]) > 0.94


def test_a_broken_digit_is_one(checker):
    image, scene = draw_digits(np.random.default_rng(2), "test", (64, 64), [0], ["cyan"])
    top, _, bottom, right = scene.objects[0].box
    broken = image.copy()
    broken[(top + bottom) // 2 : (top + bottom) // 2 + 2] = 0
    assert ndimage.label(broken.max(-1) > 64)[1] > ndimage.label(image.max(-1) > 64)[1]
    assert [read(found) for found in checker.find([image, broken])] == [[(0, "cyan")]] * 2
    # A piece further off, and the same of another colour: that is a speck.
    dot = image.copy()
    middle = slice((top + bottom) // 2 - 2, (top + bottom) // 2 + 2)
    dot[middle, right + 3 : right + 5] = COLOURS["cyan"]
    (found,) = checker.find([dot])
    assert [one.colour for one in found] == ["cyan"]  # which digit it reads now is open
    assert found[0].box[3] > right + 3
    dot[middle, right + 3 : right + 5] = COLOURS["red"]
    (found,) = checker.find([dot])
    assert read(found) == [(0, "cyan")]
    assert found[0].box[3] <= right + 1


def cut(digit, colour, seed):
    image, scene = draw_digits(np.random.default_rng(seed), "test", (96, 96), [digit], [colour])
    top, left, bottom, right = scene.objects[0].box
    return image[top:bottom, left:right]


@pytest.mark.parametrize("colours", [("red", "blue"), ("yellow", "yellow"), ("white", "green")])
@pytest.mark.parametrize("down", [False, True])
def test_digits_that_touch_are_told_apart(checker, colours, down):
    right = []
    for seed in range(12):
        a, b = cut(0, colours[0], seed), cut(3, colours[1], seed + 50)
        pair = np.zeros((2, 128, 128, 3), np.uint8)
        # Two pixels of soft edge of one on those of the other; below, one between them.
        row, column = (10 + a.shape[0] + 1, 20) if down else (10, 20 + a.shape[1] - 2)
        pair[0, 10 : 10 + a.shape[0], 20 : 20 + a.shape[1]] = a
        pair[1, row : row + b.shape[0], column : column + b.shape[1]] = b
        together, *alone = checker.find([pair.max(0), *pair])
        # As they are read when they are by themselves, whether that is right or not.
        right.append(read(together) == sorted(read(alone[0]) + read(alone[1])))
    assert np.mean(right) >= 0.9


def test_a_digit_of_a_mottled_colour_is_one(checker):
    rng = np.random.default_rng(0)
    image = draw_digits(rng, "test", (64, 64), [0], ["yellow"])[0]
    ink = image.max(-1, keepdims=True) / 255
    stripes = (np.arange(64) // 3 % 2 == 0)[None, :, None]
    mottled = np.where(stripes, ink * np.array(COLOURS["red"]), image).astype(np.uint8)
    (found,) = checker.find([mottled])
    assert [one.digit for one in found] == [0]
    assert found[0].colour in ("red", "yellow")


def test_an_empty_canvas_has_no_digits(checker):
    black = np.zeros((64, 96, 3), np.uint8)
    assert checker.find([black]) == [()]
    (verdict,) = checker.check([black], [expect("single_object", (1, 7, None))])
    assert not verdict.correct
    assert verdict.reason == "expected 7 >= 1 times, found 0; on the picture: nothing"


def put(digit, colour="red", box=(0, 0, 20, 20), confidence=1.0):
    return FoundDigit(digit, colour, box, confidence)


LEFT, RIGHT, BELOW = (30, 0, 60, 20), (30, 60, 60, 80), (90, 0, 120, 20)


@pytest.mark.parametrize(
    ("kind", "groups", "relation", "found", "reason"),
    [
        ("single_object", [(1, 7, None)], None, [put(7)], ""),
        ("single_object", [(1, 7, None)], None, [put(7), put(7), put(3)], ""),
        ("single_object", [(1, 7, None)], None, [put(3)], "expected 7 >= 1 times, found 0"),
        ("two_objects", [(1, 7, None), (1, 3, None)], None, [put(3), put(7)], ""),
        ("two_objects", [(1, 7, None), (1, 3, None)], None, [put(7), put(7)], "expected 3 >= 1"),
        ("counting", [(2, 7, None)], None, [put(7), put(3), put(7)], ""),
        ("counting", [(2, 7, None)], None, [put(7)], "expected 7 >= 2 times, found 1"),
        ("counting", [(2, 7, None)], None, [put(7)] * 3, "expected 7 < 3 times, found 3"),
        ("colors", [(1, 7, "red")], None, [put(7)], ""),
        ("colors", [(1, 7, "red")], None, [put(7, "blue")], "expected 7 in red, found blue"),
        ("colors", [(1, 7, "red")], None, [put(7, "blue"), put(7)], "expected 7 in red, found bl"),
        (
            "position",
            [(1, 7, None), (1, 3, None)],
            "left of",
            [put(3, box=RIGHT), put(7, box=LEFT)],
            "",
        ),
        (
            "position",
            [(1, 7, None), (1, 3, None)],
            "left of",
            [put(7, box=RIGHT), put(3, box=LEFT)],
            "expected 7 left of 3, found right of",
        ),
        (
            "position",
            [(1, 7, None), (1, 3, None)],
            "above",
            [put(7, box=LEFT), put(3, box=RIGHT)],
            "expected 7 above 3, found left of",
        ),
        ("position", [(1, 7, None), (1, 3, None)], "above", [put(7)], "no pair of which one"),
        (
            "attribute_binding",
            [(1, 7, "red"), (1, 3, "blue")],
            None,
            [put(7, "red"), put(3, "blue")],
            "",
        ),
        (
            "attribute_binding",
            [(1, 7, "red"), (1, 3, "blue")],
            None,
            [put(7, "blue"), put(3, "red")],
            "expected 7 in red, found blue; expected 3 in blue, found red",
        ),
    ],
)
def test_verdicts_follow_the_rules_of_geneval(kind, groups, relation, found, reason):
    verdict = judge(found, expect(kind, *groups, relation=relation))
    assert (verdict.kind, verdict.correct) == (kind, not reason)
    assert reason in verdict.reason
    assert ("on the picture: " in verdict.reason) == (not verdict.correct)


@pytest.mark.parametrize(
    ("other", "relations"),
    [
        (RIGHT, {"left of"}),
        (BELOW, {"above"}),
        ((90, 60, 120, 80), {"above", "left of"}),
        ((30, 2, 60, 22), set()),  # two pixels: a tenth of both widths is more
        ((30, 5, 60, 25), set()),  # five, less four: a fifth of the way
        (LEFT, set()),
        ((90, 25, 120, 45), {"above"}),
    ],
)
def test_relations_are_those_of_geneval(other, relations):
    assert find_relations(LEFT, other) == relations
    mirrored = {"left of": "right of", "above": "below"}
    assert find_relations(other, LEFT) == {mirrored[name] for name in relations}


def test_a_report_has_the_share_of_each_column_and_their_mean(train):
    rng = np.random.default_rng(2)
    red_seven = draw_digits(rng, "test", (64, 64), [0], ["red"])[0]
    black = np.zeros_like(red_seven)
    expectations = [
        expect("single_object", (1, 0, None)),
        expect("single_object", (1, 0, None)),
        expect("two_objects", (1, 0, None), (1, 3, None)),
        expect("counting", (1, 0, None)),
        expect("colors", (1, 0, "red")),
        expect("position", (1, 0, None), (1, 3, None), relation="above"),
        expect("attribute_binding", (1, 0, "red"), (1, 3, "blue")),
    ]
    images = [red_seven, black, *[red_seven] * 5]
    report = canvas_geneval_report(images, expectations, palette=COLOURS, train=train)
    assert list(report) == [*KINDS, "overall"]
    assert [report[kind] for kind in KINDS] == [0.5, 0, 1, 1, 0, 0]
    assert report["overall"] == pytest.approx(2.5 / 6)


def test_a_missing_column_is_an_error():
    verdicts = [Verdict(kind=kind, correct=True, reason="", found=()) for kind in KINDS[:-1]]
    with pytest.raises(ValueError, match="no images of attribute_binding"):
        score(verdicts)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "two_object"}, "'two_object' of expectation; allowed: single_object"),
        ({"groups": ()}, "expects nothing"),
        ({"groups": (Group(1, 11, None),)}, "a digit 0..9"),
        ({"groups": (Group(0, 1, None),)}, "1 or more"),
        ({"groups": (Group(1, 1, "mauve"),)}, "palette: red, yellow"),
        ({"groups": (Group(1, 1, "red"), Group(1, 1, "blue"))}, "name a digit twice"),
        ({"relation": "above"}, "relation 'above' of 1 groups"),
        ({"relation": "beside"}, "'left of' or 'above'"),
    ],
)
def test_expectations_that_make_no_sense_are_refused(checker, change, match):
    expectation = dataclasses.replace(expect("colors", (1, 7, "red")), **change)
    with pytest.raises(ValueError, match=match):
        checker.check([np.zeros((64, 64, 3), np.uint8)], [expectation])


def test_other_input_is_refused(checker, train):
    black = np.zeros((64, 64, 3), np.uint8)
    for image in (black.astype(np.float32), black[..., 0], black[:0]):
        with pytest.raises(ValueError, match=re.escape("expected uint8 [H W 3]")):
            checker.find([image])
    with pytest.raises(ValueError, match="2 images for 1 expectations"):
        checker.check([black, black], [expect("colors", (1, 7, "red"))])
    with pytest.raises(ValueError, match="none of it black"):
        CanvasChecker(palette={"black": (0, 0, 0)}, train=train)
    with pytest.raises(ValueError, match="none of it black"):
        CanvasChecker(palette={}, train=train)
    with pytest.raises(ValueError, match=re.escape("expected [n 16 16 3]")):
        CanvasChecker(palette=COLOURS, train=(train[0], train[1][1:]))
    known = train[1] != 4
    with pytest.raises(ValueError, match="expected each of 0..9"):
        CanvasChecker(palette=COLOURS, train=(train[0][known], train[1][known]))
