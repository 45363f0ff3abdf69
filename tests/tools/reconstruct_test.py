import json
import re

import numpy as np
import pytest
import tiny
from PIL import Image

import maskgil_jax
import maskgil_jax.data.digits
from maskgil_jax import generation
from maskgil_jax.data.transforms import center_crop, to_float
from maskgil_jax.evals.images import psnr, ssim
from maskgil_jax.evaluation.nets import DigitNet

TOOLS = tiny.ROOT / "tools"


@pytest.fixture(autouse=True)
def _tools_importable(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.make_inputs(folder)
    return folder


def run_tool(*arguments):
    import reconstruct

    return reconstruct.main([str(argument) for argument in arguments])


def rebuild(tokenizer, images, batch_size=16):
    """Encode and decode in batches as large as the tool's, which are compiled once for both."""
    tokens = np.asarray(tokenizer.encode(to_float(images), batch_size=batch_size))
    rebuilt = generation.decode_images(tokenizer, tokens, batch_size=batch_size)
    return rebuilt, set(tokens.flat)


def test_digits_are_rebuilt_measured_and_shown(tmp_path, capsys):
    arguments = ["--tokenizer=asset:digits_tokenizer", "--images", "digits", "--num_images=21"]
    arguments += [f"--out={tmp_path / 'grid.png'}", "--shown=5", "--columns=3", "--batch_size=8"]
    assert run_tool(*arguments, f"--json={tmp_path / 'all.json'}") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    images = maskgil_jax.data.digits.digits_arrays("test")[0][:21]
    rebuilt, codes = rebuild(maskgil_jax.load_tokenizer("asset:digits_tokenizer"), images, 8)
    assert report["images"] == 21
    assert report["psnr_db"] == pytest.approx(psnr(images, rebuilt).mean(), abs=1e-3)
    assert report["ssim"] == pytest.approx(ssim(images, rebuilt).mean(), abs=1e-3)
    assert (report["codes_used"], report["codebook_size"]) == (len(codes), 128)
    assert report["usage"] == len(codes) / 128
    assert report["psnr_db"] > 20
    each = json.loads((tmp_path / "all.json").read_text())["each"]
    assert [row["image"] for row in each] == [f"digits/test {i}" for i in range(21)]
    np.testing.assert_allclose([row["psnr_db"] for row in each], psnr(images, rebuilt), atol=1e-3)
    # Two rows of originals, each above its reconstructions; the last place of each is empty.
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (4 * 34 + 2, 3 * 34 + 2, 3)
    cells = [
        grid[2 + 34 * row : 34 + 34 * row, 2 + 34 * column : 34 + 34 * column]
        for row in range(4)
        for column in range(3)
    ]
    empty = np.full((32, 32, 3), 255, np.uint8)
    expected = [*images[:3], *rebuilt[:3], *images[3:5], empty, *rebuilt[3:5], empty]
    np.testing.assert_array_equal(cells, expected)


def test_rfid_is_the_distance_of_reconstructions_from_their_originals(tmp_path, capsys):
    arguments = ["--tokenizer=asset:digits_tokenizer", "--images=digits", "--num_images=100"]
    arguments += [f"--out={tmp_path / 'grid.png'}", "--rfid=digit-net"]
    assert run_tool(*arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    images = maskgil_jax.data.digits.digits_arrays("test")[0][:100]
    rebuilt, _ = rebuild(maskgil_jax.load_tokenizer("asset:digits_tokenizer"), images)
    pools = [DigitNet().extract(side, ("pool",))["pool"] for side in (images, rebuilt)]
    (mean, cov), (other_mean, other_cov) = (
        (np.mean(x, 0, np.float64), np.cov(x.astype(np.float64), rowvar=False)) for x in pools
    )
    # Some features are 0 for all digits, so the product has no root; its eigenvalues do.
    roots = np.sqrt(np.abs(np.linalg.eigvals(cov @ other_cov)))
    expected = np.sum((mean - other_mean) ** 2) + np.trace(cov + other_cov) - 2 * roots.sum()
    assert report["rfid"] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert report["rfid"] > 0.1
    assert report["rfid_net"]["name"] == "digit-net"
    assert report["notes"] == []


def test_images_of_any_size_are_cut_to_multiples(inputs, tmp_path, capsys):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    pictures = {
        "a.png": rng.integers(0, 256, (17, 30, 3), np.uint8),
        "deep/b.PNG": rng.integers(0, 256, (16, 28, 3), np.uint8),
        "deep/c.bmp": rng.integers(0, 256, (24, 16, 3), np.uint8),
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.png").write_text("a Mac's leftover")
    (folder / "deep" / "folder.png").mkdir()
    tokenizer = maskgil_jax.load_tokenizer(inputs / "tokenizer")
    cut = [pictures["a.png"][:16, 1:29], pictures["deep/b.PNG"], pictures["deep/c.bmp"]]
    rebuilt, codes = zip(*(rebuild(tokenizer, image[None]) for image in cut), strict=True)
    expected = [psnr(image[None], other)[0] for image, other in zip(cut, rebuilt, strict=True)]

    arguments = [f"--tokenizer={inputs / 'tokenizer'}", f"--out={tmp_path / 'grid.png'}"]
    assert run_tool(*arguments, "--images", folder) == 0
    output = capsys.readouterr().out
    assert "1 of 3 images were cut to multiples of 4 pixels" in output
    report = json.loads(output.splitlines()[-1])
    assert report["psnr_db"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert report["codes_used"] == len(set.union(*codes))
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 26 + 2, 3 * 30 + 2, 3)
    np.testing.assert_array_equal(grid[2:18, 2:30], cut[0])
    np.testing.assert_array_equal(grid[28:52, 62:78], rebuilt[2][0])

    # With a size, central squares; files are taken in the order given.
    files = [folder / "deep/c.bmp", folder / "a.png"]
    assert run_tool(*arguments, "--image_size=12", "--images", *files) == 0
    output = capsys.readouterr().out
    assert "cut to multiples" not in output
    squares = np.stack([center_crop(pictures[n], 12) for n in ("deep/c.bmp", "a.png")])
    rebuilt, _ = rebuild(tokenizer, squares)
    report = json.loads(output.splitlines()[-1])
    assert report["ssim"] == pytest.approx(ssim(squares, rebuilt).mean(), abs=1e-3)


def test_equal_images_have_no_ratio_in_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generation, "decode_images", lambda tokenizer, tokens, batch_size: same)
    same = maskgil_jax.data.digits.digits_arrays("test")[0][:2]
    arguments = ["--tokenizer=asset:digits_tokenizer", "--images", "digits", "--num_images=2"]
    assert run_tool(*arguments, f"--out={tmp_path / 'grid.png'}") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["psnr_db"], report["ssim"]) == (None, 1.0)


def test_large_pictures_are_taken_in_tiles(inputs, tmp_path, capsys):
    photo = np.random.default_rng(0).integers(0, 256, (16, 28, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    arguments = [f"--tokenizer={inputs / 'tokenizer'}", f"--images={tmp_path / 'photo.png'}"]
    arguments += [f"--out={tmp_path / 'grid.png'}", "--tile_size=16"]
    assert run_tool(*arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    tiled = maskgil_jax.load_tokenizer(inputs / "tokenizer", tile_size=16)
    rebuilt, _ = rebuild(tiled, photo[None])
    assert report["tile_size"] == 16
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "grid.png"))[20:36, 2:30], rebuilt[0]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "/nowhere"}, r"/nowhere is neither a file nor a folder; .*digits or canvases"),
        ({"images": "{inputs}/tokenizer"}, r"tokenizer holds no images \(\.jpeg"),
        (
            {"images": "{inputs}/tokenizer/config.json"},
            r"cannot read image .*config\.json: its con",
        ),
        ({"image_size": 18}, r"height 18 is not a multiple of the tokenizer's downsample factor 4"),
        ({"image_size": 8}, r"shape \(\d+, 8, 8, 3\).*sides of at least 11"),
        ({"tile_size": 10}, r"tile_size is 10; it must be a multiple .* factor 4"),
        ({"num_images": 298}, r"--num_images 298: there are 297"),
        ({"num_images": 0}, r"--num_images 0 must be at least 1"),
        ({"columns": 0}, r"--columns 0 must be at least 1"),
        ({"out": "grid.jpg"}, r"--out grid\.jpg does not end in \.png"),
        ({"tokenizer": "/nowhere"}, r"/nowhere"),
    ],
)
def test_bad_input_is_refused(inputs, tmp_path, capsys, changes, message):
    values = {"images": "digits", "tokenizer": inputs / "tokenizer", "out": tmp_path / "x.png"}
    values |= {"num_images": 2} | changes
    if changes.get("images"):
        values.pop("num_images")
    arguments = [f"--{k}={str(v).replace('{inputs}', str(inputs))}" for k, v in values.items()]
    assert run_tool(*arguments) == 1
    errors = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", errors), errors
    assert not list(tmp_path.iterdir())


def test_a_picture_smaller_than_a_token_is_named(inputs, tmp_path, capsys):
    Image.new("RGB", (3, 40)).save(tmp_path / "thin.png")
    arguments = [f"--tokenizer={inputs / 'tokenizer'}", f"--out={tmp_path / 'grid.png'}"]
    assert run_tool(*arguments, "--images", tmp_path / "thin.png") == 1
    assert "thin.png: image of 40×3 pixels is smaller" in capsys.readouterr().err
