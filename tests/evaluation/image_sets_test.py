"""Images come as they are, or are refused with what to do about it."""

import os
import re

import numpy as np
import pytest
from fake_evaluation import make_pixels
from PIL import Image

from maskgil_jax.data.images import decode_rgb
from maskgil_jax.data.transforms import center_crop
from maskgil_jax.evaluation.image_sets import (
    SourceImages,
    describe_labels,
    draw_labels,
    open_images,
)


def save(path, mode="RGB", size=(6, 8), seed=0):
    rng = np.random.default_rng(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = rng.integers(0, 256, (size[1], size[0], bands), np.uint8)
    picture = Image.frombytes(mode, size, pixels.tobytes())
    picture.save(path)
    return pixels


def test_an_npz_is_read_piece_by_piece_in_any_order(tmp_path):
    pixels, labels = make_pixels(700, shape=(3, 2, 3)), np.arange(700)
    for save_as in (np.savez, np.savez_compressed):
        save_as(tmp_path / "x.npz", pixels, labels=labels)
        images = open_images(tmp_path / "x.npz", labelled=True)
        assert (len(images), images.image_shape) == (700, (3, 2, 3))
        np.testing.assert_array_equal(images.labels, labels)
        for first, stop in ((0, 3), (3, 5), (600, 700), (4, 6), (699, 700)):
            np.testing.assert_array_equal(images.read(first, stop), pixels[first:stop])


def test_only_pixels_are_taken_from_an_npz(tmp_path):
    good = make_pixels(3)
    cases = [
        ({"arr_0": good / 127.5 - 1}, "is float64; expected uint8 pixels, 0 to 255; of images in"),
        ({"arr_0": good.astype(np.int64)}, "is int64; expected uint8 pixels, 0 to 255$"),
        ({"arr_0": good.transpose(0, 3, 1, 2)}, "the channels come first: transpose(0, 2, 3, 1)"),
        ({"arr_0": good[..., :1]}, "greyscale is not converted here: repeat the channel"),
        ({"arr_0": good[..., 0]}, "greyscale is not converted here"),
        ({"arr_0": make_pixels(2, shape=(8, 6, 4))}, "four channels are not converted here"),
        ({"arr_0": good[:0]}, "has shape (0, 8, 6, 3); expected [n H W 3]"),
        ({"arr_0": np.asfortranarray(good)}, "column by column; save it in C order"),
        ({"images": good}, "holds images and no arr_0"),
        ({"arr_0": good, "labels": np.arange(2)}, "expected one integer for each of its 3 images"),
        ({"arr_0": good, "labels": np.zeros(3)}, "type float64; expected one integer for each"),
    ]
    for number, (arrays, message) in enumerate(cases):
        path = tmp_path / f"{number}.npz"
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message if "$" in message else re.escape(message)):
            open_images(path, labelled=True)


def test_classes_are_read_as_adm_writes_them_too(tmp_path):
    pixels = make_pixels(3)
    np.savez(tmp_path / "x.npz", pixels, [4, 5, 4])
    assert open_images(tmp_path / "x.npz", labelled=True).labels.tolist() == [4, 5, 4]
    np.savez(tmp_path / "y.npz", pixels, [4, 5, 4], labels=[1, 2, 3])
    assert open_images(tmp_path / "y.npz", labelled=True).labels.tolist() == [1, 2, 3]
    np.savez(tmp_path / "z.npz", pixels, pixels)
    with pytest.raises(ValueError, match="arr_1 of .*, the classes, has shape .* leave it out"):
        open_images(tmp_path / "z.npz", labelled=True)
    assert open_images(tmp_path / "z.npz").labels is None


def test_classes_are_counted():
    assert describe_labels(np.array([5, 1, 1, 5])) == "balanced (2 of each of 2 classes)"
    assert describe_labels(np.array([5, 1, 1, 5, 5])) == "uneven (2 to 3 of each of 2 classes)"
    assert describe_labels(None) == "unknown"


def test_damage_of_an_npz_is_seen(tmp_path):
    np.savez(tmp_path / "x.npz", make_pixels(50))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[3000] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    images = open_images(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="is damaged: Bad CRC-32"):
        images.read(0, 50)
    data[data.index(b"PK\1\2") + 8] ^= 1
    (tmp_path / "y.npz").write_bytes(data)
    with pytest.raises(ValueError, match="arr_0 of .* cannot be read: .*password required"):
        open_images(tmp_path / "y.npz")
    (tmp_path / "y.npz").write_bytes(data[:3000])
    with pytest.raises(ValueError, match="cannot be read as an .npz .* it is incomplete"):
        open_images(tmp_path / "y.npz")
    central = data.index(b"PK\x01\x02")
    data[central + 6] = 255  # the version that is needed to extract it
    (tmp_path / "y.npz").write_bytes(data)
    with pytest.raises(ValueError, match="cannot be read as an .npz .*version"):
        open_images(tmp_path / "y.npz")
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        open_images(tmp_path / "z.npz")
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no FILE.npz; allowed: an .npz of images, or a folder"):
        open_images(tmp_path / "x.png")


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "b").mkdir()
    expected = [save(tmp_path / "a_label3.png", seed=1), save(tmp_path / "b" / "a_label0.png")]
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no picture")
    images = open_images(tmp_path)
    np.testing.assert_array_equal(images.read(0, 2), expected)
    assert images.labels.tolist() == [3, 0]
    save(tmp_path / "plain.png")
    assert open_images(tmp_path).labels is None
    assert open_images(tmp_path).settings != images.settings


