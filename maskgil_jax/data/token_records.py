"""Tokens of a data set on disk, extracted once: the format, its writer and its source.

A folder holds `tokens-00000-of-00016.array_record` … and one `dataset.json` (`TokenDataset`), that
says which tokenizer made the tokens, of which images and crops, and what every shard holds. A
record is one image in the safetensors format: `tokens` [crops gh gw], `index` int64 [], the number
of the image in its source, and what the source has of `label` int32 [] and `caption` (UTF-8 as
uint8 [bytes]).
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import operator
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import safetensors
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Integer

from maskgil_jax.data.errors import DatasetError

FORMAT = "maskgil_jax.tokens"
VERSION = 1
DATASET_FILE = "dataset.json"
_REMEDY = "extract the tokens again with tools/extract_tokens.py"
# One record per chunk, so that a record is read without its neighbours.
_WRITER_OPTIONS = "group_size:1"
_BLOCK = 256  # records read at a time when all are checked


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """One image.

    Attributes:
      tokens: codes [crops gh gw] of any integer type.
      index: number of the image in its source.
      label: class, or `None`.
      caption: text, or `None`.
    """

    tokens: Integer[np.ndarray, "crops gh gw"]
    index: int
    label: int | None = None
    caption: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What every record of a data set is like.

    Attributes:
      codebook_size: tokens are in [0, codebook_size).
      grid: rows and columns of tokens.
      crops: number of crops of every image.
      num_classes: labels are in [0, num_classes); `None` where images have none.
      has_captions: whether every image has a text.
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
        if (record.caption is None) == self.has_captions:
            raise DatasetError(f"caption {record.caption!r} where has_captions {self.has_captions}")

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
        if record.caption is not None:
            arrays["caption"] = np.frombuffer(record.caption.encode(), np.uint8)
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
                caption=(
                    _take(arrays, "caption", "uint8", 1).tobytes().decode()
                    if "caption" in arrays
                    else None
                ),
            )
        except (safetensors.SafetensorError, KeyError, UnicodeDecodeError) as error:
            raise DatasetError(f"it is no token record: {error}") from error
        self.check(record)
        return record


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
        raise DatasetError(f"{file} cannot be read: {error}; restore it, or {_REMEDY}") from error


def write_shard(
    file: os.PathLike | str, partial: os.PathLike | str, records: Iterable[TokenRecord], lay: Layout
) -> Shard:
    """Write the records to `partial`, and give it the name `file` when all of it is on disk.

    Raises:
      DatasetError: a record is not like `lay`; nothing is left.
      OSError: the disk is full or cannot be written.
    """
    file, partial = pathlib.Path(file), pathlib.Path(partial)
    count = 0
    try:
        with contextlib.closing(ArrayRecordWriter(str(partial), _WRITER_OPTIONS)) as writer:
            for record in records:
                writer.write(lay.encode(record))
                count += 1
        if (found := _count_records(partial)) != count:
            raise OSError(f"{partial} holds {found} of {count} records; is the disk full?")
        with open(partial, "rb+") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
            os.fsync(written.fileno())
        size = partial.stat().st_size
        partial.replace(file)
        sync_folder(file.parent)
    finally:
        partial.unlink(missing_ok=True)
    return Shard(name=file.name, count=count, size=size, sha256=sha256)


def sync_folder(folder: os.PathLike | str) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_shard_problem(folder: os.PathLike | str, shard: Shard, *, full: bool) -> str | None:
    """Say what is wrong with the file of a shard, or `None`.

    Args:
      folder: where it lies.
      shard: what it should be.
      full: read all of it and compare the SHA-256, not only size and number of records.
    """
    file = pathlib.Path(folder) / shard.name
    if not file.is_file():
        return "it is missing"
    if (size := file.stat().st_size) != shard.size:
        return f"it has {size:,} bytes, not {shard.size:,}: cut short or not all copied"
    if full:
        with open(file, "rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != shard.sha256:
                return "its SHA-256 is another: its contents were changed"
    try:
        found = _count_records(file)
    except (RuntimeError, ValueError, OSError) as error:
        return f"it cannot be read: {error}"
    return None if found == shard.count else f"it holds {found} records, not {shard.count}"


def _count_records(file: pathlib.Path) -> int:
    with contextlib.closing(ArrayRecordReader(str(file))) as reader:
        return int(reader.num_records())


class TokenRecordSource:
    """Give stored tokens as `{"tokens": int32 [crops gh gw], "label": int32 []}`.

    There is no `label` where the images had none. `transforms.PickCrop` chooses one of the crops.

    Args:
      path: folder that `tools/extract_tokens.py` wrote.
      check_records: read every record once at opening, on all cores, and compare the SHA-256 of
        every shard. Without, a shard is checked for its size and number of records at opening, and
        each record when it is read.

    Raises:
      DatasetError: `dataset.json` is missing or damaged, shards are missing, cut short or changed,
        or a record is damaged, of another shape, doubled, or holds a code outside the codebook;
        with the names of shard and record.
    """

    def __init__(self, path: str | os.PathLike, *, check_records: bool = True):
        self._folder = pathlib.Path(path).expanduser()
        self.dataset = read_dataset(self._folder)
        self._check_shards(check_records)
        filled = [shard for shard in self.dataset.shards if shard.count]
        if not filled:
            raise DatasetError(f"{self._folder} holds no records; {_REMEDY}")
        self._records = ArrayRecordDataSource([str(self._folder / s.name) for s in filled])
        self._layout = self.dataset.layout
        self.num_classes = self.dataset.num_classes
        maker = self.dataset.tokenizer.fingerprint[:12]
        # Of whatever else is different the contents are: a run resumes with the same only.
        contents = hashlib.sha256("".join(s.sha256 for s in self.dataset.shards).encode())
        crops = f"{len(self.dataset.crops)} crops {contents.hexdigest()[:12]}"
        self.name = f"{self.dataset.source} tokens {maker} {crops}"
        if check_records:
            self._check_records()

    def __len__(self) -> int:
        return self.dataset.count

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        record = self.read(index)
        fields = {"tokens": record.tokens.astype(np.int32)}
        if record.label is not None:
            fields["label"] = np.asarray(record.label, np.int32)
        return fields

    def __repr__(self) -> str:
        return f"TokenRecordSource({str(self._folder)!r}, {len(self)} records)"

    def read(self, index: SupportsIndex) -> TokenRecord:
        """Return all that is stored of one image.

        Raises:
          DatasetError: the record is damaged or not like the others.
        """
        row = range(len(self))[operator.index(index)]
        try:
            data = self._records[row]
        except RuntimeError as error:  # a checksum of the file does not fit
            raise DatasetError(f"{self._locate(row)} is damaged: {error}; {_REMEDY}") from error
        return self._decode(row, data)

    def _decode(self, row: int, data: bytes) -> TokenRecord:
        try:
            return self._layout.decode(data)
        except DatasetError as error:
            raise DatasetError(f"{self._locate(row)}: {error}; {_REMEDY}") from error

    def _locate(self, row: int) -> str:
        for shard in self.dataset.shards:
            if row < shard.count:
                return f"record {row} of {self._folder / shard.name}"
            row -= shard.count
        raise AssertionError(row)

    def _check_shards(self, full: bool) -> None:
        shards, expected = self.dataset.shards, self.dataset.num_shards
        names = [self.dataset.shard_name(i) for i in range(expected)]
        if [shard.name for shard in shards] != names:
            raise DatasetError(
                f"{self._folder / DATASET_FILE} names the shards "
                f"{[shard.name for shard in shards][:3]}…; expected {names[:3]}…, {expected} in all"
            )
        for i, shard in enumerate(shards):
            share = len(self.dataset.shard_range(i))
            if shard.count + len(shard.skipped) != share:
                raise DatasetError(
                    f"{self._folder / DATASET_FILE} says {shard.count} records and "
                    f"{len(shard.skipped)} skipped images of {shard.name}; its share is {share}"
                )
        with _pool() as pool:
            problems = list(
                pool.map(lambda s: find_shard_problem(self._folder, s, full=full), shards)
            )
        wrong = [f"{s.name}: {p}" for s, p in zip(shards, problems, strict=True) if p]
        if wrong:
            raise DatasetError(
                f"{len(wrong)} of {len(shards)} shards of {self._folder} cannot be used; extract "
                "them again: tools/extract_tokens.py with the same settings redoes only them. "
                + "; ".join(wrong[:5])
            )

    def _check_records(self) -> None:
        blocks = [range(i, min(i + _BLOCK, len(self))) for i in range(0, len(self), _BLOCK)]
        expected = self._expected_indices()
        with _pool() as pool:
            for rows, found in zip(blocks, pool.map(self._read_indices, blocks), strict=True):
                for row, index in zip(rows, found, strict=True):
                    if index != (wanted := next(expected)):
                        raise DatasetError(
                            f"{self._locate(row)} is of image {index} where {wanted} is "
                            f"expected: lost or doubled; {_REMEDY}"
                        )

    def _read_indices(self, rows: Sequence[int]) -> list[int]:
        try:
            data = self._records.__getitems__(rows)
        except RuntimeError:
            return [self.read(row).index for row in rows]  # names the one that is damaged
        return [self._decode(row, one).index for row, one in zip(rows, data, strict=True)]

    def _expected_indices(self) -> Iterator[int]:
        for i, shard in enumerate(self.dataset.shards):
            skipped = {index for index, _ in shard.skipped}
            yield from (j for j in self.dataset.shard_range(i) if j not in skipped)


def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))
