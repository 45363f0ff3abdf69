import dataclasses
import json
import math
import os

import numpy as np
import pytest
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter

from maskgil_jax import checkpoints
from maskgil_jax.data import token_dataset, token_records
from maskgil_jax.data.errors import DatasetError
from maskgil_jax.data.pipeline import make_loader
from maskgil_jax.data.token_dataset import (
    FEATURE_TYPES,
    FeaturedRecord,
    Layout,
    Shard,
    TextOrigin,
    TokenDataset,
    TokenizerOrigin,
    TokenRecord,
)
from maskgil_jax.data.token_records import TokenRecordSource, write_shard
from maskgil_jax.data.transforms import PickCrop

MAKER = TokenizerOrigin(
    family="llamagen-vq",
    path="somewhere",
    fingerprint="ab" * 32,
    codebook_size=32,
    downsample_factor=4,
    dtype="float32",
)
DATASET = TokenDataset(
    tokenizer=MAKER,
    source="pictures/train",
    source_records=10,
    num_classes=3,
    has_captions=False,
    image_size=(8, 12),
    crops=("center", "center_flip"),
    batch_size=4,
    num_shards=3,
)


def make_record(index, dataset=DATASET):
    rng = np.random.default_rng(index)
    shape = (len(dataset.crops), *dataset.grid)
    return TokenRecord(
        tokens=rng.integers(dataset.tokenizer.codebook_size, size=shape),
        index=index,
        label=None if dataset.num_classes is None else index % dataset.num_classes,
        captions=(f"Bild {index}: schön",) if dataset.has_captions else (),
    )


def write_folder(folder, dataset=DATASET, skipped=(), change=lambda record: record, layout=None):
    """Write a whole folder; `change` may spoil records where `layout` lets it."""
    folder.mkdir(exist_ok=True)
    shards = []
    for i in range(dataset.num_shards):
        share = dataset.shard_range(i)
        records = [change(make_record(j, dataset)) for j in share if j not in skipped]
        file = folder / dataset.shard_name(i)
        shard = write_shard(file, folder / "partial", records, layout or dataset.layout)
        out = tuple((j, "unreadable") for j in share if j in skipped)
        shards.append(dataclasses.replace(shard, skipped=out))
    dataset = dataclasses.replace(dataset, shards=tuple(shards))
    (folder / "dataset.json").write_text(dataset.to_json())
    return dataset


def test_records_come_back_in_the_order_of_the_source(tmp_path):
    write_folder(tmp_path)
    source = TokenRecordSource(tmp_path)
    assert len(source) == 10
    assert source.num_classes == 3
    for i in range(10):
        record, expected = source[i], make_record(i)
        assert record.keys() == {"tokens", "label"}
        np.testing.assert_array_equal(record["tokens"], expected.tokens)
        assert (record["tokens"].dtype, record["label"].dtype) == (np.int32, np.int32)
        assert (int(record["label"]), record["label"].shape) == (i % 3, ())
        assert source.read(i).index == i
    np.testing.assert_array_equal(source[-1]["tokens"], source[9]["tokens"])
    with pytest.raises(IndexError):
        source[10]
    assert "pictures/train" in source.name
    assert "abababababab" in source.name  # of which tokenizer: a resumed run compares the name


def test_captions_are_kept_and_labels_may_be_missing(tmp_path):
    write_folder(tmp_path, dataclasses.replace(DATASET, has_captions=True, num_classes=None))
    source = TokenRecordSource(tmp_path)
    assert source.num_classes is None
    assert source[4].keys() == {"tokens"}
    assert source.read(4).captions == ("Bild 4: schön",)
    assert source.read(4).label is None
    texts = TokenRecordSource(tmp_path, captions=True)
    assert texts[4].keys() == {"tokens", "caption"}
    assert texts[4]["caption"] == "Bild 4: schön"
    assert texts.name == source.name


def test_several_captions_of_an_image_are_kept(tmp_path):
    def change(record):
        return dataclasses.replace(
            record, captions=("ä" * record.index, "", "drei")[record.index :]
        )

    dataset = dataclasses.replace(DATASET, has_captions=True, source_records=3)
    write_folder(tmp_path, dataset, change=change)
    source = TokenRecordSource(tmp_path, captions=True)
    assert source[0]["caption"].tolist() == ["", "", "drei"]
    assert source[1]["caption"].tolist() == ["", "drei"]
    assert source[2]["caption"] == "drei"
    assert source[2].keys() == {"tokens", "caption"}  # not the label


