import numpy as np
import pytest

from maskgil_jax.data.transforms import (
    CenterCrop,
    Chain,
    PickCaption,
    PickFeatures,
    RandomAffine,
    RandomCrop,
    RandomFlip,
    ResizedRandomCrop,
    ToFloat,
    center_crop,
    warp_affine,
)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)


def apply(transform, image, seed=0):
    record = {"image": image, "label": np.array(3)}
    return transform(record, np.random.default_rng(seed))["image"]


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (100, 37), (5, 9), (64, 16), (33, 31)])
def test_center_crop_gives_the_size(shape):
    noise = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    assert apply(CenterCrop(size=16), noise).shape == (16, 16, 3)


def test_center_crop_keeps_the_middle_untouched_where_no_resize_is_needed():
    noise = np.random.default_rng(2).integers(0, 256, (16, 31, 3), np.uint8)
    np.testing.assert_array_equal(center_crop(noise, 16), noise[:, 7:23])


def test_center_crop_halves_by_boxes_first():
    # 4x4 pixels to 1x1: two rounds of 2x2 means; a single bicubic resize would weigh the middle.
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, 0] = 160
    assert center_crop(pixels, 1).ravel().tolist() == [10, 10, 10]


def test_resized_random_crop_holds_most_of_the_shorter_side():
    # Columns are numbered, so a crop tells how much of the width it holds, and where.
    wide = np.broadcast_to(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], (100, 100, 3))
    crops = [apply(ResizedRandomCrop(size=40), wide, seed).astype(int) for seed in range(200)]
    assert {crop.shape for crop in crops} == {(40, 40, 3)}
    shares = np.array([(crop[0, -1, 0] - crop[0, 0, 0]) / 200 for crop in crops])
    assert 0.76 <= shares.min() < 0.8 < 0.95 < shares.max() <= 1
    starts = np.array([crop[0, 0, 0] for crop in crops])
    assert starts.min() <= 2
    assert starts.max() >= 30
    whole = apply(ResizedRandomCrop(size=40, min_share=1.0), wide, 0)
    np.testing.assert_array_equal(whole, center_crop(wide, 40))
    with pytest.raises(ValueError, match="min_share = 0.0"):
        ResizedRandomCrop(size=40, min_share=0.0)


def test_random_crop_is_a_window_at_every_place_alike(image):
    windows = {image[i : i + 10, j : j + 11].tobytes(): (i, j) for i in range(3) for j in range(2)}
    crops = [apply(RandomCrop(size=(10, 11)), image, seed) for seed in range(300)]
    places = [windows[crop.tobytes()] for crop in crops]
    counts = [places.count(place) for place in windows.values()]
    assert min(counts) > 25  # 50 of each expected
    np.testing.assert_array_equal(apply(RandomCrop(size=(12, 12)), image), image)
    with pytest.raises(ValueError, match="12x12 pixels is smaller than the crop 12x13"):
        apply(RandomCrop(size=(12, 13)), image)


def test_random_crop_draws_as_much_from_images_of_any_size(image):
    left = []
    for size in ((12, 12), (1, 1), (5, 12)):
        rng = np.random.default_rng(3)
        RandomCrop(size=size)({"image": image}, rng)
        left.append(rng.random())
    assert len(set(left)) == 1


def test_flip_mirrors_left_to_right_about_as_often_as_asked(image):
    np.testing.assert_array_equal(apply(RandomFlip(probability=1.0), image), image[:, ::-1])
    np.testing.assert_array_equal(apply(RandomFlip(probability=0.0), image), image)
    flips = [(apply(RandomFlip(), image, seed) != image).any() for seed in range(200)]
    assert 70 < sum(flips) < 130


def test_warp_of_nothing_changes_nothing(image):
    same = warp_affine(image, shift_px=(0.0, 0.0), rotation_deg=0.0, scale=1.0, fill=9)
    np.testing.assert_array_equal(same, image)
    np.testing.assert_array_equal(apply(RandomAffine(), image), image)


def test_warp_shifts_down_and_right_and_fills(image):
    moved = warp_affine(image, shift_px=(2.0, -3.0), rotation_deg=0.0, scale=1.0, fill=9)
    np.testing.assert_array_equal(moved[2:, :-3], image[:-2, 3:])
    assert (moved[:2] == 9).all()
    assert (moved[:, -3:] == 9).all()


def test_warp_turns_counter_clockwise_about_the_centre(image):
    turned = warp_affine(image, shift_px=(0.0, 0.0), rotation_deg=90.0, scale=1.0, fill=0)
    # Pillow cuts fractions off where it interpolates, hence the one level.
    np.testing.assert_allclose(turned[1:-1, 1:-1], np.rot90(image)[1:-1, 1:-1], atol=1)


