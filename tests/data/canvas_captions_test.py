import collections
import itertools
import re

import numpy as np
import pytest

from maskgil_jax.data.canvas_captions import (
    KINDS,
    RELATIONS,
    CaptionedCanvasSource,
    Group,
    Statement,
    heldout_prompts,
    holds,
    word_statement,
)
from maskgil_jax.data.canvases import CELL_PX, COLOURS, SIZES, CanvasSource, SceneObject
from maskgil_jax.data.digits import digits_arrays

COUNT = 400
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = {word + ("es" if word == "six" else "s"): digit for digit, word in enumerate(DIGITS)}
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
# Where the first named is, seen from the second.
PLACES = {
    "left of": "left of",
    "to the left of": "left of",
    "on the left of": "left of",
    "right of": "right of",
    "to the right of": "right of",
    "on the right of": "right of",
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
}
NAME = (
    rf"(?P<n>{'|'.join(NUMBERS)}) (?:(?P<c>{'|'.join(COLOURS)}) )?"
    rf"(?P<d>{'|'.join([*PLURALS, *DIGITS])})(?: in (?P<c2>{'|'.join(COLOURS)}))?"
)


def parse_names(text):
    """Read `a red seven, two blue twos and an eight` on its own terms, or fail."""
    groups = []
    for part in re.split(", | and ", text):
        match = re.fullmatch(NAME, part)
        assert match, (part, text)
        n = NUMBERS[match["n"]]
        assert (match["d"] in PLURALS) == (n > 1), text
        if match["n"] in ("a", "an"):
            vowel = part.split()[1] == "eight"
            assert (match["n"] == "an") == vowel, text
        digit = PLURALS[match["d"]] if n > 1 else DIGITS.index(match["d"])
        groups.append((n, digit, match["c"] or match["c2"]))
    return groups


def parse(caption):
    """Read a caption: names, then None or the place of the first name seen from the others."""
    text = re.sub(r",? on (black|a black canvas)$", "", caption)
    text = re.sub(r"^(a picture|an image|a photo|a drawing) of ", "", text)
    if match := re.fullmatch("(.*) with (.*) to (its|their) right", text):
        groups = [*parse_names(match[1]), *parse_names(match[2])]
        assert (match[3] == "its") == (groups[0][0] == 1), caption
        return groups, "left of"
    if match := re.fullmatch("(.*) with (.*) below (it|them)", text):
        groups = [*parse_names(match[1]), *parse_names(match[2])]
        assert (match[3] == "it") == (groups[0][0] == 1), caption
        return groups, "above"
    for saying in sorted(PLACES, key=len, reverse=True):
        if f" {saying} " in text:
            first, rest = text.split(f" {saying} ")
            assert len(parse_names(first)) == 1
            return [*parse_names(first), *parse_names(rest)], PLACES[saying]
    return parse_names(text), None


def is_true(caption, scene):
    """Judge a caption by the scene alone: all digits told, none else, and where they are."""
    groups, place = parse(caption)
    told = collections.Counter()
    for n, digit, colour in groups:
        told[digit, colour] += n
    with_colours = groups[0][2] is not None
    there = collections.Counter(
        (o.digit, o.colour if with_colours else None) for o in scene.objects
    )
    if told != there:
        return False

    def members(group):
        return [
            o
            for o in scene.objects
            if o.digit == group[1] and (not with_colours or o.colour == group[2])
        ]

    axis, sign = {"left of": (1, 1), "right of": (1, -1), "above": (0, 1), "below": (0, -1)}.get(
        place, (0, 0)
    )
    for other in groups[1:] if place else ():
        for a in members(groups[0]):
            for b in members(other):
                apart = sign * (b.position[axis] - a.position[axis])
                if apart < 1.2 * abs(b.position[1 - axis] - a.position[1 - axis]):
                    return False
                low, high = (a, b) if sign > 0 else (b, a)
                if low.box[axis + 2] > high.box[axis]:
                    return False
    return True


@pytest.fixture(scope="module")
def drawn():
    return {
        split: [CaptionedCanvasSource(split).draw(index) for index in range(COUNT)]
        for split in ("train", "test")
    }