def test_captions_that_do_not_fill_their_bytes_are_damage():
    lay = Layout(codebook_size=4, grid=(1, 2), crops=1, num_classes=None, has_captions=True)
    record = TokenRecord(tokens=np.array([[[0, 3]]]), index=7, captions=("one", "two"))
    arrays = safetensors.numpy.load(lay.encode(record))
    for lengths in [[3, 2], [3, 4], [7, -1], []]:
        data = safetensors.numpy.save(arrays | {"caption_lengths": np.asarray(lengths, np.int32)})
        with pytest.raises(DatasetError, match="caption_lengths end at"):
            lay.decode(data)


def test_captions_that_are_not_there_are_refused(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(DatasetError, match="have no captions; extract them again with --captions"):
        TokenRecordSource(tmp_path, captions=True)


@pytest.mark.parametrize(
    ("codes", "dtype"), [(65536, "uint16"), (65537, "uint32"), (2**18, "uint32")]
)
def test_the_largest_code_survives_in_the_smallest_type(tmp_path, codes, dtype):
    maker = dataclasses.replace(MAKER, codebook_size=codes)
    dataset = dataclasses.replace(DATASET, tokenizer=maker)

    def top(record):
        return dataclasses.replace(record, tokens=np.full_like(record.tokens, codes - 1))

    write_folder(tmp_path, dataset, change=top)
    assert json.loads((tmp_path / "dataset.json").read_text())["dtype"] == dtype
    assert (TokenRecordSource(tmp_path)[3]["tokens"] == codes - 1).all()


def test_images_that_were_skipped_are_counted_out(tmp_path):
    write_folder(tmp_path, skipped=(0, 4, 5, 9))
    source = TokenRecordSource(tmp_path)
    assert [source.read(i).index for i in range(len(source))] == [1, 2, 3, 6, 7, 8]


def test_a_shard_may_be_empty_but_not_all(tmp_path):
    write_folder(tmp_path / "some", skipped=(0, 1, 2))
    assert TokenRecordSource(tmp_path / "some").read(0).index == 3
    write_folder(tmp_path / "none", skipped=range(10))
    with pytest.raises(DatasetError, match="holds no records"):
        TokenRecordSource(tmp_path / "none")


def test_the_same_records_give_the_same_bytes(tmp_path):
    first = write_folder(tmp_path / "a")
    second = write_folder(tmp_path / "b")
    assert [shard.sha256 for shard in first.shards] == [shard.sha256 for shard in second.shards]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_training_sees_every_crop_and_each_record_draws_its_own(tmp_path):
    write_folder(tmp_path)
    loader = make_loader(
        TokenRecordSource(tmp_path), batch_size=5, seed=0, transform=PickCrop(), num_threads=2
    )
    whole = {make_record(i).tokens.tobytes(): i for i in range(10)}
    assert len(whole) == 10
    seen = []
    for _ in range(20):
        batch = next(loader)
        assert batch["tokens"].shape == (5, 2, 3)
        for tokens, label in zip(batch["tokens"], batch["label"], strict=True):
            found = [
                (i, crop)
                for i in range(10)
                for crop in range(2)
                if i % 3 == label and (make_record(i).tokens[crop] == tokens).all()
            ]
            assert len(found) == 1
            seen += found
    assert set(seen) == {(i, crop) for i in range(10) for crop in range(2)}
    share = sum(crop for _, crop in seen) / len(seen)
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / len(seen))


def test_a_run_does_not_resume_with_other_tokens_of_as_many_images(tmp_path):
    crops = dataclasses.replace(DATASET, crops=("center", "else"))
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "same", crops)
    write_folder(
        tmp_path / "b", change=lambda r: dataclasses.replace(r, tokens=r.tokens[::-1].copy())
    )

    def open_loader(name):
        return make_loader(TokenRecordSource(tmp_path / name), batch_size=5, seed=0, num_threads=0)

    state = open_loader("a").get_state()
    open_loader("same").set_state(state)
    with pytest.raises(ValueError, match="other data: source was 'pictures/train tokens ab"):
        open_loader("b").set_state(state)


def test_names_that_are_no_text_are_kept(tmp_path):
    name = os.fsdecode(b"stra\xdfe/\xff.png")
    dataset = write_folder(tmp_path, dataclasses.replace(DATASET, source=name))
    checkpoints.write_text_atomically(tmp_path / "dataset.json", dataset.to_json())
    assert TokenRecordSource(tmp_path).dataset.source == name


