import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from maskgil_jax.data.errors import DatasetError, ImageReadError
from maskgil_jax.data.webdataset import read_webdataset


def encode(red, size=(6, 4), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(file, kind)
    return file.getvalue()


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pair(key, red, text="a text", **options):
    return [(f"{key}.png", encode(red, **options)), (f"{key}.txt", text.encode())]


@pytest.fixture
def shards(tmp_path):
    write_tar(tmp_path / "00001.tar", pair("000", 40) + pair("x/001", 50, "in a folder"))
    write_tar(
        tmp_path / "00000.tar",
        [
            *pair("000", 10, "the first", size=(3, 9)),
            # Members of a key may stand apart; a table beside a text does not count.
            ("002.json", json.dumps({"caption": ["one", "two"], "width": 1}).encode()),
            *pair("001", 20, "ein Café"),
            ("001.json", b"{}"),
            ("001.seg.png", encode(99)),
            ("002.JPG", encode(30, kind="JPEG")),
            ("notes", b"no extension"),
        ],
    )
    return tmp_path


def test_samples_of_all_tars_are_read_by_index(shards):
    source = read_webdataset(shards)
    names = ["00000.tar/000.png", "00000.tar/002.jpg", "00000.tar/001.png"]
    names += ["00001.tar/000.png", "00001.tar/x/001.png"]
    assert [source.describe(i) for i in range(5)] == names
    found = [int(source[i]["image"][0, 0, 0]) for i in (4, 0, 2, 3)]
    assert found == [50, 10, 20, 40]
    assert abs(int(source[1]["image"][0, 0, 0]) - 30) < 3
    assert [source[i]["caption"] for i in (0, 2, 4)] == ["the first", "ein Café", "in a folder"]
    assert source[1]["caption"].tolist() == ["one", "two"]
    assert source.image_size(0) == source[0]["image"].shape[:2] == (9, 3)
    assert len(read_webdataset(shards / "00001.tar")) == 2


def test_long_names_and_headers_beyond_the_first_bytes_are_read(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    file = io.BytesIO()
    image = Image.new("RGB", (6, 4), (80, 0, 0))
    image.save(file, "JPEG", exif=exif.tobytes(), comment=b"y" * 60_000)
    key = "/".join(["deep" * 12] * 5) + "/ä"
    for number, kind in enumerate([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]):
        members = [(f"{key}.jpg", file.getvalue()), (f"{key}.txt", b"long")]
        path = write_tar(tmp_path / f"{number}.tar", members, format=kind)
        source = read_webdataset(path)
        assert source.describe(0) == f"{number}.tar/{key}.jpg"
        assert source.image_size(0) == source[0]["image"].shape[:2] == (4, 6)


def whole_samples(source):
    return [source[i]["caption"] for i in range(len(source))]


@pytest.mark.parametrize("cut", ["data", "padding", "header", "between", "end"])
def test_a_tar_cut_short_is_told_with_what_is_whole(tmp_path, cut):
    path = write_tar(tmp_path / "x.tar", pair("0", 10, "one") + pair("1", 20, "two"))
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    last_image, last_text = members[2:]
    place, whole = {
        "data": (last_image.offset_data + 20, 1),
        "padding": (last_text.offset_data + 3, 2),
        "header": (last_text.offset + 100, 1),
        "between": (last_text.offset, 1),
        "end": (last_text.offset_data + 512, 2),
    }[cut]
    path.write_bytes(path.read_bytes()[:place])
    with pytest.raises(DatasetError, match=rf"x.tar: .*, {whole} whole samples before it"):
        read_webdataset(tmp_path)
    with pytest.warns(UserWarning, match=r"left out 1 tars that are cut short or damaged \(x.tar"):
        source = read_webdataset(tmp_path, allow_incomplete=True)
    assert whole_samples(source) == ["one", "two"][:whole]
    assert source.left_out == {"tars that are cut short or damaged": 1}


def test_a_tar_damaged_inside_does_not_pass_for_whole(tmp_path):
    path = write_tar(tmp_path / "x.tar", pair("0", 10, "one") + pair("1", 20, "two"))
    with tarfile.open(path) as tar:
        header = tar.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[header : header + 100] = b"\xff" * 100
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"no end mark after .*, 1 whole samples before it"):
        read_webdataset(path)


def test_what_is_no_tar_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"cannot read .*nowhere: No such file"):
        read_webdataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"no tars in .*; expected \*.tar with members"):
        read_webdataset(tmp_path)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(DatasetError, match=r"a.tar.gz is compressed, .* unpack it"):
        read_webdataset(tmp_path)
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DatasetError, match=r"b.tar: .*, 0 whole samples before it"):
        read_webdataset(tmp_path)
    write_tar(tmp_path / "b.tar", [("readme.md", b"x")])
    with pytest.raises(DatasetError, match="have no images with texts"):
        read_webdataset(tmp_path)


def test_all_that_is_wrong_is_told_at_once_or_left_out(tmp_path):
    write_tar(
        tmp_path / "x.tar",
        [
            *pair("good", 10, "good"),
            ("no_text.png", encode(1)),
            ("no_image.txt", b"lost"),
            *pair("empty", 1, " "),
            ("latin.png", encode(1)),
            ("latin.txt", b"\xe9"),
            *pair("twice", 1),
            *pair("twice", 2),
            ("kinds.png", encode(1)),
            ("kinds.jpg", encode(1, kind="JPEG")),
            ("kinds.txt", b"which?"),
            ("json.png", encode(1)),
            ("json.json", b"{"),
            ("deep.png", encode(1)),
            ("deep.json", b"[" * 100_000),
            ("list.png", encode(1)),
            ("list.json", b"[]"),
            ("null.png", encode(1)),
            ("null.json", b'{"caption": null}'),
        ],
    )
    with pytest.raises(DatasetError) as error:
        read_webdataset(tmp_path)
    for part in [
        "2 images without a caption (x.tar/no_text, x.tar/null.json)",
        "1 captions without an image (x.tar/no_image)",
        "1 empty captions (x.tar/empty.txt)",
        "1 captions that are not UTF-8 (x.tar/latin.txt line 1)",
        "2 keys with a member or an image twice (x.tar/twice, x.tar/kinds)",
        "2 JSON files that cannot be read (x.tar/json.json: ",
        "1 JSON files that hold no object (x.tar/list.json)",
    ]:
        assert part in str(error.value)
    with pytest.warns(UserWarning, match="left out"):
        source = read_webdataset(tmp_path, allow_incomplete=True)
    assert whole_samples(source) == ["good"]


def test_an_unreadable_image_is_replaced_if_allowed(tmp_path):
    members = [("0.png", b"broken"), ("0.txt", b"zero"), *pair("1", 20, "one")]
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ImageReadError, match=r"x.tar/0.png: its content is no known image format"):
        read_webdataset(path)[0]
    source = read_webdataset(path, max_bad_images=1)
    with pytest.warns(UserWarning, match="stands in"):
        assert source.image_size(0) == (4, 6)
    assert source[0]["caption"] == "one"
    np.testing.assert_array_equal(source[0]["image"], source[1]["image"])
