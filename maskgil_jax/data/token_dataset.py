"""What stored tokens are: a record, what all records are like, and the `dataset.json` beside them.

A folder holds `tokens-00000-of-00016.array_record` … and one `dataset.json` (`TokenDataset`), that
says which tokenizer made the tokens, of which images and crops, and what every shard holds. A
record is one image in the safetensors format: `tokens` [crops gh gw], `index` int64 [], the number
of the image in its source, and what the source has of `label` int32 [] and texts: `caption` (UTF-8
as uint8 [bytes]), or of an image with several `captions`, one behind the other, and their bytes
`caption_lengths` int32 [texts]. `token_records` writes and reads the files of records.

Where a text encoder has read the texts, records also hold what it made of them: `features` [n t],
those of all tokens of the first text, then of the second, without padding, and
`feature_lengths` int32 [texts], the tokens of each. `dataset.json` then names the encoder in `text`
and is of `FEATURES_VERSION`. Without features, everything is as it was before there were any.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float, Integer

from maskgil_jax.data.errors import DatasetError

FORMAT = "maskgil_jax.tokens"
VERSION, FEATURES_VERSION = 1, 2
DATASET_FILE = "dataset.json"
REMEDY = "extract the tokens again with tools/extract_tokens.py"
# Of features as they are stored. Gemma's do not fit into float16.
FEATURE_TYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# NumPy's own reader of safetensors does not know bfloat16.
_STORED_TYPES = {
    "BOOL": np.dtype(bool),
    "BF16": FEATURE_TYPES["bfloat16"],
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}


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
class FeaturedRecord(TokenRecord):
    """One image whose texts a text encoder has read.

    Attributes:
      features: of every text those of its tokens [s t], without padding.
    """

    features: tuple[Float[np.ndarray, "_ t"], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOrigin:
    """The text encoder that made the features.

    Attributes:
      name: what it is called.
      path: where it was, as it was given.
      fingerprint: SHA-256 of weights, tokenizer and all settings, whatever the path.
      hidden_layer: whose output the features are, as it was given.
      width: channels t of a feature.
      dtype: type of the computation and of what is stored, one of `FEATURE_TYPES`.
      length: tokens at which texts were cut.
    """

    name: str
    path: str
    fingerprint: str
    hidden_layer: int
    width: int
    dtype: str
    length: int

    def __post_init__(self):
        _check_sha256(self.fingerprint)
        if self.dtype not in FEATURE_TYPES:
            raise ValueError(
                f"dtype {self.dtype!r} of features; allowed: {', '.join(FEATURE_TYPES)}"
            )
        if self.width < 1 or self.length < 1:
            raise ValueError(f"width {self.width} and length {self.length} must be at least 1")

    def describe(self) -> str:
        """Return name and fingerprint, for messages."""
        return f"{self.name}, {self.path}, fingerprint {self.fingerprint[:12]}…"


def _check_sha256(fingerprint: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise ValueError(f"fingerprint {fingerprint!r} is no SHA-256")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What every record of a data set is like.

    Attributes:
      codebook_size: tokens are in [0, codebook_size).
      grid: rows and columns of tokens.
      crops: number of crops of every image.
      num_classes: labels are in [0, num_classes); `None` where images have none.
      has_captions: whether every image has a text or several.
      text: what made the features of the texts; `None` where there are none.
    """

    codebook_size: int
    grid: tuple[int, int]
    crops: int
    num_classes: int | None
    has_captions: bool
    text: TextOrigin | None = None

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
        self._check_features(record)

    def _check_features(self, record: TokenRecord) -> None:
        features = record.features if isinstance(record, FeaturedRecord) else ()
        expected = len(record.captions) if self.text is not None else 0
        if len(features) != expected:
            raise DatasetError(f"features of {len(features)} texts; expected those of {expected}")
        for array in features:
            # For the type checker: where there are features, there is what made them.
            assert self.text is not None
            width, dtype = self.text.width, FEATURE_TYPES[self.text.dtype]
            if array.ndim != 2 or array.shape[1] != width or array.dtype != dtype:
                raise DatasetError(
                    f"features are {array.dtype} {array.shape}; expected {dtype} of width {width}"
                )
            if len(array) > self.text.length:
                raise DatasetError(
                    f"features of {len(array)} tokens of a text; allowed: {self.text.length}"
                )

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
        if isinstance(record, FeaturedRecord) and record.features:
            arrays["features"] = np.concatenate(record.features)
            if not np.isfinite(arrays["features"]).all():
                raise DatasetError(f"features of {record.captions} are no finite numbers")
            lengths = list(map(len, record.features))
            arrays["feature_lengths"] = np.asarray(lengths, np.int32)
        return safetensors.numpy.save(arrays)

    def decode(self, data: bytes) -> TokenRecord:
        """Return the record that `encode` wrote.

        Raises:
          DatasetError: the bytes are damaged, or the record is not like this.
        """
        try:
            arrays = _load_arrays(data)
            fields: dict[str, Any] = {
                "tokens": _take(arrays, "tokens", self.dtype, 3),
                "index": int(_take(arrays, "index", "int64", 0)),
                "label": int(_take(arrays, "label", "int32", 0)) if "label" in arrays else None,
                "captions": _take_captions(arrays),
            }
            if self.text is not None:
                fields["features"] = _take_features(arrays, FEATURE_TYPES[self.text.dtype])
        except (safetensors.SafetensorError, KeyError, UnicodeDecodeError) as error:
            raise DatasetError(f"it is no token record: {error}") from error
        record = TokenRecord(**fields) if self.text is None else FeaturedRecord(**fields)
        self.check(record)
        return record


