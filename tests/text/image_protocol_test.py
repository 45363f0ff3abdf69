"""Images are spelled as Lumina-mGPT spells them, and nothing else is read as one."""

import json

import numpy as np
import pytest
import tiny_text

from maskgil_jax.data.buckets import area_buckets
from maskgil_jax.decoding.rows import force_rows
from maskgil_jax.text.image_protocol import HEAD_LENGTH, NEW_LINE, ImageProtocol, size_name

NAMES = tiny_text.image_vocabulary()
BUCKETS = [(s, size) for s in (256, 512) for size in area_buckets(s)]


@pytest.fixture(scope="module")
def protocol():
    return ImageProtocol.from_vocabulary(NAMES)


@pytest.fixture(scope="module")
def published():
    """The names of the published vocabulary that matter, at their ids."""
    names = tiny_text.image_vocabulary(8192, 0)
    names = {name: i for name, i in names.items() if i < 8196}
    names |= {"<eoss>": 8196, "<racm3:break>": 8197}
    reserved = range(8694, 8960)
    return ImageProtocol.from_vocabulary(names | {f"<reserved{n:05}>": n + 4 for n in reserved})


def test_names_lead_to_ids(protocol):
    assert protocol.codebook_size == 16
    for code, name in ((0, "IMGIMGAZ"), (7, "IMGIMGHZ"), (12, "IMGIMGBCZ")):
        assert protocol.codes[code] == NAMES[name]
    assert protocol.new_line == NAMES["<reserved08799>"]
    assert protocol.sizes[0] == NAMES["<reserved08801>"]
    np.testing.assert_array_equal(protocol.stream_ids, [*protocol.codes, protocol.new_line])


def test_the_published_ids(published):
    assert sorted(published.codes) == list(range(4, 8196))
    assert (published.start, published.end, published.new_line) == (8197, 8196, 8803)
    assert published.end_turn == 8710
    # 512 pixels are 16 units: height first.
    np.testing.assert_array_equal(published.begin((32, 64)), [8197, 8804 + 16, 8804 + 32])


def test_what_is_written_is_spelled_out(protocol):
    codes = np.array([[0, 1, 2, 3], [4, 5, 6, 15]])
    ids = [NAMES[name] for name in ("<racm3:break>", size_name(1), size_name(2))]
    for row in ("ABCD", ["E", "F", "G", "BF"]):
        ids += [NAMES[f"IMGIMG{letters}Z"] for letters in row] + [NAMES[NEW_LINE]]
    ids.append(NAMES["<eoss>"])
    assert protocol.write(codes).tolist() == ids
    np.testing.assert_array_equal(protocol.parse(ids), codes)


@pytest.mark.parametrize(("area", "size"), BUCKETS)
def test_any_codes_in_forced_rows_are_an_image_of_every_bucket(area, size, published):
    height, width = (side // 16 for side in size)
    rng = np.random.default_rng(area + height)
    forced = force_rows(height * width, width, published.codebook_size)
    stream = np.where(forced < 0, rng.integers(0, 8192, len(forced)), forced)
    ends = [published.new_line, published.end]
    ids = np.concatenate([published.begin((height, width)), published.stream_ids[stream], ends])
    codes = published.parse(ids)
    np.testing.assert_array_equal(codes.reshape(-1), stream[forced < 0])
    np.testing.assert_array_equal(published.write(codes), ids)


def test_there_are_as_many_buckets_as_published():
    assert [sum(area == s for area, _ in BUCKETS) for s in (256, 512)] == [25, 49]


def change(place, *ids, drop=0):
    def apply(given):
        return [*given[:place], *ids, *given[place + drop :]]

    return apply


CODE, LINE = NAMES["IMGIMGAZ"], NAMES[NEW_LINE]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ids: [], "an image begins with <racm3:break> .*; there are 0 ids only"),
        (change(0, drop=1), "an image begins with <racm3:break>"),
        (change(1, CODE, drop=1), "the height of an image is one of .*; id 1 is"),
        (change(2, LINE, drop=1), "the width of an image is one of .*; id 2 is"),
        (change(HEAD_LENGTH + 2, drop=1), "row 0 of 2 has 3 codes, not 4: id 6 is"),
        (change(HEAD_LENGTH, CODE), "row 0 of 2 does not end behind its 4 codes"),
        (change(HEAD_LENGTH + 6, LINE, drop=1), f"row 1 of 2 has 1 codes, not 4: id 9 is {LINE}"),
        (change(HEAD_LENGTH + 9, drop=2), "row 1 of 2 does not end .*: there are 12 ids only"),
        (change(HEAD_LENGTH + 10, CODE), "behind its 2 rows an image ends with <eoss>"),
        (change(HEAD_LENGTH + 10, drop=1), "ends with <eoss> .*; there are 13 ids only"),
        (change(HEAD_LENGTH + 11, CODE), "ends with <eoss> .* nothing else; .*, of 15 ids"),
    ],
)
def test_what_is_no_image_is_refused_and_said_where(damage, message, protocol):
    ids = protocol.write(np.zeros((2, 4), np.int32)).tolist()
    with pytest.raises(ValueError, match=message):
        protocol.parse(damage(ids))


