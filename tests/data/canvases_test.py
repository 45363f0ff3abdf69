import collections
import dataclasses

import numpy as np
import pytest

from maskgil_jax.data.canvases import (
    CELL_PX,
    COLOURS,
    DIGIT_PX,
    SIZES,
    CanvasSource,
    Scene,
    SceneObject,
    draw_digits,
    draw_scene,
)
from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.data.pipeline import make_loader

COUNT = 200


@pytest.fixture(scope="module")
def canvases():
    source = CanvasSource("train")
    return [source.draw(index) for index in range(COUNT)]


def test_records_are_a_function_of_seed_split_and_index():
    source = CanvasSource("train")
    for index in (0, 7, len(source) - 1):
        again = CanvasSource("train")[np.int64(index)]
        np.testing.assert_array_equal(source[index]["image"], again["image"])
        assert again["label"] == source[index]["label"]
    others = (CanvasSource("test", (64, 64)), CanvasSource("train", (64, 64), seed=1))
    first = CanvasSource("train", (64, 64))
    for other in others:
        assert (other[3]["image"] != first[3]["image"]).any()
        assert other.name != first.name
    assert (first[3]["image"] != first[4]["image"]).any()
    # Not the same arrangements with other digits either.
    colours = [[o.colour for i in range(9) for o in s.draw(i)[1].objects] for s in (first, *others)]
    assert len({tuple(names) for names in colours}) == 3


def test_records_are_images_and_counts(canvases):
    source = CanvasSource("train")
    assert (len(source), source.num_classes) == (1_000_000, 3)
    for index, (image, scene) in enumerate(canvases[:20]):
        record = source[index]
        np.testing.assert_array_equal(record["image"], image)
        assert (image.dtype, image.shape) == (np.uint8, (*scene.size, 3))
        assert (record["label"].dtype, record["label"].shape) == (np.int32, ())
        assert record["label"] == len(scene.objects) - 1
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match="allowed 0..999999"):
            source[index]


def test_all_sizes_counts_digits_and_colours_occur(canvases):
    sizes = collections.Counter(scene.size for _, scene in canvases)
    assert set(sizes) == set(SIZES)
    assert min(sizes.values()) > COUNT / len(SIZES) / 3
    counts = collections.Counter(len(scene.objects) for _, scene in canvases)
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) > COUNT / 3 / 2
    objects = [o for _, scene in canvases for o in scene.objects]
    assert {o.digit for o in objects} == set(range(10))
    assert {o.colour for o in objects} == set(COLOURS)
    alike = [len({o.digit for o in s.objects}) == 1 for _, s in canvases if len(s.objects) > 1]
    assert 0.2 < np.mean(alike) < 0.5  # 0.3 by intent, the rest of the many that are drawn freely


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_are_those_of_the_split(split):
    labels = digits_arrays(split)[1]
    source = CanvasSource(split, (64, 128))
    for index in range(30):
        for o in source.draw(index)[1].objects:
            assert o.digit == labels[o.row]
    with_rows = {o.row for i in range(30) for o in source.draw(i)[1].objects}
    assert len(with_rows) > 30


