import json

import numpy as np
import pytest
from PIL import Image

from maskgil_jax.data.buckets import split_by_bucket
from maskgil_jax.data.captions import CaptionedImages, read_caption_folder, read_json_lines
from maskgil_jax.data.errors import DatasetError, ImageReadError
from maskgil_jax.data.pipeline import make_bucketed_loader
from maskgil_jax.data.transforms import CenterCrop, Chain, PickCaption


def write_image(path, red=0, size=(6, 4), **options):
    """An image of `size` (width, height), as Pillow has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 0, 0)).save(path, **options)
    return path


def write_pair(path, text, red=0, size=(6, 4)):
    write_image(path, red, size)
    path.with_suffix(".txt").write_bytes(text if isinstance(text, bytes) else text.encode())


def reds(source):
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


@pytest.fixture
def folder(tmp_path):
    write_pair(tmp_path / "00001/b.png", "a blue house\n", 10)
    write_pair(tmp_path / "00000/a.png", "ein rötliches Haus", 20, size=(12, 4))
    write_pair(tmp_path / "top.PNG", "at the top,\nin two lines", 30)
    (tmp_path / "00000/a.json").write_text("{}")
    (tmp_path / ".hidden").mkdir()
    write_image(tmp_path / ".hidden/x.png")
    return tmp_path


def test_a_folder_gives_images_with_the_texts_beside(folder):
    source = read_caption_folder(folder)
    assert [source.describe(i) for i in range(3)] == ["top.PNG", "00000/a.png", "00001/b.png"]
    assert reds(source) == [30, 20, 10]
    record = source[1]
    assert record["caption"] == "ein rötliches Haus"
    assert record["image"].shape == (4, 12, 3)
    assert record["image"].dtype == np.uint8
    assert source[0]["caption"] == "at the top,\nin two lines"
    assert source[2]["caption"] == "a blue house"
    assert [source.image_size(i) for i in range(3)] == [(4, 6), (4, 12), (4, 6)]
    assert source.left_out == {}
    assert source.num_classes is None
    with pytest.raises(IndexError):
        source[3]


def test_the_name_tells_images_and_texts(folder):
    names = {read_caption_folder(folder).name, read_caption_folder(folder).name}
    write_pair(folder / "00001/b.png", "another text")
    names.add(read_caption_folder(folder).name)
    (folder / "00001/b.png").rename(folder / "00001/c.png")
    (folder / "00001/b.txt").rename(folder / "00001/c.txt")
    names.add(read_caption_folder(folder).name)
    assert len(names) == 3
    assert all(name.startswith(f"{folder.name} ") for name in names)


def test_all_that_a_folder_lacks_is_told_at_once_or_left_out(folder):
    write_image(folder / "a/no_text.png")
    (folder / "a/no_image.txt").write_text("lost")
    write_pair(folder / "a/empty.png", " \n")
    write_pair(folder / "a/latin.png", b"fine\n\xe9t\xe9")
    write_pair(folder / "a/twice.jpg", "which?")
    write_image(folder / "a/twice.png")
    with pytest.raises(DatasetError) as error:
        read_caption_folder(folder)
    for part in [
        "1 images without a caption file (a/no_text.png)",
        "1 caption files without an image (a/no_image.txt)",
        "1 empty captions (a/empty.txt)",
        "1 captions that are not UTF-8 (a/latin.txt line 2)",
        "1 images of which another has the same name (a/twice.png)",
        "leave these out with allow_incomplete",
    ]:
        assert part in str(error.value)
    with pytest.warns(UserWarning, match="left out 1 empty captions.*1 images without"):
        source = read_caption_folder(folder, allow_incomplete=True)
    assert [source.describe(i) for i in range(len(source))] == [
        "top.PNG",
        "00000/a.png",
        "00001/b.png",
        "a/twice.jpg",
    ]
    assert sum(source.left_out.values()) == 5


def test_of_many_problems_the_first_are_named(tmp_path):
    for number in range(8):
        write_image(tmp_path / f"{number}.png")
    with pytest.raises(DatasetError, match=r"8 images without .* \(0.png, 1.png, .*4.png, …\)"):
        read_caption_folder(tmp_path)
    with (
        pytest.warns(UserWarning, match="left out 8"),
        pytest.raises(DatasetError, match="no images with captions"),
    ):
        read_caption_folder(tmp_path, allow_incomplete=True)


def test_a_folder_that_is_missing_or_empty_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"no folder .*nowhere; expected images with texts"):
        read_caption_folder(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"no images .* expected x.jpg with x.txt"):
        read_caption_folder(tmp_path)


def test_images_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    for name in ("a.jpg", "b.png", "c.webp", "d.tif"):
        write_image(tmp_path / name, 200, size=(12, 4), exif=exif.tobytes())
        (tmp_path / name).with_suffix(".txt").write_text("a tower")
    source = read_caption_folder(tmp_path)
    for index in range(4):
        assert source[index]["image"].shape == (12, 4, 3), source.describe(index)
        assert source.image_size(index) == (12, 4), source.describe(index)


def test_every_colour_mode_becomes_rgb(tmp_path):
    for name, mode, value in [
        ("a.jpg", "CMYK", (0, 0, 0, 0)),
        ("b.png", "RGBA", (0, 0, 0, 0)),
        ("c.png", "L", 255),
    ]:
        Image.new(mode, (5, 3), value).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("white")
    source = read_caption_folder(tmp_path)
    for index in range(3):
        np.testing.assert_array_equal(source[index]["image"], np.full((3, 5, 3), 255))


def test_unreadable_images_are_counted_and_replaced(folder):
    (folder / "00000/a.png").write_bytes(b"no image")
    with pytest.raises(ImageReadError, match=r"00000/a.png: .*1 unreadable so far, 0 allowed"):
        read_caption_folder(folder)[1]
    source = read_caption_folder(folder, max_bad_images=1)
    with pytest.warns(UserWarning, match=r"00000/a.png.*next readable image stands in"):
        record = source[1]
    assert (record["caption"], record["image"][0, 0, 0]) == ("a blue house", 10)
    assert source.image_size(1) == source.image_size(2)
    assert source.bad_images == ("00000/a.png",)


def write_table(folder, lines):
    table = folder / "metadata.jsonl"
    data = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    table.write_bytes(b"\n".join(data) + b"\n")
    return table


@pytest.fixture
def table(tmp_path):
    write_image(tmp_path / "img/a.png", 10)
    write_image(tmp_path / "img/b.png", 20, size=(3, 9))
    elsewhere = write_image(tmp_path.with_name(f"{tmp_path.name}_elsewhere") / "c.png", 30)
    return write_table(
        tmp_path,
        [
            {"file_name": "img/b.png", "caption": " first ", "width": 3},
            b"",
            {"image": "img/a.png", "text": ["one", "two", "three"]},
            {"file_name": str(elsewhere), "text": "far away"},
        ],
    )


def test_a_table_gives_its_lines_in_order(table):
    source = read_json_lines(table)
    assert reds(source) == [20, 10, 30]
    assert source[0]["caption"] == "first"
    assert source[1]["caption"].tolist() == ["one", "two", "three"]
    assert source.captions(1) == ("one", "two", "three")
    assert source.image_size(0) == (9, 3)
    assert read_json_lines(table.parent).name == source.name


def test_one_of_several_captions_is_drawn_the_same_again(table):
    source = read_json_lines(table)
    parts = split_by_bucket(source, [(4, 4), (12, 4)])
    assert {size: part.indices.tolist() for size, part in parts.items()} == {
        (4, 4): [1, 2],
        (12, 4): [0],
    }

    def load():
        return make_bucketed_loader(
            parts,
            batch_size=2,
            seed=3,
            make_transform=lambda size: Chain(transforms=(PickCaption(), CenterCrop(size=size))),
            num_threads=0,
        )

    loader = load()
    batches = [next(loader) for _ in range(60)]
    texts = [str(text) for batch in batches for text in batch["caption"]]
    counts = {text: texts.count(text) for text in set(texts)}
    assert counts.keys() == {"first", "far away", "one", "two", "three"}
    assert counts["far away"] == sum(counts[text] for text in ("one", "two", "three"))
    assert all(5 <= counts[text] <= 25 for text in ("one", "two", "three"))
    again = load()
    for batch in batches[:20]:
        assert next(again)["caption"].tolist() == batch["caption"].tolist()
    assert {batch["image"].shape[1:] for batch in batches} == {(4, 4, 3), (12, 4, 3)}


def test_a_pick_draws_once_whatever_there_is():
    for caption in ["one", np.asarray(["one", "two"])]:
        rng, other = np.random.default_rng(0), np.random.default_rng(0)
        assert type(PickCaption()({"caption": caption}, rng)["caption"]) is str
        other.random()
        assert rng.random() == other.random()


def test_all_that_is_wrong_with_a_table_is_told_at_once_or_left_out(table):
    with open(table, "ab") as file:
        for line in [
            b'{"file_name": "img/gone.png", "caption": "x"}',
            b'{"file_name": "img/gone2.png", "caption": "x"}',
            b'{"file_name": "img/a.png", "caption": "again"}',
            b"no json",
            b'["a list"]',
            b'{"caption": "no name"}',
            b'{"file_name": "img/\xff.png", "caption": "x"}',
            b'{"file_name": "x1", "caption": ""}',
            b'{"file_name": "x2"}',
            b'{"file_name": "x3", "caption": []}',
            b'{"file_name": "x4", "caption": 3}',
            b'{"file_name": "x5", "caption": "\\ud800"}',
        ]:
            file.write(line + b"\n")
    with pytest.raises(DatasetError) as error:
        read_json_lines(table)
    for part in [
        "2 images that are missing (img/gone.png of line 5, img/gone2.png of line 6)",
        "1 images that an earlier line names (img/a.png of line 7)",
        "1 lines that are no JSON (line 8: Expecting value",
        "1 lines that are no JSON object (line 9)",
        "1 lines without file_name or image (line 10)",
        "1 lines that are not UTF-8 (line 11)",
        "1 empty captions (x1 of line 12)",
        "2 images without a caption (x2 of line 13, x3 of line 14)",
        "1 captions that are no text (x4 of line 15: 3)",
        "1 captions that are not UTF-8 (x5 of line 16)",
    ]:
        assert part in str(error.value)
    with pytest.warns(UserWarning, match="left out 2 images that are missing"):
        source = read_json_lines(table, allow_incomplete=True)
    assert reds(source) == [20, 10, 30]
    assert sum(source.left_out.values()) == 12


def test_lines_that_a_program_may_write_but_no_person(table):
    with open(table, "ab") as file:
        file.write(b'{"file_name": "img/c.png", "caption": null, "text": "in its place"}\n')
        file.write(b"[" * 100_000 + b"\n")
    write_image(table.parent / "img" / "c.png", 40)
    with pytest.raises(DatasetError, match=r"has 1 lines that are no JSON \(line 6: maximum rec"):
        read_json_lines(table)
    with pytest.warns(UserWarning, match="left out 1 lines that are no JSON"):
        source = read_json_lines(table, allow_incomplete=True)
    assert source.captions(3) == ("in its place",)


def test_a_table_that_is_missing_or_empty_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"cannot read the table .*metadata.jsonl: No such"):
        read_json_lines(tmp_path)
    with pytest.raises(DatasetError, match="is empty; expected one JSON object per line"):
        read_json_lines(write_table(tmp_path, []))


def test_a_source_needs_entries():
    with pytest.raises(DatasetError, match="x has no images with captions"):
        CaptionedImages("x", [])
