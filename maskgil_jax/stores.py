"""What a bulk job writes: the job, and how each kind of output keeps its chunks and is finished.

FILE.npz with all pixels, a folder of PNG files, or a folder of token records to train from.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from maskgil_jax import pictures
from maskgil_jax.checkpoints import write_text_atomically
from maskgil_jax.data.errors import DatasetError
from maskgil_jax.data.token_dataset import DATASET_FILE, TokenDataset, TokenRecord, read_dataset

CHUNKS = "chunks"
# What the chunks are called once an output is made of them.
DONE = "done"
# What is being made of the chunks.
JOINED_FILE, JOINED_FOLDER = "joined.npz", "joined"
# At most, of one record beside its own bytes, and of one file: its last blocks and its index.
_RECORD_BYTES, _SHARD_BYTES = 64, 1 << 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be written where.

    Attributes:
        out: FILE.npz (replaced; `arr_0` uint8 NHWC and `labels`, as ADM's evaluator reads it), or
            a directory that is new or empty (PNG files, `000000_label3.png` and so on, or records).
        labels: one per image, int32 [b].
        noun: what labels are called in the names of PNG files.
        shape: (H, W, c) of an image; with `records` (gh, gw), of its codes.
        chunk_size: images that are made, and held in memory, at a time.
        settings: all that the images depend on, for JSON; a job is continued only under the same.
        records: what token records are written, without shards; pixels are written if `None`.
    """

    out: pathlib.Path
    labels: Int[np.ndarray, " b"]
    noun: str = "label"
    shape: tuple[int, ...]
    chunk_size: int
    settings: Mapping[str, Any]
    records: TokenDataset | None = None

    def __post_init__(self) -> None:
        if not len(self.labels):
            raise ValueError("there are no labels; give one or more")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size {self.chunk_size} must be at least 1")
        if self.records is None:
            return
        if self.out.suffix.lower() == ".npz":
            raise ValueError(f"{self.out} is a file; token records need a directory")
        one, here = self.records, (1, self.shape, len(self.labels))
        if (there := (len(one.crops), one.grid, one.source_records)) != here:
            raise ValueError(f"crops, grid and number of records are {there}; the job's are {here}")

    @property
    def dtype(self) -> np.dtype:
        """Type of what is stored of an image."""
        return np.dtype(np.uint8 if self.records is None else self.records.layout.dtype)

    @property
    def starts(self) -> range:
        """Indices of the first images of all chunks."""
        return range(0, len(self.labels), self.chunk_size)

    @property
    def item_bytes(self) -> int:
        """Size of what is stored of an image."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Size of what is stored of all images."""
        return len(self.labels) * self.item_bytes

    @property
    def work(self) -> pathlib.Path:
        """The working folder."""
        return self.out.with_name(f".{self.out.name}.work")

    def chunk(self, first: int) -> slice:
        """Return the images of the chunk that begins with `first`."""
        return slice(first, min(first + self.chunk_size, len(self.labels)))


class _Chunks:
    """A `.npy` file per chunk, joined in the end."""

    def __init__(self, job: Job):
        self._job, self._folder = job, job.work / CHUNKS

    def has(self, first: int) -> bool:
        try:
            stored = np.load(self._path(first), mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError):  # cut off by a machine that went down
            return False
        part = self._job.chunk(first)
        shape = (part.stop - part.start, *self._job.shape)
        return stored.shape == shape and stored.dtype == self._job.dtype

    def store(self, first: int, items: np.ndarray) -> None:
        path = self._path(first)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with open(partial, "wb") as file:
            np.save(file, items.astype(self._job.dtype))
            _flush(file)
        partial.replace(path)

    def _path(self, first: int) -> pathlib.Path:
        return self._folder / f"{first:09}.npy"