def test_pick_crop_takes_one_number_of_the_generator_whatever_the_crops():
    rng = np.random.default_rng(3)
    record = {"tokens": np.arange(3 * 4).reshape(3, 2, 2), "label": np.int32(1)}
    picked = PickCrop()(record, rng)
    assert picked["tokens"].shape == (2, 2)
    assert record["tokens"].shape == (3, 2, 2)
    chosen = {int(PickCrop()(record, np.random.default_rng(i))["tokens"][0, 0]) for i in range(30)}
    assert chosen == {0, 4, 8}


def spoil(folder, how):
    """Damage a folder; return the message that must tell of it."""
    file = folder / DATASET.shard_name(1)
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
        return r"tokens-00001-of-00003.array_record: it is missing"
    if how == "cut":
        file.write_bytes(content[:-1])
        return r"tokens-00001-of-00003.array_record: it has [\d,]+ bytes, not [\d,]+: cut short"
    if how == "swapped":
        other = folder / DATASET.shard_name(2)
        file.write_bytes(other.read_bytes())
        return r"tokens-00001-of-00003.array_record: .*(SHA-256|bytes)"
    if how == "flipped":
        content[len(content) // 3] ^= 1
        file.write_bytes(content)
        return r"tokens-00001-of-00003.array_record: its SHA-256 is another"
    raise AssertionError(how)


@pytest.mark.parametrize("how", ["missing", "cut", "swapped", "flipped"])
def test_a_damaged_shard_is_named_at_opening(tmp_path, how):
    write_folder(tmp_path)
    with pytest.raises(DatasetError, match=spoil(tmp_path, how)):
        TokenRecordSource(tmp_path)


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_size_and_presence_are_checked_even_where_records_are_not(tmp_path, how):
    write_folder(tmp_path)
    with pytest.raises(DatasetError, match=spoil(tmp_path, how)):
        TokenRecordSource(tmp_path, check_records=False)


def rewrite(folder, i, payloads):
    """Replace the records of a shard by others, and have `dataset.json` vouch for them."""
    file = folder / DATASET.shard_name(i)
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for payload in payloads:
        writer.write(payload)
    writer.close()
    dataset = json.loads((folder / "dataset.json").read_text())
    dataset["shards"][i]["sha256"] = token_records.hashlib.sha256(file.read_bytes()).hexdigest()
    dataset["shards"][i]["size"] = file.stat().st_size
    (folder / "dataset.json").write_text(json.dumps(dataset))


def payloads(i, change, layout=DATASET.layout):
    return [layout.encode(change(make_record(j))) for j in DATASET.shard_range(i)]


def outside(record):
    tokens = record.tokens.copy()
    if record.index == 4:
        tokens[1, 0, 2] = 32
    return dataclasses.replace(record, tokens=tokens)


WRONG_RECORDS = {
    "code": (
        payloads(1, outside, dataclasses.replace(DATASET.layout, codebook_size=64)),
        r"record 1 of .*tokens-00001-of-00003.array_record: code 32 is outside the codebook; "
        r"allowed 0\.\.31; extract",
    ),
    "grid": (
        payloads(
            1,
            lambda r: dataclasses.replace(r, tokens=r.tokens[:, :1]),
            dataclasses.replace(DATASET.layout, grid=(1, 3)),
        ),
        r"record 0 of .*tokens-00001.*shape \(2, 1, 3\); expected \(2, 2, 3\)",
    ),
    "type": (
        payloads(1, lambda r: r, dataclasses.replace(DATASET.layout, codebook_size=2**18)),
        r"record 0 of .*tokens-00001.*tokens is uint32 with 3 axes; expected uint16 with 3",
    ),
    "label": (
        payloads(
            1,
            lambda r: dataclasses.replace(r, label=3),
            dataclasses.replace(DATASET.layout, num_classes=4),
        ),
        r"record 0 of .*tokens-00001.*label 3; allowed 0\.\.2",
    ),
    "no label": (
        payloads(
            1,
            lambda r: dataclasses.replace(r, label=None),
            dataclasses.replace(DATASET.layout, num_classes=None),
        ),
        r"record 0 of .*tokens-00001.*label None where num_classes is 3",
    ),
    "rubbish": ([b"no tensors", b"", b"{}"], r"record 0 of .*tokens-00001.*it is no token record"),
    "doubled": (
        [DATASET.layout.encode(make_record(j)) for j in (3, 3, 4)],
        r"record 1 of .*tokens-00001.* is of image 3 where 4 is expected: lost or doubled",
    ),
}


@pytest.mark.parametrize("how", WRONG_RECORDS)
def test_a_wrong_record_is_named_before_training(tmp_path, how):
    write_folder(tmp_path)
    records, message = WRONG_RECORDS[how]
    rewrite(tmp_path, 1, records)
    with pytest.raises(DatasetError, match=message):
        TokenRecordSource(tmp_path)


@pytest.mark.parametrize("how", ["code", "grid", "type", "label", "rubbish"])
def test_a_wrong_record_is_named_when_it_is_read(tmp_path, how):
    write_folder(tmp_path)
    records, message = WRONG_RECORDS[how]
    rewrite(tmp_path, 1, records)
    source = TokenRecordSource(tmp_path, check_records=False)
    assert source[0]["tokens"].shape == (2, 2, 3)
    with pytest.raises(DatasetError, match=message):
        [source[i] for i in range(3, 6)]


def test_a_record_too_few_shows_even_where_records_are_not_checked(tmp_path):
    write_folder(tmp_path)
    rewrite(tmp_path, 1, WRONG_RECORDS["doubled"][0][:2])
    with pytest.raises(DatasetError, match="tokens-00001.*it holds 2 records, not 3"):
        TokenRecordSource(tmp_path, check_records=False)


def test_no_flipped_byte_changes_what_is_read(tmp_path):
    write_folder(tmp_path)
    file = tmp_path / DATASET.shard_name(1)
    content = file.read_bytes()
    # The rest of the file is padding.
    used = [i for i, byte in enumerate(content) if byte]
    refusals = []
    for place in np.random.default_rng(0).choice(used, 60, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        file.write_bytes(damaged)
        try:
            source = TokenRecordSource(tmp_path, check_records=False)
            for i in range(3, 6):
                np.testing.assert_array_equal(source[i]["tokens"], make_record(i).tokens)
        except DatasetError as error:
            refusals.append(str(error))
    assert len(refusals) > 20
    assert all("tokens-00001" in text for text in refusals)


def change_json(folder, change):
    file = folder / "dataset.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "does not say format 'maskgil_jax.tokens'"),
        (lambda d: d.update(version=2), "version 2; this release reads 1"),
        (lambda d: d.pop("crops"), "crops of its data set is missing"),
        (lambda d: d.update(colour=1), "colour of its data set is unknown"),
        (lambda d: d.update(grid=[3, 2]), r"grid \[3, 2\] must be \[2, 3\]"),
        (lambda d: d.update(count=11), "count 11 must be 10"),
        (lambda d: d.update(dtype="uint32"), "dtype uint32 must be uint16"),
        (lambda d: d.update(image_size=[8, 11]), "not divisible by the tokenizer's 4"),
        (lambda d: d.update(image_size=[8, "12"]), "must be height and width in pixels"),
        (lambda d: d.update(num_classes="3"), "num_classes '3' must be of type int"),
        (lambda d: d["tokenizer"].update(fingerprint="ab"), "fingerprint 'ab' is no SHA-256"),
        (lambda d: d["tokenizer"].pop("family"), "family of its tokenizer is missing"),
        (lambda d: d["shards"][1].update(skipped=[["0", "bad"]]), "is no number with a reason"),
        (lambda d: d["shards"].append(3), "shard 3 has no fields"),
        (lambda d: d.update(count=True), "count True must be of type int"),
        (lambda d: d.update(crops=[]), "crops are empty"),
        (lambda d: d["shards"][0].update(name="../x"), r"shard '\.\./x'"),
        (lambda d: d["shards"].reverse(), "names the shards .*tokens-00002.*; expected"),
        (lambda d: d["shards"][0].update(skipped=[[0, "bad"]]), "3 records and 1 skipped .* 3"),
        (lambda d: d.update(shards=[]), "count 10 must be 0"),
    ],
)
def test_a_wrong_dataset_json_is_refused(tmp_path, change, message):
    write_folder(tmp_path)
    change_json(tmp_path, change)
    with pytest.raises(DatasetError, match=message):
        TokenRecordSource(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"format": "maskgil_jax.tokens"}'])
