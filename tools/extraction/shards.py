"""What one process of an extraction does: read images, encode their crops, write its shards."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
from extraction import work
from extraction.features import TextReader

from maskgil_jax.data.crops import Crops
from maskgil_jax.data.errors import DatasetError, ImageReadError
from maskgil_jax.data.folder import ImageFolderSource
from maskgil_jax.data.pipeline import Source
from maskgil_jax.data.token_dataset import TokenDataset, TokenRecord
from maskgil_jax.data.token_records import write_shard
from maskgil_jax.data.transforms import to_float

_PROGRESS_SECONDS = 5.0

# float32 images [b s s 3] in [-1, 1] → int32 tokens [b gh gw], perhaps still being computed.
Encode = Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One of the processes that share the shards: shard s belongs to process s % count.

    Attributes:
        index: of this process.
        count: of processes.
    """

    index: int = 0
    count: int = 1

    def shards(self, dataset: TokenDataset) -> range:
        """Return the shards of this process."""
        return range(self.index, dataset.num_shards, self.count)

    def say(self, text: str) -> None:
        """Print a line, in the first process only."""
        if self.index == 0:
            print(text, flush=True)


class ShardMaker:
    """Makes the shards of one process."""

    def __init__(
        self,
        *,
        wanted: TokenDataset,
        source: Source,
        crops: Crops,
        encode: Encode,
        out: pathlib.Path,
        place: Place,
        max_bad_images: int,
        skipped_before: int,
        num_threads: int,
        text_reader: TextReader | None,
    ):
        self._wanted, self._source, self._crops, self._encode = wanted, source, crops, encode
        self._out, self._place, self._num_threads = out, place, num_threads
        self._max_bad_images = max_bad_images
        self._skipped = skipped_before
        self._text_reader = text_reader
        self._progress = _Progress(place, sum(map(len, map(wanted.shard_range, self._shards))))

    @property
    def _shards(self) -> range:
        return self._place.shards(self._wanted)

    def make_shards(self) -> None:
        """Keep the shards that are whole, make the others."""
        missing = []
        for shard in self._shards:
            note = work.read_whole(self._out, self._wanted.shard_name(shard))
            if note is None:
                missing.append(shard)
                continue
            self._progress.keep(len(self._wanted.shard_range(shard)))
            self._count_skipped(len(note.skipped))
        if len(missing) < len(self._shards):
            kept = len(self._shards) - len(missing)
            self._place.say(f"{kept} of {len(self._shards)} shards are there already")
        for shard in missing:
            self._make(shard)

    def _make(self, shard: int) -> None:
        name = self._wanted.shard_name(shard)
        skipped: list[tuple[int, str]] = []
        records = self._encode_images(self._wanted.shard_range(shard), skipped)
        if self._text_reader is not None:
            records = self._text_reader.add_features(records)
        partial = self._out / work.WORK / f"{name}.partial"
        with contextlib.closing(records):
            written = write_shard(self._out / name, partial, records, self._wanted.layout)
        note = dataclasses.replace(written, skipped=tuple(skipped))
        work.write_note(self._out, note)

    def _encode_images(
        self, indices: Sequence[int], skipped: list[tuple[int, str]]
    ) -> Generator[TokenRecord, None, None]:
        """Yield the records of some images in order, and list those that cannot be read."""
        read: collections.deque[TokenRecord] = collections.deque()

        def views() -> Generator[np.ndarray, None, None]:
            for index, future in self._read_ahead(indices):
                try:
                    images, record = future.result()
                except ImageReadError as error:
                    # Its cause says why, without the source's count of what it has met so far.
                    why = f"{self._describe(index)}: {error.__cause__ or error}"
                    skipped.append((index, why))
                    self._count_skipped(1, why)
                    self._progress.advance()
                    continue
                read.append(record)
                yield from images

        with contextlib.closing(views()) as crops:
            tokens = _encode_in_batches(crops, self._encode, self._wanted.batch_size)
            while grids := list(itertools.islice(tokens, len(self._wanted.crops))):
                yield dataclasses.replace(read.popleft(), tokens=np.stack(grids))
                self._progress.advance()

    def _read_ahead(
        self, indices: Sequence[int]
    ) -> Iterator[tuple[int, concurrent.futures.Future]]:
        """Yield what threads read, in order, so far ahead that two batches are ready."""
        ahead = self._num_threads + 2 * -(-self._wanted.batch_size // len(self._wanted.crops))
        waiting: collections.deque[tuple[int, concurrent.futures.Future]] = collections.deque()
        pool = concurrent.futures.ThreadPoolExecutor(self._num_threads)
        try:
            for index in indices:
                waiting.append((index, pool.submit(self._read, index)))
                if len(waiting) > ahead:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, index: int) -> tuple[np.ndarray, TokenRecord]:
        """Return the crops of an image, and its record without tokens."""
        record = self._source[index]
        texts = np.atleast_1d(record["caption"]) if self._wanted.has_captions else ()
        label = record["label"] if self._wanted.num_classes is not None else None
        return to_float(self._crops(record["image"])), TokenRecord(
            tokens=np.zeros((0, 0, 0), np.int32),
            index=index,
            label=None if label is None else int(label),
            captions=tuple(map(str, texts)),
        )

    def _describe(self, index: int) -> str:
        if isinstance(self._source, ImageFolderSource):
            return "/".join(self._source.path(index).parts[-2:])
        if hasattr(self._source, "describe"):
            return self._source.describe(index)
        return f"{index} of {self._source.name}"

    def _count_skipped(self, count: int, why: str = "in the shards that are there") -> None:
        self._skipped += count
        check_skipped(self._skipped, self._max_bad_images, why)
        if count and why:
            print(f"left out {count} unreadable: {why}", file=sys.stderr, flush=True)