class _Arrays(_Chunks):
    """FILE.npz."""

    def bytes_to_come(self, missing: int) -> int:
        # The chunks stay until the file that is made of them is whole.
        return self._job.num_bytes + missing

    def is_finished(self) -> bool:
        return not self._folder.exists() and self._job.out.exists()

    def finish(self) -> None:
        job, partial = self._job, self._job.work / JOINED_FILE
        header = {
            "descr": np.lib.format.dtype_to_descr(job.dtype),
            "fortran_order": False,
            "shape": (len(job.labels), *job.shape),
        }
        with open(partial, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    for first in job.starts:
                        member.write(np.load(self._path(first)).data)
                with archive.open("labels.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(job.labels))
            _flush(file)
        partial.replace(job.out)
        self._folder.rename(self._folder.with_name(DONE))


class _Records(_Chunks):
    """A folder of token records, as tools/extract_tokens.py writes them."""

    def __init__(self, job: Job, dataset: TokenDataset):
        super().__init__(job)
        # array_record has no wheels outside Linux.
        from maskgil_jax.data import token_records

        self._files, self._dataset = token_records, dataset

    def bytes_to_come(self, missing: int) -> int:
        one = TokenRecord(tokens=np.zeros((1, *self._job.shape), self._job.dtype), index=0, label=0)
        each = len(self._dataset.layout.encode(one)) + _RECORD_BYTES
        return len(self._job.labels) * each + self._dataset.num_shards * _SHARD_BYTES + missing

    def is_finished(self) -> bool:
        """Return whether the output is there; a kill may have left the chunks beside it."""
        try:
            there = read_dataset(self._job.out)
        except DatasetError:
            return False
        return not there.differences(self._dataset)

    def finish(self) -> None:
        folder, dataset = self._job.work / JOINED_FOLDER, self._dataset
        folder.mkdir()
        records, shards = self._read(), []
        for shard in range(dataset.num_shards):
            path = folder / dataset.shard_name(shard)
            share = itertools.islice(records, len(dataset.shard_range(shard)))
            partial = path.with_suffix(".partial")
            shards.append(self._files.write_shard(path, partial, share, dataset.layout))
        whole = dataclasses.replace(dataset, shards=tuple(shards))
        write_text_atomically(folder / DATASET_FILE, whole.to_json())
        self._files.sync_folder(folder)
        folder.replace(self._job.out)
        self._folder.rename(self._folder.with_name(DONE))

    def _read(self) -> Iterator[TokenRecord]:
        for first in self._job.starts:
            for index, codes in enumerate(np.load(self._path(first)), first):
                label = int(self._job.labels[index])
                yield TokenRecord(tokens=codes[None], index=index, label=label)


class _Folder:
    """A directory of PNG files: the folder of chunks itself takes the output's name."""

    def __init__(self, job: Job):
        self._job, self._folder = job, job.work / CHUNKS

    @functools.cached_property
    def _there(self) -> set[str]:
        with os.scandir(self._folder) as entries:
            # Another process may just be giving a picture its name.
            finished = [entry for entry in entries if entry.name.endswith(".png")]
        return {entry.name for entry in finished if entry.stat().st_size}

    def has(self, first: int) -> bool:
        return self._names(first) <= self._there

    def store(self, first: int, images: np.ndarray) -> None:
        for index, image in enumerate(images, first):
            pictures.save_png(self._folder / self._name(index), image, make_folders=False)

    def bytes_to_come(self, missing: int) -> int:
        return missing  # at most: PNG compresses

    def is_finished(self) -> bool:
        return not self._folder.exists() and self._job.out.exists()

    def finish(self) -> None:
        self._folder.replace(self._job.out)

    def _name(self, index: int) -> str:
        return f"{index:06}_{self._job.noun}{self._job.labels[index]}.png"

    def _names(self, first: int) -> set[str]:
        part = self._job.chunk(first)
        return {self._name(index) for index in range(part.start, part.stop)}


Store = _Arrays | _Records | _Folder


def open_store(job: Job) -> Store:
    """Return what keeps the chunks of a job.

    Raises:
        ImportError: if the library of token records is not installed.
    """
    if job.records is not None:
        return _Records(job, job.records)
    return _Arrays(job) if job.out.suffix.lower() == ".npz" else _Folder(job)


def sweep(job: Job) -> None:
    """Remove what a killed job was writing."""
    for pattern in (JOINED_FILE, f"{CHUNKS}/*.partial"):
        for path in job.work.glob(pattern):
            path.unlink()
    shutil.rmtree(job.work / JOINED_FOLDER, ignore_errors=True)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