def test_every_id_changed_is_noticed(protocol):
    codes = np.arange(8).reshape(2, 4)
    ids = protocol.write(codes).tolist()
    for place in range(len(ids)):
        for other in NAMES.values():
            if other == ids[place]:
                continue
            damaged = change(place, other, drop=1)(ids)
            is_code = other in protocol.codes and ids[place] in protocol.codes
            if is_code:
                assert (protocol.parse(damaged) != codes).sum() == 1
            else:
                with pytest.raises(ValueError, match="image|row"):
                    protocol.parse(damaged)


def test_codes_and_grids_that_have_no_name_are_refused(protocol):
    with pytest.raises(ValueError, match="code 16 is out of range; allowed: 0 to 15"):
        protocol.write(np.full((2, 2), 16))
    with pytest.raises(ValueError, match="code -1 is out of range"):
        protocol.write(np.full((2, 2), -1))
    with pytest.raises(ValueError, match="grid of 3 rows has no size.* multiples of 2 from 2 to 6"):
        protocol.write(np.zeros((3, 2), int))
    with pytest.raises(ValueError, match="grid of 8 columns has no size"):
        protocol.begin((2, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"<eoss>": None, NEW_LINE: None}, "there is no <eoss>, <reserved08799>"),
        ({"IMGIMGDZ": None}, "code 3 has no name, though there are codes up to 15"),
        ({"IMGIMGADZ": 99}, "'IMGIMGADZ' names code 3 once more"),
        ({"IMGIMGKZ": 99}, "'IMGIMGKZ' names no code: IMGIMG, digits A to J, Z"),
        ({"<reserved08801>": None}, "there are no sizes, <reserved08801> and so on"),
        ({NEW_LINE: NAMES["<eoss>"]}, "two of the names that spell images share an id"),
        ({NEW_LINE: "x"}, "an id is no whole number"),
    ],
)
def test_a_vocabulary_that_spells_no_images_is_refused(changes, message):
    names = {name: i for name, i in (NAMES | changes).items() if i is not None}
    with pytest.raises(
        ValueError, match=f"{message}.*; give the tokenizer.json of the model's own"
    ):
        ImageProtocol.from_vocabulary(names)


def test_all_that_is_missing_is_said_at_once():
    with pytest.raises(ValueError, match=r"no <racm3:break>, .*no codes.*no sizes"):
        ImageProtocol.from_vocabulary({"a": 0})


def test_a_file_gives_what_its_vocabulary_gives(tmp_path, protocol):
    path = tiny_text.make_image_tokenizer(tmp_path / "tokenizer.json", NAMES)
    found = ImageProtocol.from_file(path)
    np.testing.assert_array_equal(found.stream_ids, protocol.stream_ids)
    assert found.sizes == protocol.sizes
    # Names may stand among the added tokens only.
    parsed = json.loads(path.read_text())
    added = [name for name in NAMES if name.startswith("<")]
    parsed["model"]["vocab"] = {n: i for n, i in parsed["model"]["vocab"].items() if n not in added}
    path.write_text(json.dumps(parsed))
    assert ImageProtocol.from_file(path).sizes == protocol.sizes
    with pytest.raises(FileNotFoundError, match="gone.json is missing"):
        ImageProtocol.from_file(tmp_path / "gone.json")
    for text in ("{", "[]", '{"model": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="tokenizer.json is no tokenizer of Hugging Face"):
            ImageProtocol.from_file(path)
