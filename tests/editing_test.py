"""Editing: what is generated anew, what stays, and how both are joined."""

import itertools

import numpy as np
import pytest
import tiny

from maskgil_jax import editing, generation
from maskgil_jax import generator as generator_lib

MASK = 32
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vq"
    return tiny.make_generator(tiny.make_tokenizer_dir(path))


@pytest.fixture
def starts(monkeypatch):
    """What the decoding loop is given to start from, call by call."""
    seen, generate = [], generator_lib.generate

    def spy(*args, start=None, **options):
        seen.append(start)
        return generate(*args, start=start, **options)

    monkeypatch.setattr(generator_lib, "generate", spy)
    return seen


def pictures(count=2, height=16, width=16):
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (count, height, width, 3), np.uint8)


def mark(*pixels, height=16, width=16, count=2):
    masks = np.zeros((count, height, width), bool)
    for y, x in pixels:
        masks[:, y, x] = True
    return masks


def neighbours(cells, grid=(4, 4)):
    """The cells and those around them, diagonally too, one by one."""
    found = set()
    for (y, x), dy, dx in itertools.product(cells, (-1, 0, 1), (-1, 0, 1)):
        if 0 <= y + dy < grid[0] and 0 <= x + dx < grid[1]:
            found.add((y + dy, x + dx))
    return found


def marked_cells(mask):
    return {(int(y), int(x)) for y, x in np.argwhere(mask)}


@pytest.mark.parametrize(
    ("pixels", "cells"),
    [
        ([(0, 0)], {(0, 0)}),
        ([(3, 3)], {(0, 0)}),
        ([(4, 3)], {(1, 0)}),
        ([(15, 15), (7, 8)], {(3, 3), (1, 2)}),
        ([(3, 7), (4, 8)], {(0, 1), (1, 2)}),
    ],
)
def test_a_token_is_marked_if_one_of_its_pixels_is(pixels, cells):
    masks = mark(*pixels)
    for grow in range(3):
        assert marked_cells(editing.token_mask(masks, 4, grow)[1]) == cells
        cells = neighbours(cells)


def test_images_do_not_grow_into_one_another():
    masks = mark((8, 8), count=3)
    masks[[0, 2]] = False
    assert editing.token_mask(masks, 4, 1).sum((1, 2)).tolist() == [0, 9, 0]


def test_feathering_falls_linearly_with_the_distance():
    masks = mark((4, 4), (4, 5), count=1, width=20)
    black, white = np.zeros((1, 16, 20, 3), np.uint8), np.full((1, 16, 20, 3), 200, np.uint8)
    mixed = editing.composite(black, white, masks, feather=5.0)
    for y, x in np.ndindex(16, 20):
        distance = min(np.hypot(y - 4, x - 4), np.hypot(y - 4, x - 5))
        expected = round(200 * max(0, 1 - distance / 5))
        assert (mixed[0, y, x] == expected).all(), (y, x)
    assert mixed[0, 4, 4, 0] == 200
    assert mixed[0, 4, 6, 0] == 160
    hard = editing.composite(black, white, masks)
    np.testing.assert_array_equal(hard[..., 0] == 200, masks)
    np.testing.assert_array_equal(hard[..., 0] == 0, ~masks)


@pytest.mark.parametrize("grow", [0, 1])
def test_an_edit_keeps_all_tokens_and_pixels_outside(generator, starts, grow):
    images, masks = pictures(), mark((5, 6), (5, 7), (6, 8))
    known = generator.encode(images)
    made = generator.edit(images, masks, [0, 1], grow=grow, seed=2, return_trace=True)
    cells = {(1, 1), (1, 2)}
    anew = np.zeros((4, 4), bool)
    anew[tuple(zip(*(neighbours(cells) if grow else cells), strict=True))] = True
    np.testing.assert_array_equal(starts[0] == MASK, np.stack([anew, anew]))
    np.testing.assert_array_equal(made.tokens[:, ~anew], known[:, ~anew])
    np.testing.assert_array_equal(made.trace[:, :, ~anew], np.stack([known[:, ~anew]] * 2))
    assert made.tokens.max() < MASK
    assert (made.tokens[:, anew] != known[:, anew]).any()
    np.testing.assert_array_equal(made.images[~masks], images[~masks])
    np.testing.assert_array_equal(made.images[masks], generator.decode(made.tokens)[masks])
    assert (made.images[masks] != images[masks]).any()