def test_a_damaged_dataset_json_is_refused(tmp_path, text):
    write_folder(tmp_path)
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DatasetError, match=r"dataset\.json cannot be read"):
        TokenRecordSource(tmp_path)


def test_an_unfinished_extraction_is_refused(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(DatasetError, match=r"dataset\.json is missing.*cut short, start it again"):
        TokenRecordSource(tmp_path)
    with pytest.raises(DatasetError, match=r"dataset\.json is missing"):
        TokenRecordSource(tmp_path / "nowhere")


def test_the_writer_refuses_what_the_reader_would(tmp_path):
    lay = Layout(codebook_size=4, grid=(1, 2), crops=1, num_classes=2, has_captions=True)
    good = TokenRecord(tokens=np.array([[[0, 3]]]), index=7, label=1, captions=("a",))
    assert dataclasses.asdict(lay.decode(lay.encode(good))) | {"tokens": None} == {
        "tokens": None,
        "index": 7,
        "label": 1,
        "captions": ("a",),
    }
    for fields, message in [
        ({"tokens": np.array([[[0, 4]]])}, r"code 4 is outside the codebook; allowed 0\.\.3"),
        ({"tokens": np.array([[[-1, 0]]])}, "code -1 is outside"),
        ({"tokens": np.array([[[0]]])}, r"shape \(1, 1, 1\)"),
        ({"label": 2}, r"label 2; allowed 0\.\.1"),
        ({"captions": ()}, r"captions \(\) where has_captions True"),
    ]:
        records = [good, dataclasses.replace(good, **fields)]
        with pytest.raises(DatasetError, match=message):
            write_shard(tmp_path / "shard", tmp_path / "partial", records, lay)
        assert not list(tmp_path.iterdir())


def test_settings_that_differ_are_listed_without_the_path():
    maker = dataclasses.replace(MAKER, path="elsewhere")
    shards = (Shard(name="a", count=1, size=1, sha256="0"),)
    assert DATASET.differences(dataclasses.replace(DATASET, tokenizer=maker, shards=shards)) == []
    maker = dataclasses.replace(MAKER, fingerprint="cd" * 32)
    other = dataclasses.replace(DATASET, tokenizer=maker, crops=("center",), num_shards=4)
    assert [line.split(":")[0] for line in DATASET.differences(other)] == [
        "tokenizer.fingerprint",
        "crops",
        "num_shards",
    ]


TEXT = TextOrigin(
    name="gemma",
    path="somewhere",
    fingerprint="ef" * 32,
    hidden_layer=-2,
    width=3,
    dtype="bfloat16",
    length=6,
)
FEATURED = dataclasses.replace(DATASET, has_captions=True, text=TEXT)


def add_features(record, dtype="bfloat16"):
    """Give text k of image i (i + k) % 6 + 1 tokens, and every third image another text."""
    captions = record.captions + ("zwei",) * (record.index % 3 == 1)
    rng = np.random.default_rng(record.index)
    features = tuple(
        rng.standard_normal(((record.index + k) % 6 + 1, 3)).astype(FEATURE_TYPES[dtype])
        for k in range(len(captions))
    )
    return FeaturedRecord(**vars(record) | {"captions": captions}, features=features)


@pytest.mark.parametrize("dtype", FEATURE_TYPES)
def test_features_come_back_bit_for_bit_in_their_type(tmp_path, dtype):
    dataset = dataclasses.replace(FEATURED, text=dataclasses.replace(TEXT, dtype=dtype))
    write_folder(tmp_path, dataset, change=lambda record: add_features(record, dtype))
    source = TokenRecordSource(tmp_path, captions=True, features=True)
    assert source.dataset.text == dataset.text
    for i in range(10):
        expected = add_features(make_record(i, FEATURED), dtype)
        found = source[i]
        assert found.keys() == {"tokens", "caption", "features"}
        assert len(found["features"]) == np.size(found["caption"]) == 1 + (i % 3 == 1)
        for one, other in zip(found["features"], expected.features, strict=True):
            assert one.dtype == other.dtype == FEATURE_TYPES[dtype]
            assert one.tobytes() == other.tobytes()
    assert TokenRecordSource(tmp_path, captions=True)[0].keys() == {"tokens", "caption"}
    assert TokenRecordSource(tmp_path)[0].keys() == {"tokens", "label"}
    # As any reader of the format sees them.
    arrays = dict(safetensors.deserialize(dataset.layout.encode(expected)))
    stored = arrays["features"]
    code = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    assert (stored["dtype"], list(stored["shape"])) == (code, [4, 3])


def test_without_features_the_format_is_what_it_was():
    digest = token_records.hashlib.sha256()
    captioned = dataclasses.replace(DATASET, has_captions=True)
    for dataset in (DATASET, captioned):
        digest.update(dataset.to_json().encode())
        for i in range(10):
            digest.update(dataset.layout.encode(make_record(i, dataset)))
    assert digest.hexdigest() == "e6c1f3cc054fb32833738cb6c5f9caf3218de9ee3015ce1511c96fc0192e2659"
    fields = json.loads(FEATURED.to_json())
    assert (fields["version"], fields["text"]) == (2, dataclasses.asdict(TEXT))
    assert TokenDataset.from_json(FEATURED.to_json()) == FEATURED


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([(2, 4)], r"features are bfloat16 \(2, 4\); expected bfloat16 of width 3"),
        ([(7, 3)], "features of 7 tokens of a text; allowed: 6"),
        ([], "features of 0 texts; expected those of 1"),
        ([(1, 3), (1, 3)], "features of 2 texts; expected those of 1"),
    ],
)
def test_features_of_another_shape_are_not_written(features, message):
    arrays = tuple(np.zeros(shape, FEATURE_TYPES["bfloat16"]) for shape in features)
    record = FeaturedRecord(**vars(make_record(0, FEATURED)), features=arrays)
    with pytest.raises(DatasetError, match=message):
        FEATURED.layout.encode(record)


