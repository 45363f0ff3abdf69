"""Tokens of a data set on disk, extracted once: the files of records and their source.

`token_dataset` says what is in the files.
"""

import concurrent.futures
import contextlib
import hashlib
import operator
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from maskgil_jax.data.captions import as_field
from maskgil_jax.data.errors import DatasetError
from maskgil_jax.data.token_dataset import (
    DATASET_FILE,
    REMEDY,
    FeaturedRecord,
    Layout,
    Shard,
    TokenRecord,
    read_dataset,
)

# One record per chunk, so that a record is read without its neighbours.
_WRITER_OPTIONS = "group_size:1"
# Records read at a time when all are checked, and bytes of them: features are large.
_BLOCK, _BLOCK_BYTES = 256, 1 << 24


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
    With captions, records are `{"tokens", "caption": str}`; where an image has several texts,
    `caption` is an array of them, of which `transforms.PickCaption` draws one.
    With features, they also have `features`, a tuple with an array [s t] for every text, of which
    `transforms.PickFeatures` draws one.

    Args:
      path: folder that `tools/extract_tokens.py` wrote.
      captions: give the texts instead of the labels.
      features: give with the texts what a text encoder has made of them, where that is stored;
        `dataset.text` says whether it is.
      check_records: read every record once at opening, on all cores, and compare the SHA-256 of
        every shard. Without, a shard is checked for its size and number of records at opening, and
        each record when it is read.

    Raises:
      DatasetError: texts are asked for that are not there, `dataset.json` is missing or damaged,
        shards are missing, cut short or changed, or a record is damaged, of another shape, doubled,
        or holds a code outside the codebook; with the names of shard and record.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        captions: bool = False,
        features: bool = False,
        check_records: bool = True,
    ):
        self._folder = pathlib.Path(path).expanduser()
        self._gives_captions, self._gives_features = captions, captions and features
        self.dataset = read_dataset(self._folder)
        if captions and not self.dataset.has_captions:
            raise DatasetError(
                f"the tokens in {self._folder} have no captions; extract them again with --captions"
            )
        self._check_shards(check_records)
        filled = [shard for shard in self.dataset.shards if shard.count]
        if not filled:
            raise DatasetError(f"{self._folder} holds no records; {REMEDY}")
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

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        record = self.read(index)
        fields: dict[str, Any] = {"tokens": record.tokens.astype(np.int32)}
        if self._gives_captions:
            fields["caption"] = as_field(record.captions)
            if self._gives_features and isinstance(record, FeaturedRecord):
                fields["features"] = record.features
        elif record.label is not None:
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
            raise DatasetError(f"{self._locate(row)} is damaged: {error}; {REMEDY}") from error
        return self._decode(row, data)

    def _decode(self, row: int, data: bytes) -> TokenRecord:
        try:
            return self._layout.decode(data)
        except DatasetError as error:
            raise DatasetError(f"{self._locate(row)}: {error}; {REMEDY}") from error

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
        size = sum(shard.size for shard in self.dataset.shards)
        block = min(_BLOCK, max(1, _BLOCK_BYTES * len(self) // max(size, 1)))
        blocks = [range(i, min(i + block, len(self))) for i in range(0, len(self), block)]
        expected = self._expected_indices()
        with _pool() as pool:
            for rows, found in zip(blocks, pool.map(self._read_indices, blocks), strict=True):
                for row, index in zip(rows, found, strict=True):
                    if index != (wanted := next(expected)):
                        raise DatasetError(
                            f"{self._locate(row)} is of image {index} where {wanted} is "
                            f"expected: lost or doubled; {REMEDY}"
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
