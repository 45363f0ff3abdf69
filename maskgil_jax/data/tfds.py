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

from maskgil_jax.data.captions import as_field
from maskgil_jax.data.errors import DatasetError, ImageReadError
from maskgil_jax.data.images import Record, TolerantReader, decode_rgb, read_size

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
        record = _read_record(self._records, index)
        image_key, label_key = self._keys
        label = np.asarray(record[label_key], np.int32)
        if not 0 <= label < self.num_classes:  # TFDS marks unlabelled test images with -1
            raise DatasetError(
                f"record {index} of {self.name} has label {label}; allowed "
                f"0..{self.num_classes - 1}; use a labelled split"
            )
        return {"image": decode_rgb(record[image_key]), "label": label}


class TFDSCaptionSource:
    """Give a prepared dataset of images with texts as `{"image": uint8 [H W 3], "caption": str}`.

    Images are upright, as their EXIF orientation says. Where an image has several texts, `caption`
    is an array of them, of which `transforms.PickCaption` draws one. Texts are in the records, so
    that one that is empty or not UTF-8 shows when its record is read.

    Args:
      name, split, data_dir: as of `TFDSSource`, such as "coco_captions".
      image_key: feature to read, an Image.
      caption_key: Text feature to read, or a Sequence of it, with slashes between the names of
        nested features, such as "captions/text".
      max_bad_images: how many unreadable images may be replaced by the next readable one, each
        with a warning; one more is an error.

    Raises:
      DatasetError: as `TFDSSource`; from indexing, at a record without a text.
      ImageReadError: from indexing, at one unreadable image more than allowed; names the record.
    """

    num_classes = None

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | os.PathLike,
        *,
        image_key: str = "image",
        caption_key: str = "captions/text",
        max_bad_images: int = 0,
    ):
        data_dir = pathlib.Path(data_dir).expanduser()
        self._folder = _find_prepared(name, data_dir)
        builder = tfds.builder_from_directory(self._folder)
        features = dict(builder.info.features.items())
        _check_image_feature(features, image_key)
        self._caption_path = _find_text_feature(features, caption_key)
        self._image_key = image_key
        self._records = _open_records(name, data_dir, builder, split, image_key)
        self._reader = TolerantReader(self._read, self.describe, len(self._records), max_bad_images)
        self.name = f"{name}/{split} {caption_key}"

    @property
    def bad_images(self) -> tuple[str, ...]:
        """Descriptions of the unreadable images met so far."""
        return self._reader.bad_images

    def describe(self, index: int) -> str:
        """Return the name of an image."""
        return f"{index} of {self.name} in {self._folder}"

    def image_size(self, index: SupportsIndex) -> tuple[int, int]:
        """Return height and width of an image, or of the one that stands in, from its header."""
        return self._reader.apply(
            lambda i: read_size(_read_record(self._records, i)[self._image_key], upright=True),
            index,
        )

    def captions(self, index: SupportsIndex) -> tuple[str, ...]:
        """Return the texts of an image, or of the one that stands in; its pixels stay encoded."""
        return self._reader.apply(
            lambda i: tuple(self._find_texts(_read_record(self._records, i), i)), index
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Record:
        return self._reader[index]

    def __repr__(self) -> str:
        return f"TFDSCaptionSource({self.name!r}, {str(self._folder)!r}, {len(self)} images)"

    def _read(self, index: int) -> Record:
        record = _read_record(self._records, index)
        texts = self._find_texts(record, index)
        image = decode_rgb(record[self._image_key], upright=True)
        return {"image": image, "caption": as_field(texts)}

    def _find_texts(self, record: Any, index: int) -> list[str]:
        """Return the texts of a record."""
        value = record
        for part in self._caption_path:
            value = value[part]
        texts = []
        for data in [value] if isinstance(value, bytes) else value:
            try:
                texts.append(data.decode().strip())
            except UnicodeDecodeError as error:
                raise DatasetError(
                    f"a caption of {self.describe(index)} is not UTF-8: {error}"
                ) from error
        if not texts or not all(texts):
            raise DatasetError(
                f"{self.describe(index)} has {'an empty' if texts else 'no'} caption; use a split "
                "whose images all have one"
            )
        return texts


def _read_record(records: Any, index: int) -> Any:
    try:
        return records[index]
    except RuntimeError as error:  # a checksum of the file does not fit
        raise ImageReadError(f"damaged record: {error}") from error


def _check_image_feature(features: Mapping[str, Any], image_key: str) -> None:
    if not isinstance(features.get(image_key), tfds.features.Image):
        raise DatasetError(
            f"feature {image_key!r} is not there as Image; the dataset has "
            f"{_name_kinds(features)}; choose with image_key"
        )


def _find_text_feature(features: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return the names on the way to a Text feature; a name may have slashes itself."""

    def find(inner: Mapping[str, Any], rest: str) -> tuple[str, ...] | None:
        for name, feature in inner.items():
            if not f"{rest}/".startswith(f"{name}/"):
                continue
            if isinstance(feature, tfds.features.Sequence):
                feature = feature.feature
            left = rest[len(name) + 1 :]
            if not left and isinstance(feature, tfds.features.Text):
                return (name,)
            if left and isinstance(feature, tfds.features.FeaturesDict):
                found = find(dict(feature.items()), left)
                if found is not None:
                    return (name, *found)
        return None

    found = find(features, key)
    if found is not None:
        return found
    raise DatasetError(
        f"feature {key!r} is not there as Text; the dataset has {_name_kinds(features)}; choose "
        "with caption_key, such as captions/text for a Text inside"
    )


def _name_kinds(features: Mapping[str, Any]) -> dict[str, str]:
    return {name: type(feature).__name__ for name, feature in features.items()}


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
            raise DatasetError(
                f"feature {key!r} is not there as {kind.__name__}; the dataset has "
                f"{_name_kinds(features)}; "
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