def test_feathering_reaches_no_further_than_said(generator):
    images, masks = pictures(), mark((5, 6))
    made = generator.edit(images, masks, [0, 1], feather=3.0, seed=2)
    y, x = np.ogrid[:16, :16]
    far = np.hypot(y - 5, x - 6) >= 3
    np.testing.assert_array_equal(made.images[:, far], images[:, far])
    near = ~far & ~masks[0]
    assert (made.images[:, near] != images[:, near]).any()


def test_an_edit_may_have_another_size_than_the_trained_one(generator, starts):
    images, masks = pictures(width=24), mark((0, 23), width=24)
    made = generator.edit(images, masks, [0, 1], seed=2)
    assert (made.tokens.shape, made.images.shape) == ((2, 4, 6), images.shape)
    assert [marked_cells(grid == MASK) for grid in starts[0]] == [{(0, 5)}] * 2


def test_outpainting_keeps_the_original(generator, starts):
    images = pictures(height=8, width=12)
    made = generator.outpaint(images, (4, 4, 0, 4), [0, 1], seed=2)
    assert made.images.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(made.images[:, 4:12, :12], images)
    inside = np.zeros((4, 4), bool)
    inside[1:3, :3] = True
    np.testing.assert_array_equal(starts[0] != MASK, np.stack([inside, inside]))
    wide, masks = editing.pad(images, (4, 4, 0, 4))
    np.testing.assert_array_equal(wide[:, 0, :12], images[:, 0])
    np.testing.assert_array_equal(masks.sum((1, 2)), 256 - 8 * 12)
    np.testing.assert_array_equal(made.images[masks], generator.decode(made.tokens)[masks])


def test_no_images_give_no_edits(generator):
    made = generator.edit(pictures(0), mark(count=0), [])
    assert (made.images.shape, made.tokens.shape) == ((0, 16, 16, 3), (0, 4, 4))


@pytest.mark.parametrize(("keep", "number"), [(0.0, 0), (0.3, 5), (0.5, 8), (0.99, 15)])
def test_exactly_the_share_of_tokens_stays(keep, number):
    kept = editing.draw_kept((5, 4, 4), keep, seed=7)
    assert kept.sum((1, 2)).tolist() == [number] * 5
    np.testing.assert_array_equal(editing.draw_kept((2, 4, 4), keep, seed=7), kept[:2])
    np.testing.assert_array_equal(editing.draw_kept((2, 4, 4), keep, 7, first_index=3), kept[3:])
    if number not in (0, 15):
        assert len({grid.tobytes() for grid in kept}) > 1
        assert (editing.draw_kept((5, 4, 4), keep, seed=8) != kept).any()


def test_every_token_is_as_likely_to_stay():
    kept = editing.draw_kept((2000, 2, 3), 0.5, seed=0)
    # Six standard deviations.
    np.testing.assert_allclose(kept.mean(0), 0.5, atol=6 * np.sqrt(0.25 / 2000))


def test_variations_keep_tokens_and_depend_on_seed_and_place_only(generator, starts):
    images, labels = pictures(5), [0, 1, 0, 1, 0]
    known = generator.encode(images)
    made = generator.vary(images, labels, keep=0.3, seed=7)
    kept = starts[0] != MASK
    np.testing.assert_array_equal(kept, editing.draw_kept((5, 4, 4), 0.3, seed=7))
    np.testing.assert_array_equal(made.tokens[kept], known[kept])
    assert (made.tokens != known).any((1, 2)).all()
    np.testing.assert_array_equal(made.images, generator.decode(made.tokens))
    fewer = generator.vary(images[:2], labels[:2], keep=0.3, seed=7)
    np.testing.assert_array_equal(fewer.tokens, made.tokens[:2])
    later = generator.vary(images[3:], labels[3:], keep=0.3, seed=7, first_index=3)
    np.testing.assert_array_equal(later.tokens, made.tokens[3:])
    with pytest.raises(ValueError, match="first_index -1 is out of range"):
        generator.vary(images, labels, first_index=-1)
    assert (generator.vary(images, labels, keep=0.3, seed=8).tokens != made.tokens).any()