def test_warp_scales_about_the_centre():
    square = np.zeros((12, 12, 3), np.uint8)
    square[4:8, 4:8] = 200
    wide = warp_affine(square, shift_px=(0.0, 0.0), rotation_deg=0.0, scale=2.0, fill=0)
    assert (wide[3:9, 3:9] > 150).all()
    assert (wide[0] < 50).all()


def test_affine_draws_from_its_generator_within_its_bounds(image):
    shake = RandomAffine(max_shift_px=2.0, max_rotation_deg=10.0, scale_range=(0.9, 1.1))
    np.testing.assert_array_equal(apply(shake, image, 5), apply(shake, image, 5))
    assert (apply(shake, image, 5) != apply(shake, image, 6)).any()

    spot = np.zeros((33, 33, 3), np.uint8)
    spot[16, 16] = 255
    shifts = [apply(RandomAffine(max_shift_px=3.0), spot, seed)[..., 0] for seed in range(50)]
    places = np.array([np.unravel_index(s.argmax(), s.shape) for s in shifts]) - 16
    assert np.abs(places).max() == 3
    assert places.min(0).tolist() == [-3, -3]
    assert places.max(0).tolist() == [3, 3]


def test_to_float_covers_minus_one_to_one():
    values = apply(ToFloat(), np.array([0, 127, 255], np.uint8).reshape(1, 1, 3))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values.ravel(), [-1, 127 / 127.5 - 1, 1], atol=1e-7)


def test_chain_runs_in_order_and_leaves_the_record_alone(image):
    image.setflags(write=False)
    record = {"image": image, "label": np.array(3)}
    chain = Chain(transforms=(CenterCrop(size=8), RandomFlip(probability=1.0), ToFloat()))
    result = chain(record, np.random.default_rng(0))
    expected = center_crop(image, 8)[:, ::-1] / np.float32(127.5) - 1
    np.testing.assert_allclose(result["image"], expected, atol=1e-6)
    assert result["label"] == 3
    assert record["image"] is image


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: CenterCrop(size=0), "size = 0"),
        (lambda: RandomCrop(size=(4, 0)), r"size = \(4, 0\)"),
        (lambda: RandomFlip(probability=1.5), "probability = 1.5"),
        (lambda: RandomAffine(max_shift_px=-1.0), "max_shift_px = -1.0"),
        (lambda: RandomAffine(max_rotation_deg=float("nan")), "max_rotation_deg = nan"),
        (lambda: RandomAffine(scale_range=(1.2, 0.8)), "scale_range"),
        (lambda: RandomAffine(scale_range=(0.0, 1.0)), "scale_range"),
        (lambda: RandomAffine(fill=256), "fill = 256"),
    ],
)
def test_values_out_of_range_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("crop", [CenterCrop, ResizedRandomCrop])
@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (100, 37), (5, 9), (64, 16), (33, 31)])
def test_crops_are_of_any_shape(crop, shape):
    noise = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    for size in [(16, 48), (24, 8), (16, 16)]:
        for seed in range(5):
            assert apply(crop(size=size), noise, seed).shape == (*size, 3)
    np.testing.assert_array_equal(
        apply(crop(size=(16, 16)), noise, 3), apply(crop(size=16), noise, 3)
    )
    with pytest.raises(ValueError, match=r"size = \(16, 0\)"):
        crop(size=(16, 0))


def test_a_crop_of_another_shape_is_the_middle_of_the_image():
    noise = np.random.default_rng(2).integers(0, 256, (16, 31, 3), np.uint8)
    np.testing.assert_array_equal(center_crop(noise, (8, 31)), noise[4:12])
    np.testing.assert_array_equal(center_crop(noise, (16, 21)), noise[:, 5:26])


def test_a_random_window_of_a_bucket_holds_most_of_what_fits():
    wide = np.broadcast_to(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], (100, 100, 3))
    crops = [apply(ResizedRandomCrop(size=(20, 40)), wide, s).astype(int) for s in range(200)]
    shares = np.array([(crop[0, -1, 0] - crop[0, 0, 0]) / 200 for crop in crops])
    assert 0.74 <= shares.min() < 0.8 < 0.95 < shares.max() <= 1


def test_stored_features_are_of_the_text_that_would_be_drawn():
    texts = np.array(["a", "bb", "ccc"])
    features = tuple(np.full((len(text), 2), len(text), np.float32) for text in texts)
    record = {"tokens": np.zeros((1, 1)), "caption": texts, "features": features}
    drawn = set()
    for seed in range(30):
        one, other = np.random.default_rng(seed), np.random.default_rng(seed)
        text = PickCaption()(record, one)["caption"]
        found = PickFeatures(length=4)(record, other)
        assert one.random() == other.random()
        assert found.keys() == {"tokens", "caption", "caption_length"}
        length = int(found["caption_length"])
        assert (length, found["caption_length"].dtype) == (len(text), np.int32)
        assert found["caption"].shape == (4, 2)
        assert (found["caption"][:length] == length).all()
        assert not found["caption"][length:].any()
        drawn.add(length)
    assert drawn == {1, 2, 3}