def _load_arrays(data: bytes) -> dict[str, np.ndarray]:
    """Return what `safetensors.numpy.load` does, and arrays of bfloat16."""
    return {
        name: np.frombuffer(view["data"], _STORED_TYPES[view["dtype"]]).reshape(view["shape"])
        for name, view in safetensors.deserialize(data)
    }


def _take_captions(arrays: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    if "captions" not in arrays:
        one = "caption" in arrays
        return (_take(arrays, "caption", "uint8", 1).tobytes().decode(),) if one else ()
    data = _take(arrays, "captions", "uint8", 1).tobytes()
    ends = np.cumsum(_take(arrays, "caption_lengths", "int32", 1)).tolist()
    if not ends or ends[-1] != len(data) or ends != sorted(ends):
        raise DatasetError(f"caption_lengths end at {ends[-1:]}; the captions have {len(data)}")
    return tuple(data[a:b].decode() for a, b in zip([0, *ends], ends, strict=False))


def _take_features(
    arrays: Mapping[str, np.ndarray], dtype: np.dtype
) -> tuple[Float[np.ndarray, "_ t"], ...]:
    data = _take(arrays, "features", dtype, 2)
    lengths = _take(arrays, "feature_lengths", "int32", 1)
    if (lengths < 0).any() or int(lengths.sum(dtype=np.int64)) != len(data):
        raise DatasetError(
            f"feature_lengths {lengths.tolist()[:5]} do not make up the {len(data)} features"
        )
    ends = np.cumsum(lengths).tolist()
    return tuple(data[a:b] for a, b in zip([0, *ends], ends, strict=False))


def _take(
    arrays: Mapping[str, np.ndarray], name: str, dtype: str | np.dtype, ndim: int
) -> np.ndarray:
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
        _check_sha256(self.fingerprint)
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
      text: what made the features of the texts; `None` where there are none.
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
    text: TextOrigin | None = None

    def __post_init__(self):
        if self.text is not None and not self.has_captions:
            raise ValueError("text names what made features, but has_captions is false")
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
            text=self.text,
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
        version = FEATURES_VERSION
        if self.text is None:
            del fields["text"]
            version = VERSION
        derived = {"grid": self.grid, "dtype": self.layout.dtype, "count": self.count}
        header = {"format": FORMAT, "version": version}
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
        featured = "text" in fields
        version = FEATURES_VERSION if featured else VERSION
        if fields.get("version") != version:
            raise ValueError(
                f"it has version {fields.get('version')!r}; this release reads {version} "
                f"{'with' if featured else 'without'} features of texts"
            )
        types = _DATASET_TYPES | _DERIVED_TYPES | ({"text": (dict,)} if featured else {})
        made = _check_fields("data set", fields, types)
        derived = {name: made.pop(name) for name in _DERIVED_TYPES}
        if list(map(type, made["image_size"])) != [int, int]:
            raise ValueError(f"image_size {made['image_size']} must be height and width in pixels")
        if not all(isinstance(name, str) for name in made["crops"]):
            raise ValueError(f"crops {made['crops']} must be names")
        maker = _check_fields("tokenizer", made["tokenizer"], _TOKENIZER_TYPES)
        made["tokenizer"] = TokenizerOrigin(**maker)
        if featured:
            made["text"] = TextOrigin(**_check_fields("text", made["text"], _TEXT_TYPES))
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
        tokenizer, text = fields.pop("tokenizer"), fields.pop("text")
        made_by = {f"tokenizer.{key}": tokenizer[key] for key in _TOKENIZER_TYPES}
        made_by |= {f"text.{key}": text[key] if text else None for key in _TEXT_TYPES}
        for key in ("tokenizer.path", "text.path", "text.name"):  # the same one may lie elsewhere
            del made_by[key]
        return made_by | fields


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
_TEXT_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "path": (str,),
    "fingerprint": (str,),
    "hidden_layer": (int,),
    "width": (int,),
    "dtype": (str,),
    "length": (int,),
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