def test_features_of_another_type_or_that_are_no_numbers_are_not_written():
    record = make_record(0, FEATURED)
    wide = FeaturedRecord(**vars(record), features=(np.zeros((2, 3), np.float32),))
    with pytest.raises(DatasetError, match=r"features are float32 \(2, 3\); expected bfloat16"):
        FEATURED.layout.encode(wide)
    lost = np.full((2, 3), np.inf, FEATURE_TYPES["bfloat16"])
    with pytest.raises(DatasetError, match="are no finite numbers"):
        FEATURED.layout.encode(dataclasses.replace(wide, features=(lost,)))
    with pytest.raises(DatasetError, match="features of 0 texts; expected those of 1"):
        FEATURED.layout.encode(record)
    with pytest.raises(DatasetError, match="features of 1 texts; expected those of 0"):
        dataclasses.replace(FEATURED, text=None).layout.encode(wide)


def test_features_that_do_not_make_up_their_lengths_are_damage():
    record = add_features(make_record(1, FEATURED))
    arrays = token_dataset._load_arrays(FEATURED.layout.encode(record))
    assert arrays["feature_lengths"].tolist() == [2, 3]
    for lengths in ([2, 2], [6, -1], [2, 4], []):
        changed = arrays | {"feature_lengths": np.asarray(lengths, np.int32)}
        with pytest.raises(DatasetError, match="do not make up the 5 features"):
            FEATURED.layout.decode(safetensors.numpy.save(changed))
    del arrays["features"]
    with pytest.raises(DatasetError, match="it is no token record: 'features'"):
        FEATURED.layout.decode(safetensors.numpy.save(arrays))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=1), "version 1; this release reads 2 with features"),
        (lambda d: d.pop("text"), "version 2; this release reads 1 without features"),
        (lambda d: d["text"].pop("width"), "width of its text is missing"),
        (lambda d: d["text"].update(dtype="float16"), "dtype 'float16' .*: float32, bfloat16"),
        (lambda d: d["text"].update(length=0), "width 3 and length 0 must be at least 1"),
        (lambda d: d["text"].update(fingerprint="ef"), "fingerprint 'ef' is no SHA-256"),
        (lambda d: d.update(text=None), "text None must be of type dict"),
        (lambda d: d.update(has_captions=False), "has_captions is false"),
    ],
)
def test_a_wrong_word_on_features_is_refused(tmp_path, change, message):
    write_folder(tmp_path, FEATURED, change=add_features)
    change_json(tmp_path, change)
    with pytest.raises(DatasetError, match=message):
        TokenRecordSource(tmp_path)


def test_another_text_encoder_is_another_setting_wherever_it_lies():
    moved = dataclasses.replace(TEXT, path="elsewhere", name="other")
    assert FEATURED.differences(dataclasses.replace(FEATURED, text=moved)) == []
    other = dataclasses.replace(TEXT, fingerprint="cd" * 32, length=5)
    assert FEATURED.differences(dataclasses.replace(FEATURED, text=other)) == [
        f"text.fingerprint: '{'ef' * 32}' → '{'cd' * 32}'",
        "text.length: 6 → 5",
    ]
