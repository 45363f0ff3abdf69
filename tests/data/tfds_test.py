import io
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from fake_tfds import write_dataset
from PIL import Image
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from maskgil_jax.data.errors import DatasetError, ImageReadError
from maskgil_jax.data.tfds import TFDSCaptionSource, TFDSSource

ROOT = pathlib.Path(__file__).parents[2]


def encode(value):
    file = io.BytesIO()
    Image.new("RGB" if value % 2 else "L", (9, 8 + value), value).save(file, "PNG")
    return file.getvalue()


def prepare(data_dir, *, encode=encode, **options):
    return write_dataset(data_dir, encode=encode, **options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    prepare(data_dir)
    return data_dir


def open_shapes(data_dir, split="train", name="shapes", **options):
    return TFDSSource(name, split, data_dir, **{"image_key": "picture", **options})


def test_records_are_rgb_images_with_labels(prepared):
    source = open_shapes(prepared)
    assert (len(source), source.num_classes, source.name) == (5, 3, "shapes/train")
    for index in range(5):
        record = source[index]
        assert record["image"].shape == (8 + index, 9, 3)
        # Number i is red level i, or grey where i is even.
        assert record["image"][0, 0].tolist() == [index, *([0, 0] if index % 2 else [index] * 2)]
        assert (record["image"].dtype, record["label"].dtype) == (np.uint8, np.int32)
        assert int(record["label"]) == index % 3
    assert len(open_shapes(prepared, "validation")) == 2
    assert len(open_shapes(prepared, "train[:40%]")) == 2
    with pytest.raises(IndexError):
        source[5]


def test_the_files_of_a_split_are_named(prepared):
    source = open_shapes(prepared)
    assert {file.parent for file in source.files} == {source._folder}
    assert all(file.is_file() and "-train." in file.name for file in source.files)
    assert open_shapes(prepared, "train[:1]").files == source.files[:1]


def test_newest_or_the_named_version_is_taken(tmp_path):
    prepare(tmp_path, version="1.9.0")
    prepare(tmp_path, version="1.10.0")
    assert "1.10.0" in repr(open_shapes(tmp_path))
    assert "1.9.0" in repr(open_shapes(tmp_path, name="shapes:1.9.0"))


def test_tensorflow_is_never_imported(prepared):
    script = """if True:
        import sys
        from maskgil_jax.data.tfds import TFDSSource
        source = TFDSSource("shapes", "train", sys.argv[1], image_key="picture")
        assert source[0]["image"].shape[2] == 3
        print(sorted({m.partition(".")[0] for m in sys.modules} & {"tensorflow", "torch"}))
        """
    command = [sys.executable, "-W", "error", "-c", script, str(prepared)]
    result = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


def test_missing_dataset_says_where_and_how_to_prepare(prepared, tmp_path):
    command = f"tfds build nosuch --file_format=array_record --data_dir={prepared}"
    with pytest.raises(DatasetError, match=f"'nosuch' is not prepared.*shapes/1.9.0.*{command}"):
        open_shapes(prepared, name="nosuch")
    with pytest.raises(DatasetError, match=f"prepared in {tmp_path}: nothing"):
        open_shapes(tmp_path)
    with pytest.raises(DatasetError, match=r"'shapes:2.0.0' is not prepared"):
        open_shapes(prepared, name="shapes:2.0.0")


def test_other_storage_format_is_refused(tmp_path):
    prepare(tmp_path, file_format="tfrecord")
    with pytest.raises(DatasetError, match=r"stored as tfrecord.*--file_format=array_record"):
        open_shapes(tmp_path)


def test_unknown_split_and_features_are_named(prepared):
    with pytest.raises(DatasetError, match=r"'test'.*\['train', 'validation'\]"):
        open_shapes(prepared, "test")
    with pytest.raises(DatasetError, match=r"'train\[:0\]' of TFDS dataset 'shapes' is empty"):
        open_shapes(prepared, "train[:0]")
    with pytest.raises(DatasetError, match=r"'image' is not there as Image.*'picture': 'Image'"):
        open_shapes(prepared, image_key="image")
    with pytest.raises(DatasetError, match=r"'title' is not there as ClassLabel.*'title': 'Text'"):
        open_shapes(prepared, label_key="title")


@pytest.mark.parametrize("keep", [None, 40_000, 66_000])
def test_missing_or_cut_file_is_noticed_at_once(tmp_path, keep):
    folder = prepare(tmp_path)
    shard = folder / "shapes-train.array_record-00001-of-00002"
    content = shard.read_bytes()
    shard.unlink()
    if keep:
        shard.write_bytes(content[:keep])
    with pytest.raises(DatasetError, match=r"'shapes' is damaged.*Prepare it"):
        open_shapes(tmp_path)
    assert len(open_shapes(tmp_path, "validation")) == 2


def test_damaged_image_is_named_or_replaced(tmp_path):
    prepare(tmp_path, encode=lambda i: encode(i)[:40] if i == 2 else encode(i))
    strict = open_shapes(tmp_path)
    with pytest.raises(ImageReadError, match=r"image 2 of shapes/train in .*shapes/1.9.0: "):
        strict[2]
    lenient = open_shapes(tmp_path, max_bad_images=1)
    with pytest.warns(UserWarning, match="1 unreadable so far, 1 allowed"):
        records = [lenient[i] for i in range(5)]
    assert [record["image"].shape[0] for record in records] == [8, 9, 11, 11, 12]


def test_flipped_bit_never_gives_another_record(tmp_path):
    shard = prepare(tmp_path) / "shapes-train.array_record-00001-of-00002"
    expected = [open_shapes(tmp_path)[i] for i in (3, 4)]
    content = shard.read_bytes()
    refused = 0
    for place in np.flatnonzero(np.frombuffer(content, np.uint8))[::25]:
        damaged = bytearray(content)
        damaged[place] ^= 16
        shard.write_bytes(damaged)
        try:
            source = open_shapes(tmp_path)
            records = [source[i] for i in (3, 4)]
        except DatasetError:
            refused += 1
        else:
            for record, original in zip(records, expected, strict=True):
                np.testing.assert_array_equal(record["image"], original["image"])
                assert record["label"] == original["label"]
    assert refused > 10


def test_unlabelled_records_are_refused(tmp_path):
    prepare(tmp_path, label=lambda i: -1)
    with pytest.raises(
        DatasetError, match=r"record 0 of shapes/train has label -1; allowed 0\.\.2"
    ):
        open_shapes(tmp_path)[0]


def prepare_captions(data_dir, captions=lambda i: [f"text {i}.{k}" for k in range(i % 2 + 1)]):
    """Like coco_captions: a sequence of texts per image, and a feature with a slash in its name."""
    folder = data_dir / "talk" / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "image/title": tfds.features.Text(),
            "captions": tfds.features.Sequence(
                {"id": tfds.features.Scalar(np.int64), "text": tfds.features.Text()}
            ),
        }
    )
    identity = DatasetIdentity("talk", tfds.core.Version("1.0.0"), str(folder), __name__)
    info = tfds.core.DatasetInfo(builder=identity, features=features, description="", homepage="")
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="talk", split="train", filetype_suffix="array_record"
    )
    writer = ArrayRecordWriter(
        str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1"
    )
    for i in range(4):
        record = {
            "image": io.BytesIO(encode(i)),
            "image/title": f"title {i}",
            "captions": [{"id": 0, "text": text} for text in captions(i)],
        }
        writer.write(features.serialize_example(features.encode_example(record)))
    writer.close()
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[4], num_bytes=1, filename_template=template
    )
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(folder)


