"""What stored tokens are: a record, what all records are like, and the `dataset.json` beside them.

A folder holds `tokens-00000-of-00016.array_record` … and one `dataset.json` (`TokenDataset`), that
says which tokenizer made the tokens, of which images and crops, and what every shard holds. A
record is one image in the safetensors format: `tokens` [crops gh gw], `index` int64 [], the number
of the image in its source, and what the source has of `label` int32 [] and texts: `caption` (UTF-8
as uint8 [bytes]), or of an image with several `captions`, one behind the other, and their bytes
`caption_lengths` int32 [texts]. `token_records` writes and reads the files of records.

Features of a text encoder have no place in a record yet. They will be further arrays, one row per
text, and the encoder a further field of `dataset.json`, without which they cannot be read: another
`VERSION`.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Integer

from maskgil_jax.data.errors import DatasetError

FORMAT = "maskgil_jax.tokens"
VERSION = 1
DATASET_FILE = "dataset.json"
REMEDY = "extract the tokens again with tools/extract_tokens.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """One image.

    Attributes:
      tokens: codes [crops gh gw] of any integer type.
      index: number of the image in its source.
      label: class, or `None`.
      captions: texts, or none.
    """

    tokens: Integer[np.ndarray, "crops gh gw"]
    index: int
    label: int | None = None
    captions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What every record of a data set is like.

    Attributes:
      codebook_size: tokens are in [0, codebook_size).
      grid: rows and columns of tokens.
      crops: number of crops of every image.
      num_classes: labels are in [0, num_classes); `None` where images have none.
      has_captions: whether every image has a text or several.
    """

    codebook_size: int
    grid: tuple[int, int]
    crops: int
    num_classes: int | None
    has_captions: bool

    @property
    def dtype(self) -> str:
        """Type of the stored tokens: uint16 where it holds all codes, else uint32."""
        return "uint16" if self.codebook_size <= 2**16 else "uint32"

    def check(self, record: TokenRecord) -> None:
        """Refuse a record that is not like this.

        Raises:
          DatasetError: naming the value and what is allowed.
        """
        shape = (self.crops, *self.grid)
        if record.tokens.shape != shape:
            raise DatasetError(f"tokens have shape {record.tokens.shape}; expected {shape}")
        low, high = int(record.tokens.min()), int(record.tokens.max())
        if low < 0 or high >= self.codebook_size:
            raise DatasetError(
                f"code {low if low < 0 else high} is outside the codebook; allowed "
                f"0..{self.codebook_size - 1}"
            )
        if (record.label is None) != (self.num_classes is None):
            raise DatasetError(
                f"label {record.label} where num_classes is {self.num_classes}; all images of a "
                "data set have one, or none has"
            )
        if record.label is not None and not 0 <= record.label < (self.num_classes or 0):
            raise DatasetError(f"label {record.label}; allowed 0..{(self.num_classes or 0) - 1}")
        if bool(record.captions) != self.has_captions:
            raise DatasetError(f"captions {record.captions} where has_captions {self.has_captions}")

    def encode(self, record: TokenRecord) -> bytes:
        """Return the bytes of a record, the same for the same record.

        Raises:
          DatasetError: the record is not like this.
        """
        self.check(record)
        arrays = {
            "tokens": np.ascontiguousarray(record.tokens.astype(self.dtype)),
            "index": np.asarray(record.index, np.int64),
        }
        if record.label is not None:
            arrays["label"] = np.asarray(record.label, np.int32)
        texts = [text.encode() for text in record.captions]
        if texts:
            name = "caption" if len(texts) == 1 else "captions"
            arrays[name] = np.frombuffer(b"".join(texts), np.uint8)
        if len(texts) > 1:
            arrays["caption_lengths"] = np.asarray(list(map(len, texts)), np.int32)
        return safetensors.numpy.save(arrays)

    def decode(self, data: bytes) -> TokenRecord:
        """Return the record that `encode` wrote.

        Raises:
          DatasetError: the bytes are damaged, or the record is not like this.
        """
        try:
            arrays = safetensors.numpy.load(data)
            record = TokenRecord(
                tokens=_take(arrays, "tokens", self.dtype, 3),
                index=int(_take(arrays, "index", "int64", 0)),
                label=int(_take(arrays, "label", "int32", 0)) if "label" in arrays else None,
                captions=_take_captions(arrays),
            )
        except (safetensors.SafetensorError, KeyError, UnicodeDecodeError) as error:
            raise DatasetError(f"it is no token record: {error}") from error
        self.check(record)
        return record


