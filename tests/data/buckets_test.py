import numpy as np
import pytest

from maskgil_jax.data.arrays import ArraySource
from maskgil_jax.data.buckets import (
    Subset,
    area_buckets,
    check_bucket,
    choose_bucket,
    describe_buckets,
    kept_share,
    nearest_bucket,
    split_by_bucket,
)
from maskgil_jax.data.errors import ImageReadError


@pytest.mark.parametrize(("size", "count"), [(256, 25), (512, 49)])
def test_area_buckets_fill_the_area_within_the_ratio(size, count):
    buckets = area_buckets(size)
    assert len(buckets) == len(set(buckets)) == count
    assert (size, size) in buckets
    assert (size // 2, size * 2) in buckets
    assert {(width, height) for height, width in buckets} == set(buckets)
    for height, width in buckets:
        assert height % 32 == width % 32 == 0
        assert max(height, width) <= 4 * min(height, width)
        # Neither side can grow by a unit, but for the steps of the walk, where one can.
        assert height * width <= size**2 < (height + 32) * (width + 32)


def test_area_buckets_of_other_units():
    assert area_buckets(64, 64) == ((64, 64),)
    assert area_buckets(96, 32, max_ratio=1.0) == ((96, 96),)
    assert (64, 128) not in area_buckets(96, 16, max_ratio=1.9)
    for bad in [(100, 32), (0, 32), (32, 0), (-32, 32)]:
        with pytest.raises(ValueError, match="must be a positive multiple"):
            area_buckets(*bad)
    with pytest.raises(ValueError, match=r"max_ratio = 0.5"):
        area_buckets(256, max_ratio=0.5)


def test_an_image_goes_where_most_of_it_stays():
    buckets = area_buckets(256)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 2000, (200, 2)).tolist():
        # The window of a bucket's shape, in pixels of the image, over the image.
        shares = {
            (h, w): (scale := min(height / h, width / w)) ** 2 * h * w / (height * width)
            for h, w in buckets
        }
        chosen = choose_bucket((height, width), buckets)
        assert shares[chosen] == pytest.approx(max(shares.values()))
        assert kept_share((height, width), chosen) == pytest.approx(shares[chosen])
        assert scale > 0
    # Equal shapes: the larger.
    assert choose_bucket((70, 70), [(64, 64), (96, 96), (32, 32)]) == (96, 96)
    assert choose_bucket((10, 1000), buckets) == (128, 512)
    with pytest.raises(ValueError, match="0 buckets"):
        choose_bucket((4, 4), [])


def test_a_size_that_is_no_bucket_is_answered_with_the_nearest():
    buckets = area_buckets(256)
    check_bucket((256, 256), buckets)
    assert nearest_bucket((1024, 1024), buckets) == (256, 256)
    assert nearest_bucket((200, 320), buckets) == (192, 320)
    with pytest.raises(ValueError, match=r"size 500x130 .* nearest is 512x128; allowed: 128x384, "):
        check_bucket((500, 130), buckets)
    with pytest.raises(ValueError, match="size 0x256"):
        check_bucket((0, 256), buckets)


def make_source(sizes):
    class Sized(ArraySource):
        def image_size(self, index):
            return sizes[index]

    return Sized({"number": np.arange(len(sizes))}, name="sized")


def test_every_image_is_in_one_bucket():
    sizes = [(64, 64), (10, 40), (640, 641), (40, 10), (9, 10), (10, 44)]
    parts = split_by_bucket(make_source(sizes), area_buckets(64, 16))
    assert {size: part.indices.tolist() for size, part in parts.items()} == {
        (32, 128): [1, 5],
        (64, 64): [0, 2, 4],
        (128, 32): [3],
    }
    assert [int(parts[32, 128][i]["number"]) for i in range(2)] == [1, 5]
    assert parts[64, 64].name.startswith("sized 64x64 ")
    line = describe_buckets(parts, 2)
    assert line.startswith("6 images in 3 buckets, 32x128 to 128x32 pixels; 1 hold fewer than")
    assert line.endswith("a batch of 2 and repeat them in it: 128x32 (1)")
    assert describe_buckets(parts, 1) == "6 images in 3 buckets, 32x128 to 128x32 pixels"


def test_images_without_a_readable_header_go_into_the_fullest_bucket_if_kept():
    class Broken(ArraySource):
        def image_size(self, index):
            if index in broken:
                raise ImageReadError(f"{index} is broken")
            return (64, 64) if index else (32, 128)

    source, broken = Broken({"number": np.arange(5)}, name="broken"), {1, 4}
    with pytest.raises(ImageReadError, match="1 is broken"):
        split_by_bucket(source, [(64, 64), (32, 128)])
    parts = split_by_bucket(source, [(64, 64), (32, 128)], keep_unreadable=True)
    assert {size: part.indices.tolist() for size, part in parts.items()} == {
        (32, 128): [0],
        (64, 64): [1, 2, 3, 4],
    }
    broken |= set(range(5))
    with pytest.raises(ImageReadError, match="all 5 images of broken"):
        split_by_bucket(source, [(64, 64)], keep_unreadable=True)


def test_what_cannot_be_split_is_refused():
    plain = ArraySource({"number": np.arange(3)}, name="plain")
    with pytest.raises(ValueError, match="plain does not tell the sizes"):
        split_by_bucket(plain, [(8, 8)])
    with pytest.raises(ValueError, match="record 3 of plain; it has 3"):
        Subset(plain, [0, 3], "x")


def test_the_name_of_a_subset_tells_its_records():
    plain = ArraySource({"number": np.arange(3)}, name="plain")
    assert Subset(plain, [0, 1], "x").name != Subset(plain, [0, 2], "x").name
    assert Subset(plain, [0, 1], "x").name == Subset(plain, np.array([0, 1]), "x").name
    with pytest.raises(IndexError):
        Subset(plain, [0, 1], "x")[2]
