import dataclasses
import json
import shutil

import numpy as np
import pytest

from maskgil_jax.data.errors import DatasetError
from maskgil_jax.data.pipeline import make_bucketed_loader
from maskgil_jax.data.token_buckets import describe_token_buckets, open_token_buckets
from maskgil_jax.data.token_dataset import (
    FeaturedRecord,
    TextOrigin,
    TokenDataset,
    TokenizerOrigin,
    TokenRecord,
)
from maskgil_jax.data.token_records import write_shard
from maskgil_jax.data.transforms import Chain, PickCaption, PickCrop

DATASET = TokenDataset(
    tokenizer=TokenizerOrigin(
        family="llamagen-vq",
        path="somewhere",
        fingerprint="ab" * 32,
        codebook_size=32,
        downsample_factor=4,
        dtype="float32",
    ),
    source="pictures",
    source_records=1,
    num_classes=None,
    has_captions=True,
    image_size=(8, 8),
    crops=("center",),
    batch_size=4,
    num_shards=1,
)
COUNTS = {(8, 8): 6, (4, 16): 2, (16, 4): 1}


def write_bucket(folder, size, count, **changes):
    """Write records whose codes are all their number."""
    dataset = dataclasses.replace(DATASET, image_size=size, source_records=count, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        TokenRecord(
            tokens=np.full((len(dataset.crops), *dataset.grid), number),
            index=number,
            captions=tuple(f"{number} of {size}, {k}" for k in range(number + 1)),
        )
        for number in range(count)
    ]
    if dataset.text is not None:
        one = np.ones((2, dataset.text.width), np.float32)
        records = [FeaturedRecord(**vars(r), features=(one,) * len(r.captions)) for r in records]
    shard = write_shard(folder / dataset.shard_name(0), folder / "x", records, dataset.layout)
    dataset = dataclasses.replace(dataset, shards=(shard,))
    (folder / "dataset.json").write_text(dataset.to_json())
    return dataset


@pytest.fixture
def folder(tmp_path):
    datasets = {
        size: write_bucket(tmp_path / f"{size[0]}x{size[1]}", size, count)
        for size, count in COUNTS.items()
    }
    (tmp_path / "buckets.json").write_text(describe_token_buckets(datasets))
    return tmp_path


def test_every_bucket_is_a_source_of_its_grid(folder):
    sources = open_token_buckets(folder, captions=True)
    assert {size: len(source) for size, source in sources.items()} == COUNTS
    assert sources[4, 16][1]["tokens"].shape == (1, 1, 4)
    assert sources[16, 4][0]["caption"] == "0 of (16, 4), 0"
    assert sources[4, 16][1]["caption"].tolist() == ["1 of (4, 16), 0", "1 of (4, 16), 1"]
    entries = json.loads((folder / "buckets.json").read_text())["buckets"]
    assert entries[0] == {"folder": "4x16", "image_size": [4, 16], "grid": [1, 4], "count": 2}


def test_batches_of_stored_tokens_are_of_one_grid(folder):
    loader = make_bucketed_loader(
        open_token_buckets(folder, captions=True),
        batch_size=2,
        seed=0,
        make_transform=lambda size: Chain(transforms=(PickCrop(), PickCaption())),
    )
    shapes = []
    for batch in [next(loader) for _ in range(18)]:
        _, rows, columns = batch["tokens"].shape
        shapes.append((rows * 4, columns * 4))
        for tokens, caption in zip(batch["tokens"], batch["caption"], strict=True):
            assert str(caption).startswith(f"{tokens[0, 0]} of {shapes[-1]}, ")
    assert {size: shapes.count(size) for size in COUNTS} == {
        size: 2 * count for size, count in COUNTS.items()
    }


def test_a_folder_of_one_grid_is_opened_too(folder):
    sources = open_token_buckets(folder / "8x8")
    assert list(sources) == [(8, 8)]
    assert sources[8, 8][0].keys() == {"tokens"}


def test_a_bucket_that_is_missing_or_another_is_named(folder):
    shutil.rmtree(folder / "16x4")
    with pytest.raises(DatasetError, match=r"16x4 holds no token records: dataset.json is missing"):
        open_token_buckets(folder)
    write_bucket(folder / "16x4", (16, 4), 2)
    with pytest.raises(DatasetError, match=r"16x4 holds 2 records .*buckets.json says 1; extract"):
        open_token_buckets(folder)
    other = dataclasses.replace(DATASET.tokenizer, fingerprint="cd" * 32)
    write_bucket(folder / "16x4", (16, 4), 1, tokenizer=other)
    with pytest.raises(DatasetError, match="do not belong together: 4x16 has tokens of abab.*cdcd"):
        open_token_buckets(folder)
    text = TextOrigin(
        name="gemma",
        path="gemma",
        fingerprint="ef" * 32,
        hidden_layer=-1,
        width=3,
        dtype="float32",
        length=4,
    )
    write_bucket(folder / "16x4", (16, 4), 1, text=text)
    with pytest.raises(DatasetError, match="has .* captions, 16x4 has .* float32 features of efef"):
        open_token_buckets(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda fields: fields.update(version=2), "this release reads"),
        (lambda fields: fields.pop("format"), "cannot be read: 'format'; restore it"),
        (lambda fields: fields.update(buckets=[]), "it lists no buckets"),
        (lambda fields: fields["buckets"][0].update(image_size=[4]), "cannot be read: not enough"),
        (lambda fields: fields.update(buckets=3), "cannot be read"),
    ],
)
def test_a_damaged_list_is_refused(folder, change, match):
    file = folder / "buckets.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))
    with pytest.raises(DatasetError, match=match):
        open_token_buckets(folder)


def test_a_folder_without_a_list_is_refused(folder):
    (folder / "buckets.json").write_text("{")
    with pytest.raises(DatasetError, match=r"buckets.json cannot be read: Expecting"):
        open_token_buckets(folder)
    (folder / "buckets.json").unlink()
    with pytest.raises(DatasetError, match=r"dataset.json and buckets.json are missing; they are"):
        open_token_buckets(folder)