def test_captions_are_true_and_leave_nothing_out(drawn):
    for canvases in drawn.values():
        for _, scene, caption in canvases:
            assert is_true(caption, scene), (caption, scene)
        # The judge is no yes-man: hardly a caption is true of the next canvas.
        wrong = [is_true(a[2], b[1]) for a, b in itertools.pairwise(canvases)]
        assert np.mean(wrong) < 0.05


def test_captions_are_short_lower_case_and_varied(drawn):
    captions = [caption for canvases in drawn.values() for _, _, caption in canvases]
    for caption in captions:
        assert re.fullmatch("[a-z ,]{5,64}", caption), caption
    assert len(set(captions)) > 0.6 * len(captions)
    starts = ("a picture of", "an image of", "a photo of", "a drawing of", "one ", "two ", "three ")
    ends = ("on black", ", on black", "on a black canvas")
    for phrase in (*starts, *ends, " and ", ", a", " in red", *COLOURS, *DIGITS, *PLURALS):
        assert any(phrase in caption for caption in captions), phrase


def test_every_column_has_its_share(drawn):
    kinds = collections.Counter()
    for _, _, caption in drawn["train"]:
        groups, place = parse(caption)
        count, coloured = sum(group[0] for group in groups), groups[0][2] is not None
        if count == 1:
            kinds["coloured" if coloured else "plain"] += 1
        elif place:
            kinds["position", {"right of": "left of", "below": "above"}.get(place, place)] += 1
        elif len(groups) == 1:
            kinds["counting", count] += 1
        elif count == 2:
            kinds["attributes" if coloured else "pair"] += 1
    assert min(kinds.values()) > 0.02 * COUNT, kinds
    # Places are told often: of two digits, which is which is the hardest to learn.
    assert kinds["position", "left of"] + kinds["position", "above"] > 0.25 * COUNT, kinds
    assert len(kinds) == 8


def test_digits_are_named_in_the_order_of_reading(drawn):
    checked = 0
    for _, scene, caption in drawn["train"]:
        groups, place = parse(caption)
        if place or len(groups) == 1:
            continue
        firsts = [
            min(
                (o.box[0] // CELL_PX, o.box[1] // CELL_PX)
                for o in scene.objects
                if o.digit == digit and colour in (None, o.colour)
            )
            for _, digit, colour in groups
        ]
        assert firsts == sorted(firsts), (caption, scene)
        checked += 1
    assert checked > 0.02 * COUNT


def test_training_says_most_relations_of_what_is_read_first(drawn):
    def forward_share(captions):
        said = [place for groups, place in map(parse, captions) if place and len(groups) == 2]
        assert len(said) > 0.1 * COUNT
        return np.mean([place in ("left of", "above") for place in said])

    # Of the others, too, a fifth begins with it: "a seven with a three to its right".
    assert 0.74 < forward_share(caption for _, _, caption in drawn["train"]) < 0.94
    prompts = heldout_prompts("position", COUNT)
    assert 0.5 < forward_share(prompt for prompt, _ in prompts) < 0.7


def test_pictures_are_those_of_the_scene_and_the_split(drawn):
    for split, canvases in drawn.items():
        labels = digits_arrays(split)[1]
        for image, scene, _ in canvases[:100]:
            assert (image.dtype, image.shape) == (np.uint8, (*scene.size, 3))
            rest = image.copy()
            for o in scene.objects:
                top, left, bottom, right = o.box
                assert (image[top:bottom, left:right] == COLOURS[o.colour]).all(-1).any()
                assert labels[o.row] == o.digit
                rest[top:bottom, left:right] = 0
            assert not rest.any()
        assert {scene.size for _, scene, _ in canvases} == set(SIZES)


def test_records_are_a_function_of_seed_split_index_and_size():
    source = CaptionedCanvasSource("train", (64, 96))
    assert len(source) == 1_000_000
    for index in (0, 5, len(source) - 1):
        record, again = source[index], CaptionedCanvasSource("train", (64, 96))[np.int64(index)]
        assert set(record) == {"image", "caption"}
        assert record["caption"] == again["caption"]
        np.testing.assert_array_equal(record["image"], again["image"])
    captions = [source[index]["caption"] for index in range(12)]
    others = [
        CaptionedCanvasSource("train", (64, 96), seed=1),
        CaptionedCanvasSource("train", (96, 64)),
        CaptionedCanvasSource("test", (64, 96)),
    ]
    for other in others:
        assert other.name != source.name
        assert [other[index]["caption"] for index in range(12)] != captions
    plain = CanvasSource("train", (64, 96))
    assert any((plain[i]["image"] != source[i]["image"]).any() for i in range(3))
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match="allowed 0..999999"):
            source[index]