class _Progress:
    """Prints how far this process is, every few seconds."""

    def __init__(self, place: Place, total: int):
        self._place, self._total = place, total
        self._done = self._kept = 0
        self._began = self._said = time.monotonic()

    def keep(self, count: int) -> None:
        """Count images that were done before."""
        self._kept += count
        self._done += count

    def advance(self) -> None:
        """Count one image."""
        self._done += 1
        now = time.monotonic()
        if now - self._said < _PROGRESS_SECONDS and self._done < self._total:
            return
        self._said = now
        rate = (self._done - self._kept) / max(now - self._began, 1e-9)
        left = datetime.timedelta(seconds=round((self._total - self._done) / rate))
        whose = f" of process 0 of {self._place.count}" if self._place.count > 1 else ""
        self._place.say(
            f"{self._done:,}/{self._total:,} images{whose}, {rate:,.1f} images/s, ETA {left}"
        )


def _encode_in_batches(
    crops: Iterator[np.ndarray], encode: Encode, batch_size: int
) -> Iterator[np.ndarray]:
    """Yield the tokens of every crop; while a batch is encoded, the next is put together."""
    pending: tuple[Any, int] | None = None
    while rows := list(itertools.islice(crops, batch_size)):
        images = np.zeros((batch_size, *rows[0].shape), np.float32)
        np.stack(rows, out=images[: len(rows)])
        started = encode(images), len(rows)
        if pending is not None:
            yield from np.asarray(pending[0])[: pending[1]]
        pending = started
    if pending is not None:
        yield from np.asarray(pending[0])[: pending[1]]


def check_skipped(count: int, allowed: int, why: str) -> None:
    """Refuse more unreadable images than are allowed; `why` is the last one's reason.

    Raises:
        DatasetError: there are more.
    """
    if count > allowed:
        raise DatasetError(
            f"{count} unreadable images, {allowed} allowed; the last: {why}; repair or remove it, "
            "or leave some out with --max_bad_images"
        )
