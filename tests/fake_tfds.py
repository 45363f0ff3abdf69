"""Prepared datasets of TensorFlow Datasets, small, written without TensorFlow."""

import io
import itertools
import types

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.dataset_info import DatasetIdentity

SPLITS = types.MappingProxyType({"train": (3, 2), "validation": (2,)})


def write_dataset(
    data_dir,
    *,
    encode,
    label=lambda i: i % 3,
    version="1.9.0",
    file_format="array_record",
    image_key="picture",
    splits=SPLITS,
):
    """Write the dataset `shapes` as `tfds build` does, and return its folder.

    Image i of a split has the bytes `encode(i)`; `splits` has the images of every shard.
    """
    folder = data_dir / "shapes" / version
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            image_key: tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=["circle", "square", "star"]),
            "title": tfds.features.Text(),
        }
    )
    identity = DatasetIdentity("shapes", tfds.core.Version(version), str(folder), __name__)
    info = tfds.core.DatasetInfo(builder=identity, features=features, description="", homepage="")
    info.set_file_format(file_format)
    infos = []
    for split, shard_lengths in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="shapes", split=split, filetype_suffix=file_format
        )
        numbers = itertools.count()
        for shard, length in enumerate(shard_lengths):
            path = template.sharded_filepath(shard_index=shard, num_shards=len(shard_lengths))
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for i in itertools.islice(numbers, length):
                record = {
                    image_key: io.BytesIO(encode(i)),
                    "label": label(i),
                    "title": f"number {i}",
                }
                writer.write(features.serialize_example(record))
            writer.close()
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=list(shard_lengths),
                num_bytes=1,
                filename_template=template,
            )
        )
    info.set_splits(tfds.core.splits.SplitDict(infos))
    info.write_to_directory(folder)
    return folder