def key(caption):
    """Digits told, with their colours, in no order; and the relation, from one side."""
    groups, place = parse(caption)
    if place in ("right of", "below"):
        groups, place = [*groups[1:], groups[0]], {"right of": "left of"}.get(place, "above")
    head = groups[:1] if place else ()
    return (tuple(head), tuple(sorted(groups[len(head) :], key=str)), place)


def test_splits_say_nothing_alike_but_single_digits(drawn):
    said = {split: {key(c) for _, _, c in canvases} for split, canvases in drawn.items()}
    both = said["train"] & said["test"]
    assert len(both) == 10
    assert all(groups[0][0] == 1 and groups[0][2] is None for _, groups, _ in both)
    assert all(len(groups) == 1 for _, groups, _ in both)

    def plain(keys):
        """Pairs of digits told to be alone on a canvas, whatever else is told of them."""
        digits = {tuple(sorted(g[1] for g in (*head, *rest) for _ in range(g[0])))
                  for head, rest, _ in keys}  # fmt: skip
        return {pair for pair in digits if len(pair) == 2}

    # A held-out pair is told in training neither with colours nor in places.
    never = {
        (a, b)
        for a in range(10)
        for b in range(a, 10)
        if Statement(groups=groups_of(a, b)).is_held_out
    }
    assert len(never) == 16
    assert not plain(said["train"]) & never
    assert len(plain(said["test"]) & never) > 9


def groups_of(a, b):
    return (Group(2, a, None),) if a == b else (Group(1, a, None), Group(1, b, None))


def test_what_is_held_out_holds_for_all_that_says_more():
    plain = [Group(1, 1, None), Group(1, 8, None)]
    assert Statement(groups=tuple(plain)).is_held_out
    red, blue = Group(1, 1, "red"), Group(1, 8, "blue")
    for groups in ((red, blue), (blue, red)):
        assert Statement(groups=groups).is_held_out
        for relation in RELATIONS:
            assert Statement(groups=groups, relation=relation).is_held_out
    # Two nines are held out: of whatever colours, but not beside something else.
    assert Statement(groups=(Group(2, 9, None),)).is_held_out
    assert Statement(groups=(Group(2, 9, "red"),)).is_held_out
    assert Statement(groups=(Group(1, 9, "red"), Group(1, 9, "pink")), relation="above").is_held_out
    with_one = [Statement(groups=(Group(2, 9, None), Group(1, d, None))) for d in range(9)]
    assert not all(each.is_held_out for each in with_one)
    for digit in range(10):
        assert not Statement(groups=(Group(1, digit, None),)).is_held_out


def test_combinations_do_not_depend_on_the_order():
    a, b, c = Group(1, 7, "red"), Group(1, 3, "blue"), Group(1, 3, "red")
    assert Statement(groups=(a, b, c)).combination == Statement(groups=(c, a, b)).combination
    above = Statement(groups=(a, b, c), relation="above")
    assert above.combination == Statement(groups=(a, c, b), relation="above").combination
    assert above.combination != Statement(groups=(b, a, c), relation="above").combination
    assert above.combination != Statement(groups=(a, b, c), relation="left of").combination


def test_the_longest_statement_is_said_in_time():
    longest = Statement(
        groups=(Group(1, 3, "yellow"), Group(1, 7, "yellow"), Group(1, 8, "yellow")),
        relation="left of",
    )
    captions = {word_statement(np.random.default_rng(seed), longest) for seed in range(200)}
    assert max(map(len, captions)) <= 64
    for caption in captions:
        assert {g[:2] for g in parse(caption)[0]} == {(1, 3), (1, 7), (1, 8)}


def make_object(box):
    return SceneObject(digit=1, colour="red", box=box, row=0)


