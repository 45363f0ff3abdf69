import warnings

import numpy as np
import pytest
from PIL import Image

from maskgil_jax.data.errors import DatasetError, ImageReadError
from maskgil_jax.data.folder import ImageFolderSource
from maskgil_jax.data.images import decode_rgb


def write(path, value, size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three classes whose order on disk is not the sorted one; the red channel numbers images."""
    for number, name in enumerate(["n03/b.png", "n01/c.PNG", "n01/a.JPEG", "n02/x.webp"]):
        write(tmp_path / "train" / name, (number * 50, 0, 0))
    (tmp_path / "train/n01/notes.txt").write_text("no image")
    (tmp_path / "train/n01/._a.jpg").write_text("a Mac's leftover")
    return tmp_path


def test_the_fingerprint_is_of_the_names_in_their_classes(folder):
    def take():
        return ImageFolderSource(folder, "train").fingerprint

    first = take()
    write(folder / "train/n01/a.JPEG", (7, 7, 7))
    assert take() == first
    (folder / "train/n01/c.PNG").rename(folder / "train/n02/c.PNG")
    second = take()
    (folder / "train/n02/c.PNG").rename(folder / "train/n02/d.PNG")
    third = take()
    (folder / "train/n02").rename(folder / "train/n025")
    assert len({first, second, third, take()}) == 4


def test_classes_and_files_are_sorted_by_name(folder):
    source = ImageFolderSource(folder, "train")
    names = [source.path(i).relative_to(folder / "train").as_posix() for i in range(len(source))]
    assert names == ["n01/a.JPEG", "n01/c.PNG", "n02/x.webp", "n03/b.png"]
    assert [int(source[i]["label"]) for i in range(4)] == [0, 0, 1, 2]
    assert source.num_classes == 3
    assert source.class_names == ("n01", "n02", "n03")
    record = source[3]
    assert record["image"].shape == (4, 6, 3)
    assert (record["image"].dtype, record["label"].dtype) == (np.uint8, np.int32)
    assert record["image"][0, 0].tolist() == [0, 0, 0]
    assert source[1]["image"][0, 0].tolist() == [50, 0, 0]
    np.testing.assert_array_equal(source[-1]["image"], record["image"])
    with pytest.raises(IndexError):
        source[4]


def test_folder_is_scanned_once(folder):
    source = ImageFolderSource(folder, "train")
    write(folder / "train/n00/new.png", (1, 2, 3))
    assert len(source) == 4
    assert int(source[0]["label"]) == 0


@pytest.mark.parametrize(
    ("prepare", "match"),
    [
        (lambda root: None, r"train: No such file or directory; expected ROOT/SPLIT/CLASS/IMAGE"),
        (lambda root: (root / "train").write_text(""), r"train: Not a directory; expected ROOT"),
        (lambda root: write(root / "train/x.png", 0), r"no class folders in .*train; expected"),
        (lambda root: (root / "train/n01").mkdir(parents=True), r"no images .*train/n01; fill or"),
        (lambda root: write(root / "train/n01/sub/x.png", 0), r"no images .*directly in the class"),
    ],
    ids=["missing", "a file", "no classes", "empty class", "nested class"],
)
def test_unusable_folder_is_refused_at_once(tmp_path, prepare, match):
    prepare(tmp_path)
    with pytest.raises(DatasetError, match=match):
        ImageFolderSource(tmp_path, "train")


def test_split_with_other_classes_is_refused(folder):
    for name in ("n01", "n02", "n04"):
        write(folder / "val" / name / "x.png", (0, 0, 0))
    train = ImageFolderSource(folder, "train")
    with pytest.raises(DatasetError, match=r"1 missing \['n03'\], 1 extra \['n04'\]"):
        ImageFolderSource(folder, "val", class_names=train.class_names)


def test_truncated_image_is_named(folder):
    path = folder / "train/n01/a.JPEG"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    source = ImageFolderSource(folder, "train")
    with pytest.raises(ImageReadError, match=r"n01/a\.JPEG: .*truncated.*1 unreadable.*0 allowed"):
        source[0]
    assert source[1]["image"][0, 0, 0] == 50


def test_allowed_bad_images_are_replaced_by_the_next_and_counted(folder):
    for name in ("n01/c.PNG", "n02/x.webp"):
        (folder / "train" / name).write_bytes(b"not an image")
    source = ImageFolderSource(folder, "train", max_bad_images=2)
    with pytest.warns(UserWarning, match="unreadable so far, 2 allowed") as caught:
        record = source[1]
    assert [str(w.message).count("c.PNG") for w in caught] == [1, 0]
    assert len(source.bad_images) == 2
    np.testing.assert_array_equal(record["image"], source[3]["image"])
    assert int(record["label"]) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each is reported once
        assert int(source[2]["label"]) == 2

    strict = ImageFolderSource(folder, "train", max_bad_images=1)
    with (
        pytest.warns(UserWarning, match="c.PNG"),
        pytest.raises(ImageReadError, match=r"x\.webp.*2 unreadable so far, 1 allowed"),
    ):
        strict[1]


def test_replacement_wraps_around_and_ends(folder):
    files = sorted(p for p in (folder / "train").rglob("*") if p.suffix[1:] in ("png", "webp"))
    for path in files:
        path.write_bytes(b"")
    source = ImageFolderSource(folder, "train", max_bad_images=4)
    with pytest.warns(UserWarning, match="stands in"):
        assert int(source[3]["label"]) == 0
    for path in ("n01/a.JPEG", "n01/c.PNG"):
        (folder / "train" / path).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="stands in"),
        pytest.raises(ImageReadError, match="all 4 images"),
    ):
        source[0]


def test_negative_allowance_is_refused(folder):
    with pytest.raises(ValueError, match="max_bad_images = -1"):
        ImageFolderSource(folder, "train", max_bad_images=-1)


@pytest.mark.parametrize(
    ("mode", "value", "name", "expected"),
    [
        ("L", 77, "x.png", (77, 77, 77)),
        ("I;16", 65535 // 2, "x.png", (127, 127, 127)),
        ("1", 1, "x.png", (255, 255, 255)),
        ("RGBA", (200, 0, 100, 0), "x.png", (255, 255, 255)),
        ("RGBA", (255, 0, 0, 128), "x.png", (255, 127, 127)),
        ("LA", (0, 128), "x.png", (127, 127, 127)),
        ("CMYK", (0, 255, 255, 0), "x.tif", (255, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, value, name, expected):
    write(tmp_path / name, value, mode=mode)
    image = decode_rgb(tmp_path / name)
    assert (image.shape, image.dtype) == ((4, 6, 3), np.uint8)
    assert image[1, 1].tolist() == list(expected)


def test_transparent_palette_is_laid_over_white(tmp_path):
    picture = Image.new("P", (6, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "x.png", transparency=0)
    image = decode_rgb(tmp_path / "x.png")
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[1, 1].tolist() == [10, 20, 30]


def test_mode_without_a_range_is_refused(tmp_path):
    write(tmp_path / "x.tif", 0.5, mode="F")
    with pytest.raises(ImageReadError, match="mode F has no known range"):
        decode_rgb(tmp_path / "x.tif")
