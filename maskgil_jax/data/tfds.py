"""A prepared TensorFlow Datasets directory as a source, read without TensorFlow.

Only datasets stored as ArrayRecord can be read by index; the images are decoded here, so that
damaged ones are named and every colour mode becomes RGB.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from maskgil_jax.data.errors import DatasetError, ImageReadError
from maskgil_jax.data.images import Record, TolerantReader, decode_rgb

_METADATA = "dataset_info.json"


class TFDSSource:
    """Give a prepared classification dataset as `{"image": uint8 [H W 3], "label": int32 []}`.

    Args:
      name: as TFDS names it, "imagenet2012", "name/config", "name:1.0.0" or "name/config:1.0.0";
        without a version the newest prepared one.
      split: "train", "validation", or a part such as "train[:10%]".
      data_dir: folder the dataset was prepared in.
      image_key, label_key: features to read, an Image and a ClassLabel.
      max_bad_images: how many unreadable images may be replaced by the next readable one, each
        with a warning; one more is an error.

    Attributes:
      name: with the split, as they were given.
      files: the files that hold the split, in one folder, sorted.

    Raises:
      DatasetError: the dataset is not prepared there, not as ArrayRecord or not completely, or
        has no such split or features.
      ImageReadError: from indexing, at one unreadable image more than allowed; names the record.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | os.PathLike,
        *,
        image_key: str = "image",
        label_key: str = "label",
        max_bad_images: int = 0,
    ):
        data_dir = pathlib.Path(data_dir).expanduser()
        self._folder = _find_prepared(name, data_dir)
        builder = tfds.builder_from_directory(self._folder)
        self.num_classes = _check_features(
            dict(builder.info.features.items()), image_key, label_key
        )
        self._records = _open_records(name, data_dir, builder, split, image_key)
        parts = _list_shards(name, builder, split)
        self.files = tuple(sorted({pathlib.Path(part.filename) for part in parts}))
        self._keys = (image_key, label_key)
        self._reader = TolerantReader(
            self._read,
            lambda index: f"{index} of {self.name} in {self._folder}",
            len(self._records),
            max_bad_images,
        )
        self.name = f"{name}/{split}"

    @property
    def bad_images(self) -> tuple[str, ...]:
        """Descriptions of the unreadable images met so far."""
        return self._reader.bad_images

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Record:
        return self._reader[index]

    def __repr__(self) -> str:
        return f"TFDSSource({self.name!r}, {str(self._folder)!r}, {len(self)} images)"

    def _read(self, index: int) -> Record:
        try:
            record = self._records[index]
        except RuntimeError as error:  # a checksum of the file does not fit
            raise ImageReadError(f"damaged record: {error}") from error
        image_key, label_key = self._keys
        label = np.asarray(record[label_key], np.int32)
        if not 0 <= label < self.num_classes:  # TFDS marks unlabelled test images with -1
            raise DatasetError(
                f"record {index} of {self.name} has label {label}; allowed "
                f"0..{self.num_classes - 1}; use a labelled split"
            )
        return {"image": decode_rgb(record[image_key]), "label": label}


def _find_prepared(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """Return the folder of the version asked for, or else of the newest prepared one."""
    folder = data_dir / name.replace(":", "/")
    for version in (folder, *_versions(folder)):
        if (version / _METADATA).is_file():
            return version
    prepared = sorted(str(path.parent) for path in data_dir.glob(f"*/**/{_METADATA}"))
    raise DatasetError(
        f"TFDS dataset {name!r} is not prepared: no {_METADATA} in {folder} or a version below "
        f"it; prepared in {data_dir}: {prepared[:10] or 'nothing'}. {_prepare_hint(name, data_dir)}"
    )


def _versions(folder: pathlib.Path) -> list[pathlib.Path]:
    """List the version folders, newest first."""
    found = [path for path in folder.glob("*") if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    return sorted(found, key=lambda path: tuple(map(int, path.name.split("."))), reverse=True)


def _prepare_hint(name: str, data_dir: pathlib.Path) -> str:
    return (
        "Prepare it where TensorFlow is installed: "
        f"tfds build {name} --file_format=array_record --data_dir={data_dir}"
    )


def _check_features(features: Mapping[str, Any], image_key: str, label_key: str) -> int:
    """Return the number of classes."""
    wanted = {image_key: tfds.features.Image, label_key: tfds.features.ClassLabel}
    for key, kind in wanted.items():
        if not isinstance(features.get(key), kind):
            there = {name: type(feature).__name__ for name, feature in features.items()}
            raise DatasetError(
                f"feature {key!r} is not there as {kind.__name__}; the dataset has {there}; "
                "choose with image_key and label_key"
            )
    return features[label_key].num_classes


def _open_records(
    name: str, data_dir: pathlib.Path, builder: tfds.core.DatasetBuilder, split: str, image_key: str
) -> Sequence:
    """Open one split by index, its images left encoded."""
    shards = _list_shards(name, builder, split)
    try:
        records = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise DatasetError(
            f"TFDS dataset {name!r} in {builder.data_path} is stored as "
            f"{builder.info.file_format.value}, which cannot be read by index. "
            f"{_prepare_hint(name, data_dir)}"
        ) from error
    _check_shards(name, data_dir, shards)
    return records


def _list_shards(name: str, builder: tfds.core.DatasetBuilder, split: str) -> Sequence[Any]:
    try:
        shards = builder.info.splits[split].file_instructions
    except ValueError as error:
        raise DatasetError(
            f"no split {split!r} of TFDS dataset {name!r}: {error} "
            f"Prepared: {sorted(builder.info.splits)}, and parts such as 'train[:10%]'"
        ) from error
    if not shards:
        raise DatasetError(f"split {split!r} of TFDS dataset {name!r} is empty")
    return shards


def _check_shards(name: str, data_dir: pathlib.Path, instructions: Sequence[Any]) -> None:
    """Open every file of a split once: a cut one would otherwise show only when it is reached."""
    expected = sum(part.examples_in_shard for part in instructions)
    try:
        with ArrayRecordDataSource([str(part.filename) for part in instructions]) as shards:
            found = len(shards)
    except RuntimeError as error:
        raise DatasetError(
            f"TFDS dataset {name!r} is damaged: {error}. {_prepare_hint(name, data_dir)}"
        ) from error
    if found != expected:
        raise DatasetError(
            f"TFDS dataset {name!r} is damaged: {found} records where its metadata says "
            f"{expected}. {_prepare_hint(name, data_dir)}"
        )