def test_an_edit_calls_back_and_may_be_stopped(generator):
    def stop(step, tokens):
        assert tokens.shape == (2, 4, 4)
        raise InterruptedError(f"after step {step}")

    with pytest.raises(InterruptedError, match="after step 0"):
        generator.edit(pictures(), mark((5, 6)), [0, 1], callback=stop)


@pytest.mark.parametrize(
    ("images", "masks", "match"),
    [
        (pictures(), mark((1, 1), height=12), r"masks are bool \(2, 12, 16\).* need bool \(2, 16"),
        (pictures(), mark((1, 1), count=1), r"masks are bool \(1, 16, 16\)"),
        (pictures(), mark((1, 1)).astype(np.uint8), "masks are uint8.*true where to generate"),
        (pictures().astype(np.float32), mark((1, 1)), "images are float32.*give uint8"),
        (pictures()[0], mark((1, 1))[0], r"images are uint8 \(16, 16, 3\); give uint8 \[b H W c\]"),
        (pictures(), mark(), "mask 0 marks nothing; mark what to generate"),
        (pictures(), ~mark(), "mask 0 marks the whole image"),
    ],
)
def test_images_and_masks_that_do_not_fit_are_refused(images, masks, match):
    with pytest.raises(ValueError, match=match):
        editing.check_masks(images, masks)


def one_empty_mask():
    masks = mark((1, 1))
    masks[1] = False
    return masks


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda g: g.edit(pictures(), one_empty_mask(), [0, 1]), "mask 1 marks nothing"),
        (
            lambda g: g.edit(pictures(width=18), mark((1, 1), width=18), [0, 1]),
            "16×18 pixels are not divisible by 4",
        ),
        (lambda g: g.edit(pictures(), mark((1, 1)), [0]), r"start has shape \(2, 4, 4\); 1 images"),
        (lambda g: g.edit(pictures(), mark((1, 1)), [0, 9]), "label 9 is out of range"),
        (lambda g: g.edit(pictures(), mark((1, 1)), [0, 1], grow=-1), "grow -1 is out of range"),
        (
            lambda g: g.edit(pictures(), mark((1, 1)), [0, 1], feather=-1.0),
            "feather -1.* 0 or more",
        ),
        (lambda g: g.edit(pictures(), mark((1, 1)), [0, 1], seed=-1), "seed -1 is out of range"),
        (
            lambda g: g.edit(pictures(), mark((1, 1)), [0, 1], num_steps=17),
            "num_steps 17 is out of range; allowed: 1 to 16",
        ),
        (lambda g: g.outpaint(pictures(), (0, 0, 0, 0), [0, 1]), "not all of them 0"),
        (lambda g: g.outpaint(pictures(), (4, -4, 0, 0), [0, 1]), "padding.* 0 or more"),
        (lambda g: g.outpaint(pictures(), (0, 3, 0, 0), [0, 1]), "19×16 .*not divisible by 4"),
        (lambda g: g.vary(pictures(), [0, 1], keep=1.0), r"keep 1.0 is out of range; allowed: 0"),
        (lambda g: g.vary(pictures(), [0, 1], keep=-0.1), "keep -0.1 is out of range"),
        (lambda g: g.vary(pictures(), [0, 1], keep=float("nan")), "keep nan is out of range"),
        (lambda g: g.vary(pictures(), [0, 1], seed=-1), "seed -1 is out of range"),
        (lambda g: g.vary(pictures(), [0, 1], seed=2**32), "seed 4294967296 is out of range"),
        (lambda g: g.vary(pictures(), [0, 1], order="x"), "order 'x' is unknown"),
    ],
)
def test_edits_that_cannot_be_made_are_refused_before_anything_is_generated(
    generator, monkeypatch, call, match
):
    def never(*args, **options):
        raise AssertionError("a program was made")

    monkeypatch.setattr(generation, "make_generate_fn", never)
    with pytest.raises(ValueError, match=match):
        call(generator)
