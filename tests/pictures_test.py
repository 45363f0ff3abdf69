import os

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from PIL import Image

from maskgil_jax.pictures import (
    RAMP,
    contact_sheet,
    decided_at,
    grey_out,
    heat_map,
    make_grid,
    quantize,
    save_gif,
    save_png,
    to_uint8,
)

M = 9


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


def test_compiled_programs_round_to_the_same_pixels():
    # Next to where a grey level begins, the order of roundings decides.
    levels = ((np.arange(256) - 128.0) / 127.5).astype(np.float32)
    edges = [np.nextafter(levels, np.float32(side)) for side in (-9, 9)]
    drawn = np.random.default_rng(0).uniform(-1.5, 1.5, 100_000).astype(np.float32)
    values = np.concatenate([levels, *edges, drawn])
    pixels = np.asarray(jax.jit(quantize)(values))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, to_uint8(values))
    assert quantize(jnp.array([-1, 1], jnp.bfloat16)).tolist() == [0, 255]


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


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("x.png", save_png),
        ("x.gif", lambda path, image: save_gif(path, image[None], seconds_per_frame=1.0)),
    ],
)
def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch, name, save):
    path = tmp_path / name
    image = np.zeros((4, 4, 3), np.uint8)
    save(path, image)
    before = path.read_bytes()

    def fill_the_disk(self, file, **options):
        file.write_bytes(b"half a picture")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        save(path, image + 1)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [name]


def read_gif(path):
    """Frames [t H W 3] and how long each is shown, in ms."""
    with Image.open(path) as gif:
        assert gif.format == "GIF"
        assert gif.info["loop"] == 0
        frames = []
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append((np.asarray(gif.convert("RGB")), gif.info["duration"]))
    return np.stack([frame for frame, _ in frames]), [duration for _, duration in frames]


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_holds_the_pixels_and_the_time(tmp_path, channels):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (200, channels), np.uint8)
    frames = colours[rng.integers(0, 200, (5, 12, 9))]
    save_gif(tmp_path / "new/x.gif", frames, seconds_per_frame=0.25)
    read, durations = read_gif(tmp_path / "new/x.gif")
    np.testing.assert_array_equal(read, np.broadcast_to(frames, read.shape))
    assert durations == [250] * 5
    assert os.listdir(tmp_path / "new") == ["x.gif"]


def test_gif_of_many_colours_is_near_and_does_not_flicker(tmp_path):
    y, x = np.mgrid[:64, :64].astype(np.uint8)
    still = np.stack([4 * y, 4 * x, 255 - 2 * (x + y)], -1)
    frames = np.stack([still] * 3)
    for index in range(3):
        frames[index, 20 * index : 20 * index + 4] = 0
    save_gif(tmp_path / "x.gif", frames, seconds_per_frame=0.1)
    read, _ = read_gif(tmp_path / "x.gif")
    assert np.abs(read.astype(int) - frames).mean() < 12
    np.testing.assert_array_equal(read[0, 4:20], read[1, 4:20])


def test_marked_cells_are_grey_and_others_as_before():
    images = np.random.default_rng(0).integers(0, 100, (2, 3, 4, 6, 3), np.uint8)
    cells = np.zeros((2, 3, 2, 3), bool)
    cells[1, 2, 0, 1] = cells[0, 1, 1, 2] = True
    grey = grey_out(images, cells)
    changed = np.zeros(images.shape[:-1], bool)
    changed[1, 2, 0:2, 2:4] = changed[0, 1, 2:4, 4:6] = True
    assert (grey[changed] == 128).all()
    np.testing.assert_array_equal(grey[~changed], images[~changed])
    with pytest.raises(ValueError, match="4×6 pixels are not divisible by 2×4 cells"):
        grey_out(images, np.zeros((2, 3, 2, 4), bool))


def test_a_contact_sheet_has_images_below_and_steps_beside_one_another():
    steps = np.zeros((3, 2, 4, 5, 1), np.uint8)
    for step, image in np.ndindex(3, 2):
        steps[step, image] = 10 * image + step
    sheet = contact_sheet(steps, padding=0)
    assert sheet.shape == (8, 15, 1)
    assert sheet[::4, ::5, 0].tolist() == [[0, 1, 2], [10, 11, 12]]
    assert contact_sheet(steps, padding=1, scale=2).shape == (2 * 9 + 1, 3 * 11 + 1, 1)


def test_a_token_is_decided_when_it_was_last_masked():
    # One image of 1×5 tokens: known or at once, second step, last step, taken back, taken back
    # twice in a row.
    trace = np.array(
        [
            [3, M, M, 4, 5],
            [3, 7, M, M, M],
            [3, 7, M, 4, M],
            [3, 7, 8, 4, 6],
        ],
    ).reshape(4, 1, 1, 5)
    assert decided_at(trace, M).tolist() == [[[0, 1, 3, 2, 3]]]
    known = np.array([[[True, False, False, False, False]]])
    assert decided_at(trace, M, known).tolist() == [[[-1, 1, 3, 2, 3]]]
    assert decided_at(trace[3:], M).tolist() == [[[0] * 5]]
    with pytest.raises(ValueError, match="2 tokens are masked at the end of the 3 steps"):
        decided_at(trace[:3], M)
    with pytest.raises(ValueError, match="the 0 steps"):
        decided_at(trace[:0], M)


def lightness(colours):
    """CIE L* of sRGB colours."""
    shares = np.asarray(colours) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)


def test_a_heat_map_grows_lighter_from_step_to_step():
    steps = np.arange(-1, 11).reshape(1, 2, 6)
    colours = heat_map(steps, 11, 3)
    assert colours.shape == (1, 6, 18, 3)
    np.testing.assert_array_equal(colours, colours[:, ::3, ::3].repeat(3, 1).repeat(3, 2))
    cells = colours[0, ::3, ::3].reshape(12, 3)
    assert cells[0].tolist() == [128] * 3
    assert (tuple(cells[1]), tuple(cells[-1])) == (RAMP[0], RAMP[-1])
    rises = np.diff(lightness(cells[1:]))
    assert rises.min() > 0.5 * rises.mean()
    assert heat_map(np.zeros((1, 1, 1), int), 1, 1).tolist() == [[[list(RAMP[0])]]]


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
        (lambda image: save_gif("x.png", image[None], 1.0), r"x\.png does not end in \.gif"),
        (lambda image: save_gif("x.gif", image, 1.0), "expected \\[b H W c\\]"),
        (lambda image: save_gif("x.gif", image[None], 0.001), "0.001 .*: 0.02 to 655.35"),
        (lambda image: save_gif("x.gif", image[None], np.inf), "inf is out of range"),
        (lambda image: heat_map(np.full((1, 2, 2), 4), 4, 2), "4 to 4 are out of range.* 0 to 3"),
        (lambda image: heat_map(np.full((1, 2, 2), -2), 4, 2), "steps from -2"),
        (lambda image: heat_map(np.zeros((1, 2, 2), int), 4, 0), "factor 0"),
    ],
)
def test_unusable_pixels_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(np.zeros((4, 4, 3), np.uint8))


def test_known_tokens_are_told_by_bools(monkeypatch):
    # As for users, whose calls no annotation checks.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    trace = np.zeros((2, 1, 2, 2), np.int32)
    with pytest.raises(ValueError, match="known has type int32"):
        decided_at(trace, 5, known=trace[0])
