import numpy as np
import pytest

from maskgil_jax.data.crops import Crops
from maskgil_jax.data.transforms import center_crop

# Every pixel says where it is: red the row, green the column.
ROWS, COLUMNS = np.mgrid[:12, :12].astype(np.uint8)
IMAGE = np.stack([ROWS, COLUMNS, np.zeros_like(ROWS)], axis=-1)


def corner(view):
    return tuple(int(x) for x in view[0, 0, :2])


def test_one_square_and_its_mirror_image():
    image = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    crops = Crops(kind="center_flip", size=16)
    views = crops(image)
    assert crops.names == ("center", "center_flip")
    np.testing.assert_array_equal(views[0], center_crop(image, 16))
    np.testing.assert_array_equal(views[1], views[0][:, ::-1])
    alone = Crops(kind="center", size=16)
    assert alone.names == ("center",)
    np.testing.assert_array_equal(alone(image), views[:1])


def test_ten_crops_are_corners_and_centre_of_a_larger_square_and_of_its_mirror_image():
    # 1.2 × 10 = 12 pixels: nothing is resized, so that every view says where it was cut.
    crops = Crops(kind="ten_crop", size=10, scales=(1.2,))
    views = crops(IMAGE)
    assert views.shape == (10, 10, 10, 3)
    assert crops.names[:5] == tuple(
        f"{place}@1.2"
        for place in ("top_left", "top_right", "bottom_left", "bottom_right", "center")
    )
    assert crops.names[5] == "top_left_flip@1.2"
    assert [corner(view) for view in views[:5]] == [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]
    assert [corner(view) for view in views[5:]] == [(0, 11), (0, 9), (2, 11), (2, 9), (1, 10)]
    # The columns of a mirrored view run backwards.
    assert corner(views[5][:, 1:]) == (0, 10)


def test_a_centre_between_two_pixels_is_rounded_as_torchvision_does():
    for scale, middle in ((1.1, 0), (1.3, 2)):  # half of 1 and of 3 pixels
        side = int(10 * scale)
        views = Crops(kind="ten_crop", size=10, scales=(scale,))(IMAGE[:side, :side])
        assert corner(views[4]) == (middle, middle)


def test_scales_follow_each_other_and_round_down():
    crops = Crops(kind="ten_crop", size=256, scales=(1.1, 1.05))
    image = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    views = crops(image)
    assert len(views) == len(set(crops.names)) == 20
    np.testing.assert_array_equal(views[3], center_crop(image, 281)[-256:, -256:])
    np.testing.assert_array_equal(views[13], center_crop(image, 268)[-256:, -256:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kind": "tencrop"},
            "crops 'tencrop' are unknown; allowed: center, center_flip, ten_crop",
        ),
        ({"size": 0}, "size = 0"),
        ({"scales": (1.1,)}, r"crop scales \[1.1\] with crops 'center'"),
        ({"kind": "ten_crop"}, r"crop scales \[\] with crops 'ten_crop'"),
        ({"kind": "ten_crop", "scales": (0.9,)}, "must be more than 1"),
        ({"kind": "ten_crop", "scales": (float("nan"),)}, "must be more than 1"),
        ({"kind": "ten_crop", "scales": (1.01,)}, r"squares of \[16\].*would be the same"),
        ({"kind": "ten_crop", "scales": (1.1, 1.12)}, r"squares of \[17, 17\]"),
    ],
)
def test_bad_crops_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Crops(**{"kind": "center", "size": 16} | fields)


def test_views_of_any_shape_are_the_middle_and_its_mirror_image():
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    views = Crops(kind="center_flip", size=(8, 24))(image)
    assert views.shape == (2, 8, 24, 3)
    np.testing.assert_array_equal(views[0], center_crop(image, (8, 24)))
    np.testing.assert_array_equal(views[1], views[0][:, ::-1])
    square = Crops(kind="ten_crop", size=(16, 16), scales=(1.25,))(image)
    np.testing.assert_array_equal(square, Crops(kind="ten_crop", size=16, scales=(1.25,))(image))
    with pytest.raises(ValueError, match=r"'ten_crop' are squares, not \(8, 24\)"):
        Crops(kind="ten_crop", size=(8, 24), scales=(1.25,))
    with pytest.raises(ValueError, match=r"size = \(8, 0\)"):
        Crops(kind="center", size=(8, 0))