def test_a_folder_is_known_by_the_contents_of_its_files(tmp_path):
    for name in "ab":
        save(tmp_path / f"{name}.bmp", seed=1)
    settings = open_images(tmp_path).settings
    os.utime(tmp_path / "a.bmp", ns=(0, 0))  # as after a copy
    assert open_images(tmp_path).settings == settings
    size = (tmp_path / "b.bmp").stat().st_size
    save(tmp_path / "b.bmp", seed=2)
    assert (tmp_path / "b.bmp").stat().st_size == size
    assert open_images(tmp_path).settings != settings
    save(tmp_path / "b.bmp", seed=1)
    assert open_images(tmp_path).settings == settings
    (tmp_path / "b.bmp").rename(tmp_path / "c.bmp")
    assert open_images(tmp_path).settings != settings


class Source:
    """A split of two pictures in one file."""

    name = "pictures/test"

    def __init__(self, folder):
        self.files = (folder / "a.records",)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"image": np.full((4, 5, 3), index, np.uint8)}


def test_a_split_is_known_by_the_contents_of_its_files(tmp_path):
    (tmp_path / "a.records").write_bytes(b"one")
    images = SourceImages(Source(tmp_path))
    assert images.read(0, 2).shape == (2, 4, 5, 3)
    assert (images.settings["name"], images.settings["images"]) == ("pictures/test", 2)
    assert SourceImages(Source(tmp_path)).settings == images.settings
    (tmp_path / "a.records").write_bytes(b"two")
    assert SourceImages(Source(tmp_path)).settings != images.settings


def test_a_folder_of_several_sizes_needs_a_crop(tmp_path):
    save(tmp_path / "a.png", size=(40, 30))
    whole = save(tmp_path / "b.png", size=(24, 50))
    with pytest.raises(
        ValueError, match="b.png has 50×24 pixels, the first image 30×40\n.* --image_size N"
    ):
        open_images(tmp_path)
    images = open_images(tmp_path, image_size=16)
    np.testing.assert_array_equal(images.read(1, 2)[0], center_crop(whole, 16))
    assert images.settings["crop"].startswith("shorter side to 16 (2×2 boxes, then bicubic)")


@pytest.mark.parametrize(
    ("mode", "name", "word"),
    [
        ("L", "a.png", "greyscale"),
        ("1", "a.png", "greyscale"),
        ("RGBA", "a.png", "transparent"),
        ("LA", "a.png", "transparent"),
        ("CMYK", "a.jpg", "CMYK"),
    ],
)
def test_other_colour_modes_are_converted_when_asked(tmp_path, mode, name, word):
    save(tmp_path / name, mode if mode != "1" else "L")
    if mode == "1":
        Image.open(tmp_path / name).convert("1").save(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is {word}, not RGB\n--convert_to_rgb"):
        open_images(tmp_path)
    images = open_images(tmp_path, convert=True)
    np.testing.assert_array_equal(images.read(0, 1)[0], decode_rgb(tmp_path / name))
    assert images.settings["convert_to_rgb"] is True


def test_unreadable_and_missing_pictures_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        open_images(tmp_path)
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="a.png cannot be read: its content is no known image"):
        open_images(tmp_path)
    save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot read image .*a.png: image file is truncated"):
        open_images(tmp_path)


def test_all_wrong_pictures_are_listed_at_once(tmp_path):
    for number in range(8):
        save(tmp_path / f"{number}.png", "L" if number > 1 else "RGB")
    save(tmp_path / "1.png", size=(5, 5))
    with pytest.raises(ValueError, match="cannot be taken") as caught:
        open_images(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"7 of the 8 images in {tmp_path} cannot be taken:"
    assert lines[1] == "  1.png has 5×5 pixels, the first image 8×6"
    assert lines[2:6] == [f"  {number}.png is greyscale, not RGB" for number in (2, 3, 4, 5)]
    assert lines[6] == "  and 2 more"
    assert "--convert_to_rgb" in lines[7]
    assert "--image_size N" in lines[7]


def test_an_npz_has_no_use_for_a_crop(tmp_path):
    np.savez(tmp_path / "x.npz", make_pixels(2))
    for options in ({"image_size": 8}, {"convert": True}):
        with pytest.raises(ValueError, match="are for folders"):
            open_images(tmp_path / "x.npz", **options)


def test_balanced_labels_alternate_and_random_ones_come_from_the_seed():
    assert draw_labels("balanced", 6, 3, 0).tolist() == [0, 1, 2, 0, 1, 2]
    one, same, other = (draw_labels("random", 1000, 10, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)
    assert np.bincount(one).min() > 50
    assert len(set(np.bincount(one).tolist())) > 1
    with pytest.raises(ValueError, match="no multiple of the model's 3 classes.* give 6, or"):
        draw_labels("balanced", 7, 3, 0)