def test_captions_are_read_from_nested_features(tmp_path):
    prepare_captions(tmp_path)
    source = TFDSCaptionSource("talk", "train", tmp_path)
    assert len(source) == 4
    assert source[0]["caption"] == "text 0.0"
    assert source[3]["caption"].tolist() == ["text 3.0", "text 3.1"]
    assert [source.captions(i) for i in (0, 3)] == [("text 0.0",), ("text 3.0", "text 3.1")]
    assert source[3]["image"].shape == (11, 9, 3)
    assert [source.image_size(i) for i in range(4)] == [(8 + i, 9) for i in range(4)]
    titles = TFDSCaptionSource("talk", "train[2:]", tmp_path, caption_key="image/title")
    assert [titles[i]["caption"] for i in range(2)] == ["title 2", "title 3"]
    assert titles.name != source.name


@pytest.mark.parametrize("key", ["nosuch", "captions", "captions/id", "captions/text/x", "image"])
def test_a_feature_that_is_no_text_is_refused(tmp_path, key):
    prepare_captions(tmp_path)
    with pytest.raises(DatasetError, match=rf"{key!r} is not there as Text.*'captions': 'Seq"):
        TFDSCaptionSource("talk", "train", tmp_path, caption_key=key)


def test_records_without_a_caption_are_named(tmp_path):
    texts = [["good"], [], ["good", " "], [b"\xff"]]
    prepare_captions(tmp_path, lambda i: texts[i])
    source = TFDSCaptionSource("talk", "train", tmp_path)
    assert source[0]["caption"] == "good"
    for index, match in [(1, "has no caption"), (2, "has an empty caption"), (3, "is not UTF-8")]:
        with pytest.raises(DatasetError, match=rf"\b{index} of talk/train captions/text .*{match}"):
            source[index]
