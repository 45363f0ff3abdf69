"""Pictures as people have them, and edits that cannot be meant."""

import json

import numpy as np
import pytest
from PIL import Image

from maskgil_jax.photo_edit import read_edit

RGB = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
GREY = RGB[..., 0]


def save(path, image):
    image.save(path)
    return path


@pytest.fixture
def photo(tmp_path):
    return save(tmp_path / "photo.png", Image.fromarray(RGB))


@pytest.fixture
def mask(tmp_path):
    pixels = np.zeros((8, 12), np.uint8)
    pixels[2:5, 3:9] = 255
    return save(tmp_path / "mask.png", Image.fromarray(pixels))


def repeated(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=-1)


def over_white(alpha):
    flat = (RGB * (alpha / 255) + 255 * (1 - alpha / 255)).round()
    return flat.astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("rgb.png", Image.fromarray(RGB), RGB),
        ("grey.png", Image.fromarray(GREY), repeated(GREY)),
        ("deep.png", Image.fromarray(GREY.astype(np.uint16) * 257), repeated(GREY)),
        ("bits.png", Image.fromarray(GREY > 99), repeated((GREY > 99) * np.uint8(255))),
        ("clear.png", Image.fromarray(np.dstack([RGB, GREY])), over_white(GREY[..., None])),
        ("palette.png", Image.fromarray(GREY).convert("P"), repeated(GREY)),
        ("print.tiff", Image.fromarray(RGB).convert("CMYK"), RGB),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_pictures_of_all_kinds_become_rgb(tmp_path, name, image, expected):
    edit = read_edit(save(tmp_path / name, image), vary=0.5)
    assert (edit.photo.dtype, edit.photo.shape) == (np.uint8, (8, 12, 3))
    assert np.abs(edit.photo.astype(int) - expected).max() <= 1


def test_pictures_of_a_camera_are_turned_upright(tmp_path, mask):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned right by 90°
    for name, image in (("photo", Image.fromarray(RGB)), ("mask", Image.open(mask))):
        image.save(tmp_path / f"turned_{name}.png", exif=exif)
    edit = read_edit(tmp_path / "turned_photo.png", tmp_path / "turned_mask.png")
    np.testing.assert_array_equal(edit.photo, np.rot90(RGB, -1))
    assert edit.mask[3:9, 3:6].all()
    assert edit.mask.sum() == 18


def test_white_is_generated_from_128_on(tmp_path, photo):
    grey = np.zeros((8, 12), np.uint8)
    grey[0, :4] = (127, 128, 200, 255)
    edit = read_edit(photo, save(tmp_path / "m.png", Image.fromarray(grey)))
    assert np.argwhere(edit.mask).tolist() == [[0, 1], [0, 2], [0, 3]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.png", "cut", "truncated"),
        ("text.png", b"no picture", "no known image format"),
        ("missing.png", None, "No such file"),
        ("float.tiff", Image.fromarray(RGB[..., 0].astype(np.float32)), "mode F has no known"),
    ],
)
@pytest.mark.parametrize("flag", ["--edit", "--mask"])
def test_unreadable_files_are_named_in_one_line(tmp_path, photo, flag, name, content, message):
    path = tmp_path / name
    if isinstance(content, Image.Image):
        content.save(path)
    elif content is not None:
        path.write_bytes(photo.read_bytes()[:-60] if content == "cut" else content)
    with pytest.raises(ValueError, match=message) as caught:
        read_edit(*((path, photo) if flag == "--edit" else (photo, path)))
    assert str(caught.value).startswith(f"{flag} {path}: ")
    assert "\n" not in str(caught.value)


def test_a_mask_must_be_opaque_and_of_the_pictures_size(tmp_path, photo, mask):
    clear = save(tmp_path / "clear.png", Image.fromarray(np.dstack([RGB, GREY])))
    with pytest.raises(ValueError, match="transparent; save it in black and white"):
        read_edit(photo, clear)
    small = save(tmp_path / "small.png", Image.open(mask).resize((6, 8)))
    with pytest.raises(ValueError, match="--mask has 8×6 pixels, but --edit 8×12; give a mask of"):
        read_edit(photo, small)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has none of --mask, --outpaint and --vary; give one"),
        ({"vary": 0.5, "outpaint": (4, 0, 0, 0)}, "has 2 of --mask"),
        ({"vary": 0.5, "grow": 1}, "--grow and --feather need a mask"),
        ({"vary": 0.5, "feather": 0.0}, "--grow and --feather need a mask"),
        ({"photo": None, "mask": "mask.png"}, "--mask mask.png needs a picture"),
        ({"photo": None, "feather": 0.0}, "--feather 0.0 needs a picture"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(photo, fields, message):
    with pytest.raises(ValueError, match=message):
        read_edit(**{"photo": photo} | fields)


def test_no_picture_is_no_edit():
    assert read_edit(None, outpaint=None, vary=None, grow=None, feather=None) is None


def test_settings_tell_edits_apart(photo, mask):
    edits = [
        read_edit(photo, mask),
        read_edit(photo, mask, grow=1),
        read_edit(mask, mask),
        read_edit(photo, outpaint=(0, 4, 0, 4)),
        read_edit(photo, outpaint=(4, 0, 0, 4)),
    ]
    assert len({json.dumps(edit.settings) for edit in edits}) == len(edits)
    assert [edit.size for edit in edits] == [(8, 12)] * 3 + [(12, 16)] * 2