def _take_captions(arrays: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    if "captions" not in arrays:
        one = "caption" in arrays
        return (_take(arrays, "caption", "uint8", 1).tobytes().decode(),) if one else ()
    data = _take(arrays, "captions", "uint8", 1).tobytes()
    ends = np.cumsum(_take(arrays, "caption_lengths", "int32", 1)).tolist()
    if not ends or ends[-1] != len(data) or ends != sorted(ends):
        raise DatasetError(f"caption_lengths end at {ends[-1:]}; the captions have {len(data)}")
    return tuple(data[a:b].decode() for a, b in zip([0, *ends], ends, strict=False))


def _take(arrays: Mapping[str, np.ndarray], name: str, dtype: str, ndim: int) -> np.ndarray:
    array = arrays[name]
    if array.dtype != dtype or array.ndim != ndim:
        raise DatasetError(
            f"{name} is {array.dtype} with {array.ndim} axes; expected {dtype} with {ndim}"
        )
    return array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of records.

    Attributes:
      name: of the file, in the folder.
      count: its records.
      size: its bytes.
      sha256: of its contents, as hexadecimal digits.
      skipped: images of its share that are not in it: number in the source, and why.
    """

    name: str
    count: int
    size: int
    sha256: str
    skipped: tuple[tuple[int, str], ...] = ()

    def __post_init__(self):
        if pathlib.PurePath(self.name).name != self.name or self.count < 0:
            raise ValueError(f"shard {self.name!r} with {self.count} records")

    @classmethod
    def from_dict(cls, fields: Any) -> "Shard":
        """Return the shard that a dict from JSON describes.

        Raises:
          ValueError: its fields are not those of a shard.
        """
        made = _check_fields("shard", fields, _SHARD_TYPES)
        for entry in made["skipped"]:
            if not isinstance(entry, list) or list(map(type, entry)) != [int, str]:
                raise ValueError(f"skipped {entry!r} is no number with a reason")
        return cls(**made | {"skipped": tuple((index, why) for index, why in made["skipped"])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerOrigin:
    """The tokenizer that made the tokens.

    Attributes:
      family: name of its kind.
      path: where it was, as it was given.
      fingerprint: SHA-256 of family, sizes and parameters, whatever the path.
      codebook_size: number of its codes.
      downsample_factor: image pixels per token, along each side.
      dtype: type of the computation.
    """

    family: str
    path: str
    fingerprint: str
    codebook_size: int
    downsample_factor: int
    dtype: str

    def __post_init__(self):
        if not re.fullmatch("[0-9a-f]{64}", self.fingerprint):
            raise ValueError(f"fingerprint {self.fingerprint!r} is no SHA-256")
        if self.codebook_size < 1 or self.downsample_factor < 1:
            raise ValueError("codebook_size and downsample_factor must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenDataset:
    """What `dataset.json` says; without shards, what an extraction is asked for.

    Attributes:
      tokenizer: what made the tokens.
      source: name of the data set of images; of a folder, with a sum over its files' names.
      source_records: its images.
      num_classes: its classes, or `None` where its images have no labels.
      has_captions: whether the texts of its images are kept.
      image_size: height and width in pixels of what was encoded.
      crops: names of the crops of every image, in order.
      batch_size: crops encoded at a time.
      num_shards: number of files.
      shards: the files, in order.
    """

    tokenizer: TokenizerOrigin
    source: str
    source_records: int
    num_classes: int | None
    has_captions: bool
    image_size: tuple[int, int]
    crops: tuple[str, ...]
    batch_size: int
    num_shards: int
    shards: tuple[Shard, ...] = ()

    def __post_init__(self):
        if not self.crops:
            raise ValueError("crops are empty; give at least one name")
        factor = self.tokenizer.downsample_factor
        if any(side < 1 or side % factor for side in self.image_size):
            raise ValueError(
                f"image_size {self.image_size} is not divisible by the tokenizer's {factor}"
            )
        if not 1 <= self.num_shards <= self.source_records:
            raise ValueError(
                f"num_shards {self.num_shards} is out of range; allowed: 1 to "
                f"{self.source_records}, the number of images"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        height, width = self.image_size
        factor = self.tokenizer.downsample_factor
        return height // factor, width // factor

    @property
    def count(self) -> int:
        """Number of records."""
        return sum(shard.count for shard in self.shards)

    @property
    def layout(self) -> Layout:
        """What every record is like."""
        return Layout(
            codebook_size=self.tokenizer.codebook_size,
            grid=self.grid,
            crops=len(self.crops),
            num_classes=self.num_classes,
            has_captions=self.has_captions,
        )

    def shard_name(self, shard: int) -> str:
        """Return the name of a shard's file."""
        return f"tokens-{shard:05}-of-{self.num_shards:05}.array_record"

    def shard_range(self, shard: int) -> range:
        """Return the images of the source that are a shard's share, nearly equal for all."""
        edges = [self.source_records * s // self.num_shards for s in (shard, shard + 1)]
        return range(*edges)

    def to_json(self) -> str:
        """Return the contents of `dataset.json`, the same for the same data set."""
        fields = dataclasses.asdict(self)
        derived = {"grid": self.grid, "dtype": self.layout.dtype, "count": self.count}
        header = {"format": FORMAT, "version": VERSION}
        # In ASCII: paths may hold bytes that are no text, which JSON's escapes bring back.
        return json.dumps(header | derived | fields, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "TokenDataset":
        """Return what `to_json` wrote.

        Raises:
          ValueError: the text is damaged, of another format, or its fields contradict each other.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise ValueError(f"it does not say format {FORMAT!r}")
        if fields.get("version") != VERSION:
            raise ValueError(
                f"it has version {fields.get('version')!r}; this release reads {VERSION}"
            )
        made = _check_fields("data set", fields, _DATASET_TYPES | _DERIVED_TYPES)
        derived = {name: made.pop(name) for name in _DERIVED_TYPES}
        if list(map(type, made["image_size"])) != [int, int]:
            raise ValueError(f"image_size {made['image_size']} must be height and width in pixels")
        if not all(isinstance(name, str) for name in made["crops"]):
            raise ValueError(f"crops {made['crops']} must be names")
        maker = _check_fields("tokenizer", made["tokenizer"], _TOKENIZER_TYPES)
        made["tokenizer"] = TokenizerOrigin(**maker)
        made["shards"] = tuple(map(Shard.from_dict, made["shards"]))
        made["image_size"], made["crops"] = tuple(made["image_size"]), tuple(made["crops"])
        dataset = cls(**made)
        true = {"grid": list(dataset.grid), "dtype": dataset.layout.dtype, "count": dataset.count}
        for name, value in true.items():
            if derived[name] != value:
                raise ValueError(f"{name} {derived[name]} must be {value}, as other fields say")
        return dataset

    def differences(self, other: "TokenDataset") -> list[str]:
        """Return one line for every setting of `other` that would give other files."""
        old, new = self._settings(), other._settings()
        return [f"{key}: {old[key]!r} → {new[key]!r}" for key in old if old[key] != new[key]]

    def _settings(self) -> dict[str, Any]:
        fields = dataclasses.asdict(dataclasses.replace(self, shards=()))
        tokenizer = fields.pop("tokenizer")
        del tokenizer["path"]  # the same tokenizer may lie elsewhere
        return {f"tokenizer.{key}": value for key, value in tokenizer.items()} | fields


_SHARD_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "count": (int,),
    "size": (int,),
    "sha256": (str,),
    "skipped": (list,),
}
_TOKENIZER_TYPES: dict[str, tuple[type, ...]] = {
    "family": (str,),
    "path": (str,),
    "fingerprint": (str,),
    "codebook_size": (int,),
    "downsample_factor": (int,),
    "dtype": (str,),
}
_DATASET_TYPES: dict[str, tuple[type, ...]] = {
    "tokenizer": (dict,),
    "source": (str,),
    "source_records": (int,),
    "num_classes": (int, type(None)),
    "has_captions": (bool,),
    "image_size": (list,),
    "crops": (list,),
    "batch_size": (int,),
    "num_shards": (int,),
    "shards": (list,),
}
_DERIVED_TYPES: dict[str, tuple[type, ...]] = {"grid": (list,), "dtype": (str,), "count": (int,)}


def _check_fields(what: str, fields: Any, types: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """Return the fields that a dict from JSON has, `format` and `version` left out."""
    if not isinstance(fields, dict):
        raise ValueError(f"{what} {fields!r} has no fields")
    if missing := sorted(set(types) - set(fields)):
        raise ValueError(f"{', '.join(missing)} of its {what} is missing")
    if unknown := sorted(set(fields) - set(types) - {"format", "version"}):
        raise ValueError(f"{', '.join(unknown)} of its {what} is unknown")
    for name, kinds in types.items():
        if type(fields[name]) not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name} {fields[name]!r} must be of type {expected}")
    return {name: fields[name] for name in types}


def read_dataset(folder: os.PathLike | str) -> TokenDataset:
    """Return what the `dataset.json` of a folder says.

    Raises:
      DatasetError: it is missing or damaged.
    """
    file = pathlib.Path(folder) / DATASET_FILE
    try:
        return TokenDataset.from_json(file.read_text())
    except FileNotFoundError as error:
        raise DatasetError(
            f"{folder} holds no token records: {DATASET_FILE} is missing; it is written when "
            "tools/extract_tokens.py has finished. If that was cut short, start it again"
        ) from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"{file} cannot be read: {error}; restore it, or {REMEDY}") from error