def test_relations_hold_only_if_they_are_plain_to_see():
    first = make_object((0, 0, 20, 20))
    beside, diagonal, far = (
        make_object(box) for box in ((8, 30, 28, 50), (28, 30, 48, 50), (28, 40, 48, 60))
    )
    assert holds("left of", first, beside)
    assert not holds("left of", beside, first)
    assert not holds("above", first, beside)
    for relation in RELATIONS:
        assert not holds(relation, first, diagonal)
    assert holds("left of", first, far)
    assert not holds("above", first, far)
    touching = make_object((0, 19, 20, 60))
    assert not holds("left of", first, touching)
    below = make_object((30, 5, 50, 25))
    assert holds("above", first, below)
    assert not holds("above", below, first)


@pytest.mark.parametrize(
    ("groups", "relation", "match"),
    [
        ((), None, "0 digits; allowed: 1 to 3"),
        ((Group(4, 1, None),), None, "4 digits; allowed"),
        ((Group(0, 1, None), Group(1, 2, None)), None, "allowed: 1 to 3"),
        ((Group(1, 10, None),), None, "digits 0..9"),
        ((Group(1, 1, "mauve"),), None, "mauve.*red, yellow"),
        ((Group(1, 1, "red"), Group(1, 2, None)), None, "all of them or none"),
        ((Group(1, 1, "red"), Group(1, 1, "red")), None, "put them together"),
        ((Group(1, 1, None),), "above", "relation 'above' of 1 groups"),
        ((Group(1, 1, None), Group(1, 2, None)), "below", "'left of', 'above'"),
    ],
)
def test_statements_that_make_no_sense_are_refused(groups, relation, match):
    with pytest.raises(ValueError, match=match):
        Statement(groups=groups, relation=relation)


def test_other_splits_sizes_and_seeds_are_refused():
    with pytest.raises(ValueError, match=r"'val'.*'train', 'test'"):
        CaptionedCanvasSource("val")
    with pytest.raises(ValueError, match="canvas size"):
        CaptionedCanvasSource("train", (64, 72))
    with pytest.raises(ValueError, match="seed = -1"):
        CaptionedCanvasSource(seed=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_say_what_is_expected_and_was_not_said_in_training(kind, drawn):
    prompts = heldout_prompts(kind, 200)
    trained = {key(caption) for _, _, caption in drawn["train"]}
    for prompt, expectation in prompts:
        groups, place = parse(prompt)
        if place in ("right of", "below"):
            groups, place = groups[::-1], {"right of": "left of"}.get(place, "above")
        assert (expectation.kind, expectation.relation) == (kind, place)
        told = [tuple(group) for group in expectation.groups]
        assert groups == told if place else sorted(groups) == sorted(told)
        statement = Statement(groups=expectation.groups, relation=expectation.relation)
        assert statement.is_held_out == (kind != "single_object")
        if kind != "single_object":
            assert key(prompt) not in trained
        numbers, digits, colours = zip(*groups, strict=True)
        assert (numbers in ((2,), (3,))) == (kind == "counting")
        assert len(set(digits)) == len(digits)
        assert len(digits) == (2 if kind in ("two_objects", "position", "attribute_binding") else 1)
        assert (None not in colours) == (kind in ("colors", "attribute_binding"))
        if kind == "attribute_binding":
            assert colours[0] != colours[1]
    assert len({prompt for prompt, _ in prompts}) > 30
    # Each combination as often as any other.
    times = collections.Counter(key(prompt) for prompt, _ in prompts)
    assert max(times.values()) - min(times.values()) <= 1
    assert len({digit for _, e in prompts for _, digit, _ in e.groups}) == (
        4 if kind == "counting" else 10
    )


def test_prompts_are_a_function_of_the_seed():
    prompts = heldout_prompts("position", 60, 3)
    assert heldout_prompts("position", 20, 3) == prompts[:20]
    assert heldout_prompts("position", 60, 4) != prompts
    assert heldout_prompts("position", 0) == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("two_object", 1), "'two_object' of prompts; allowed: single_object, two_objects"),
        (("colors", -1), "count = -1"),
        (("colors", 1, -1), "seed = -1"),
    ],
)
def test_prompts_that_there_are_not_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        heldout_prompts(*arguments)