@pytest.mark.parametrize("split", ["train", "test"])
def test_ink_is_that_of_the_named_scan_of_the_split(split):
    """Its own scan, as small and in its place in the cell, is more like it than all others."""
    scans = digits_arrays(split)[0][..., 0].astype(float)
    source = CanvasSource(split, (64, 64))
    place = np.linspace(0, 31, DIGIT_PX).round().astype(int)
    known = scans[:, place][:, :, place].reshape(len(scans), -1)
    margin = (CELL_PX - DIGIT_PX) // 2
    for index in range(20):
        image, scene = source.draw(index)
        for o in scene.objects:
            top, left = (side // CELL_PX * CELL_PX + margin for side in o.box[:2])
            found = (
                image[top : top + DIGIT_PX, left : left + DIGIT_PX].max(-1).ravel().astype(float)
            )
            likeness = [np.corrcoef(found, other)[0, 1] for other in known]
            assert np.sum(np.array(likeness) > likeness[o.row]) <= 1


def test_every_digit_has_a_cell_of_its_own(canvases):
    places = collections.Counter()
    for _, scene in canvases:
        cells = [tuple(np.array(o.box[:2]) // CELL_PX) for o in scene.objects]
        assert len(set(cells)) == len(cells)
        for o, cell in zip(scene.objects, cells, strict=True):
            assert tuple((np.array(o.box[2:]) - 1) // CELL_PX) == cell
            if scene.size == (64, 96):
                places[cell] += 1
    assert len(places) == 6


def test_boxes_hold_all_ink_tightly_and_keep_apart(canvases):
    for image, scene in canvases:
        rest = image.copy()
        for o in scene.objects:
            top, left, bottom, right = o.box
            assert 0 <= top < bottom <= scene.size[0]
            assert 0 <= left < right <= scene.size[1]
            ink = image[top:bottom, left:right].max(-1) > 0
            assert all(edge.any() for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))
            assert (bottom - top, right - left) <= (DIGIT_PX, DIGIT_PX)
            assert bottom - top >= DIGIT_PX / 2
            assert o.position == ((top + bottom) / 2, (left + right) / 2)
            rest[top:bottom, left:right] = 0
        assert not rest.any()
        for a in scene.objects:
            for b in scene.objects:
                if a is not b:
                    down = max(a.box[0] - b.box[2], b.box[0] - a.box[2])
                    across = max(a.box[1] - b.box[3], b.box[1] - a.box[3])
                    assert max(down, across) >= CELL_PX - DIGIT_PX


def test_colours_are_the_named_ones_at_full_ink_and_darker_at_edges(canvases):
    for image, scene in canvases:
        for o in scene.objects:
            top, left, bottom, right = o.box
            pixels = image[top:bottom, left:right].reshape(-1, 3).astype(float)
            colour = np.array(COLOURS[o.colour])
            assert (pixels == colour).all(-1).mean() > 0.05
            ink = pixels.max(-1, keepdims=True) / 255
            # Both are rounded to whole levels.
            assert np.abs(pixels - ink * colour).max() <= 1


def test_colours_are_far_apart():
    directions = np.array(list(COLOURS.values()), float)
    assert (directions.max(-1) == 255).all()
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    angles = np.degrees(np.arccos((directions @ directions.T).clip(-1, 1)))
    assert angles[~np.eye(len(angles), dtype=bool)].min() > 15


def make_object(box):
    return SceneObject(digit=1, colour="red", box=box, row=0)


def test_relations_hold_when_nothing_reaches_over():
    left, right = make_object((0, 0, 10, 10)), make_object((5, 10, 15, 20))
    assert left.is_left_of(right)
    assert not right.is_left_of(left)
    assert not left.is_above(right)
    low = make_object((10, 4, 20, 12))
    assert left.is_above(low)
    assert not low.is_above(left)
    assert not left.is_left_of(low)
    assert not low.is_left_of(left)


def test_any_two_of_a_scene_are_related(canvases):
    for _, scene in canvases:
        for i, a in enumerate(scene.objects):
            for b in scene.objects[i + 1 :]:
                relations = (a.is_left_of(b), b.is_left_of(a), a.is_above(b), b.is_above(a))
                assert 1 <= sum(relations) <= 2


def test_scenes_can_be_compared_and_kept_in_sets():
    rng = np.random.default_rng
    scene = draw_scene(rng(5), "test", (64, 128))[1]
    assert scene == draw_scene(rng(5), "test", (64, 128))[1]
    assert scene.size == (64, 128)
    assert len({scene, Scene(size=scene.size, objects=scene.objects)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        scene.size = (64, 64)


def test_canvases_of_one_size_fill_a_batch():
    source = CanvasSource("train", (64, 96))
    batch = next(make_loader(source, batch_size=8, seed=0, num_threads=0))
    assert batch["image"].shape == (8, 64, 96, 3)
    assert batch["label"].shape == (8,)


@pytest.mark.parametrize("size", [(64, 80), (32, 64), (64, 160), (0, 0)])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="canvas size .* multiples of 32 from 64 to 128"):
        CanvasSource("train", size)
    with pytest.raises(ValueError, match="canvas size"):
        draw_scene(np.random.default_rng(0), "train", size)


def test_other_splits_and_seeds_are_refused():
    with pytest.raises(ValueError, match=r"'val'.*'train', 'test'"):
        CanvasSource("val")
    with pytest.raises(ValueError, match=r"'val'.*'train', 'test'"):
        draw_scene(np.random.default_rng(0), "val", (64, 64))
    with pytest.raises(ValueError, match="seed = -1"):
        CanvasSource("train", seed=-1)


def test_given_digits_are_drawn_in_given_colours():
    rng = np.random.default_rng(0)
    image, scene = draw_digits(rng, "test", (64, 64), [7, 7, 0], ["red", "blue", "red"])
    assert [(o.digit, o.colour) for o in scene.objects] == [(7, "red"), (7, "blue"), (0, "red")]
    assert image.shape == (64, 64, 3)
    labels = digits_arrays("test")[1]
    for o in scene.objects:
        assert labels[o.row] == o.digit
        top, left, bottom, right = o.box
        assert (image[top:bottom, left:right] == COLOURS[o.colour]).all(-1).any()


@pytest.mark.parametrize(
    ("digits", "colours", "match"),
    [
        ([], [], "0 digits and 0 colours; allowed: 1 to 3"),
        ([1] * 4, ["red"] * 4, "4 digits"),
        ([1, 2], ["red"], "2 digits and 1 colours"),
        ([10], ["red"], "digit 10 in 'red'; allowed: 0..9"),
        ([1], ["mauve"], "'mauve'; allowed: .*red, yellow"),
    ],
)
def test_digits_and_colours_that_there_are_not_are_refused(digits, colours, match):
    with pytest.raises(ValueError, match=match):
        draw_digits(np.random.default_rng(0), "test", (64, 64), digits, colours)
