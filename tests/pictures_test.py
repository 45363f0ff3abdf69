import os

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maskgil_jax.pictures import make_grid, save_png, to_uint8


def test_pixels_are_rounded_and_clipped_never_stretched():
    values = np.array([-1.5, -1.0, 0.0, 0.003, 0.5, 1.0, 7.0], np.float32)
    assert to_uint8(values).tolist() == [0, 0, 128, 128, 191, 255, 255]
    flat = np.full((2, 4, 4, 3), 0.1, np.float32)
    assert (to_uint8(flat) == 140).all()


def test_pixels_survive_the_way_to_floats_and_back():
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(pixels / 127.5 - 1), pixels)


def test_device_arrays_of_any_float_are_taken():
    assert to_uint8(jnp.array([[-1.0, 1.0]], jnp.bfloat16)).tolist() == [[0, 255]]


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (np.zeros((1, 2), np.uint8), "images are uint8"),
        (np.array([0.0, np.nan, np.inf]), "2 of 3 pixel values"),
    ],
)
def test_unusable_floats_are_refused(images, match):
    with pytest.raises(ValueError, match=match):
        to_uint8(images)


def test_grid_lays_out_row_by_row():
    images = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)])
    grid = make_grid(images, columns=2, padding=1)
    assert grid.shape == (1 + 2 * 3, 1 + 2 * 4, 3)
    assert (grid[1:3, 1:4] == 10).all()
    assert (grid[1:3, 5:8] == 20).all()
    assert (grid[4:6, 1:4] == 30).all()
    covered = np.zeros(grid.shape[:2], bool)
    covered[1:3, 1:4] = covered[1:3, 5:8] = covered[4:6, 1:4] = True
    assert (grid[~covered] == 255).all()


def test_grid_defaults_to_a_square_and_scales_whole_pixels():
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1)
    assert make_grid(images).shape == (2 + 2 * 4, 2 + 3 * 4, 1)
    grid = make_grid(images, padding=0, columns=9, scale=3)
    assert grid.shape == (6, 30, 1)
    assert (grid[:3, :3] == 0).all()
    assert (grid[3:, 3:6] == 3).all()


def test_png_holds_the_pixels(tmp_path):
    for channels in (1, 3):
        image = np.random.default_rng(0).integers(0, 256, (5, 4, channels), np.uint8)
        save_png(tmp_path / "new/folder/x.png", image)
        read = np.asarray(Image.open(tmp_path / "new/folder/x.png"))
        np.testing.assert_array_equal(read.reshape(image.shape), image)
    assert os.listdir(tmp_path / "new/folder") == ["x.png"]


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    image = np.zeros((4, 4, 3), np.uint8)
    save_png(path, image)
    before = path.read_bytes()

    def fill_the_disk(self, file, **options):
        file.write_bytes(b"half a picture")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        save_png(path, image + 1)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.png"]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda image: make_grid(image), "expected \\[b H W c\\]"),
        (lambda image: make_grid(image[None].astype(float)), "images are float64"),
        (lambda image: make_grid(image[None][:0]), "not empty"),
        (lambda image: make_grid(image[None], columns=0), "columns = 0"),
        (lambda image: make_grid(image[None], scale=0), "scale = 0"),
        (lambda image: save_png("x.png", image[..., :2]), "c = 1 or 3"),
        (lambda image: save_png("x.jpg", image), r"x\.jpg does not end in \.png"),
    ],
)
def test_unusable_pixels_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(np.zeros((4, 4, 3), np.uint8))
