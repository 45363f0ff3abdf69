"""Encode a data set of images once, into sharded records of tokens to train from.

    python tools/extract_tokens.py --tokenizer DIR --data folder --path imagenet --split train \
        --image_size 256 --crops ten_crop --out imagenet_tokens

Train from the folder with `--config.data.name=tokens --config.data.path=imagenet_tokens
--config.data.flip=False`. Started again after a kill with the same command, it keeps the shards
that are whole. All devices encode; several processes share the shards: give each
`--coordinator HOST:PORT --num_processes N --process_id I` and the same folder.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import fcntl
import itertools
import json
import os
import pathlib
import shutil
import socket
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from maskgil_jax import config as schema
from maskgil_jax import generator, sharding
from maskgil_jax.build import data as build
from maskgil_jax.checkpoints import write_text_atomically
from maskgil_jax.data import crops as crop_kinds
from maskgil_jax.data.crops import Crops
from maskgil_jax.data.errors import DatasetError, ImageReadError
from maskgil_jax.data.folder import ImageFolderSource
from maskgil_jax.data.pipeline import Source
from maskgil_jax.data.token_records import (
    DATASET_FILE,
    Shard,
    TokenDataset,
    TokenizerOrigin,
    TokenRecord,
    find_shard_problem,
    read_dataset,
    sync_folder,
    write_shard,
)
from maskgil_jax.data.transforms import to_float
from maskgil_jax.tokenizers.base import Tokenizer

# What is there only while the extraction is unfinished: settings, notes of whole shards, locks.
WORK = ".extraction"
_SETTINGS = "settings.json"
_POLL_SECONDS = 0.2
_PROGRESS_SECONDS = 5.0
IMAGE_SETS = tuple(name for name in build.DATASETS if name != "tokens")

# float32 images [b s s 3] in [-1, 1] → int32 tokens [b gh gw], perhaps still being computed.
Encode = Callable[[np.ndarray], Any]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="model or run directory, or asset:NAME")
    add("--out", required=True, type=pathlib.Path, help="folder to write")
    add("--data", required=True, choices=IMAGE_SETS, help="kind of data set")
    add("--path", default="", help="folder: root of <split>/<class>/<image>; tfds: data_dir")
    add("--tfds_name", help="name of a prepared TFDS data set (default: imagenet2012)")
    add("--split", default="train")
    add("--image_size", required=True, type=int, help="side of the encoded squares in pixels")
    add("--crops", default="center", choices=crop_kinds.KINDS, help="what is encoded of an image")
    add("--crop_scales", help="of ten_crop: sides of the larger squares (default: 1.1,1.05)")
    add("--captions", action="store_true", help="keep the texts of the images")
    add("--batch_size", type=int, default=64, help="crops at a time, on all devices together")
    add("--num_shards", type=int, default=16, help="files to write")
    add("--num_threads", type=int, default=8, help="threads that read and crop images")
    add("--max_bad_images", type=int, default=0, help="unreadable images to leave out and list")
    add("--distributed", action="store_true", help="join the processes the cluster started")
    add("--coordinator", help="HOST:PORT of process 0")
    add("--num_processes", type=int, help="number of processes")
    add("--process_id", type=int, help="index of this process")
    return parser


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


def extract(
    wanted: TokenDataset,
    source: Source,
    crops: Crops,
    encode: Encode,
    out: pathlib.Path,
    *,
    place: Place | None = None,
    max_bad_images: int = 0,
    num_threads: int = 8,
    synchronise: Callable[[], None] = lambda: None,
) -> TokenDataset:
    """Write the token records of a data set, or what is missing of them.

    Args:
        wanted: what is to be written, without shards.
        source: the images.
        crops: cuts an image.
        encode: turns a batch of crops, always of `wanted.batch_size`, into tokens.
        out: folder.
        place: which process this is; the only one if `None`.
        max_bad_images: how many unreadable images are left out, in all; one more is an error.
        num_threads: threads that read images.
        synchronise: waits until every process has come there.

    Returns:
        what `dataset.json` now says.

    Raises:
        DatasetError: the folder holds something else or is in use, or more images are unreadable
            than allowed.
    """
    place = place or Place()
    if place.count > wanted.num_shards:
        raise ValueError(
            f"num_shards {wanted.num_shards} are too few for {place.count} processes; give at "
            "least one for each"
        )
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    with _hold(work / f"process-{place.index}.lock", out):
        synchronise()
        if place.index == 0:
            _check_others(out, place.count)
        synchronise()
        finished = _prepare(out, wanted)
        if finished is None:
            maker = _Maker(
                wanted=wanted,
                source=source,
                crops=crops,
                encode=encode,
                out=out,
                place=place,
                max_bad_images=max_bad_images,
                num_threads=num_threads,
            )
            maker.make_shards()
        if place.index > 0:
            return _wait_for_first(out, work)
        finished = finished or _finish(out, wanted, place, max_bad_images)
        for other in range(1, place.count):
            while not _is_free(work / f"process-{other}.lock"):
                time.sleep(_POLL_SECONDS)
        # A network file system keeps the lock in its folder until it is closed.
        shutil.rmtree(work, ignore_errors=True)
    with contextlib.suppress(OSError):
        work.rmdir()
    return finished


class _Maker:
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
        num_threads: int,
    ):
        self._wanted, self._source, self._crops, self._encode = wanted, source, crops, encode
        self._out, self._place, self._num_threads = out, place, num_threads
        self._max_bad_images = max_bad_images
        self._skipped = 0
        self._progress = _Progress(place, sum(map(len, map(wanted.shard_range, self._shards))))

    @property
    def _shards(self) -> range:
        return self._place.shards(self._wanted)

    def make_shards(self) -> None:
        """Keep the shards that are whole, make the others."""
        missing = []
        for shard in self._shards:
            note = _read_whole(self._out, self._wanted.shard_name(shard))
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
        with contextlib.closing(records):
            written = write_shard(
                self._out / name, self._out / WORK / f"{name}.partial", records, self._wanted.layout
            )
        note = dataclasses.replace(written, skipped=tuple(skipped))
        _write_note(self._out, note)

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
        caption = record["caption"] if self._wanted.has_captions else None
        label = record["label"] if self._wanted.num_classes is not None else None
        return to_float(self._crops(record["image"])), TokenRecord(
            tokens=np.zeros((0, 0, 0), np.int32),
            index=index,
            label=None if label is None else int(label),
            caption=None if caption is None else str(caption),
        )

    def _describe(self, index: int) -> str:
        if isinstance(self._source, ImageFolderSource):
            return "/".join(self._source.path(index).parts[-2:])
        return f"{index} of {self._source.name}"

    def _count_skipped(self, count: int, why: str = "in the shards that are there") -> None:
        self._skipped += count
        _check_skipped(self._skipped, self._max_bad_images, why)
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


def _check_skipped(count: int, allowed: int, why: str) -> None:
    if count > allowed:
        raise DatasetError(
            f"{count} unreadable images, {allowed} allowed; the last: {why}; repair or remove it, "
            "or leave some out with --max_bad_images"
        )


def _prepare(out: pathlib.Path, wanted: TokenDataset) -> TokenDataset | None:
    """Claim the folder for these settings; return what is there if it is finished and whole."""
    settings = out / WORK / _SETTINGS
    with _hold(out / WORK / "prepare.lock", out, wait=True):
        if (out / DATASET_FILE).exists():
            there = read_dataset(out)
            _check_same(out, there, wanted)
            if not any(find_shard_problem(out, shard, full=True) for shard in there.shards):
                return there
            # Back to unfinished: whole shards stay, and the others are made again.
            for shard in there.shards:
                _write_note(out, shard)
            write_text_atomically(settings, dataclasses.replace(there, shards=()).to_json())
            (out / DATASET_FILE).unlink()
        elif settings.exists():
            _check_same(out, _read_settings(settings), wanted)
        elif others := sorted(path.name for path in out.iterdir() if path.name != WORK):
            raise DatasetError(
                f"{out} holds files that are no token records ({', '.join(others[:3])}); choose "
                "an empty folder"
            )
        else:
            write_text_atomically(settings, wanted.to_json())
    return None


def _check_same(out: pathlib.Path, there: TokenDataset, wanted: TokenDataset) -> None:
    if changes := there.differences(wanted):
        raise DatasetError(
            f"{out} holds tokens extracted with other settings:\n  "
            + "\n  ".join(changes)
            + "\nGive the settings it was started with, or choose another folder."
        )


def _read_settings(file: pathlib.Path) -> TokenDataset:
    try:
        return TokenDataset.from_json(file.read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{file} cannot be read: {error}; remove the folder and start anew"
        ) from error


def _note_path(out: pathlib.Path, name: str) -> pathlib.Path:
    return out / WORK / f"{name}.json"


def _write_note(out: pathlib.Path, shard: Shard) -> None:
    """Note that a shard is whole; without the note it is made again."""
    write_text_atomically(_note_path(out, shard.name), json.dumps(dataclasses.asdict(shard)))


def _read_note(out: pathlib.Path, name: str) -> Shard | None:
    try:
        return Shard.from_dict(json.loads(_note_path(out, name).read_text()))
    except (FileNotFoundError, ValueError):
        return None


def _find_whole(out: pathlib.Path, name: str) -> Shard | None:
    """Return the note of a shard if its file is what the note says."""
    note = _read_note(out, name)
    try:
        return note if note and find_shard_problem(out, note, full=True) is None else None
    except FileNotFoundError:  # another process has just removed it, to make it again
        return None


def _read_whole(out: pathlib.Path, name: str) -> Shard | None:
    """Return the note of a shard if its file is what the note says; else remove both.

    Of a file without a note, nobody knows whether it is whole and what it left out.
    """
    if note := _find_whole(out, name):
        return note
    _note_path(out, name).unlink(missing_ok=True)
    (out / name).unlink(missing_ok=True)
    return None


def _finish(
    out: pathlib.Path, wanted: TokenDataset, place: Place, max_bad_images: int
) -> TokenDataset:
    """Wait for the shards of the other processes and write `dataset.json`."""
    notes = []
    for shard in range(wanted.num_shards):
        name, owner = wanted.shard_name(shard), shard % place.count
        lock = out / WORK / f"process-{owner}.lock"
        # The note of another may be older than a damage that its process has yet to find.
        find = _read_note if owner == place.index else _find_whole
        while (note := find(out, name)) is None:
            # Asked once more: its last note may have come between the two looks.
            ended = owner == place.index or _is_free(lock)
            if ended and find(out, name) is None:
                raise DatasetError(
                    f"process {owner} ended before {name} was whole; its error says why. Start "
                    "all processes again to go on"
                )
            time.sleep(_POLL_SECONDS)
        notes.append(note)
    skipped = [why for note in notes for _, why in note.skipped]
    _check_skipped(len(skipped), max_bad_images, skipped[-1] if skipped else "")
    path = _read_settings(out / WORK / _SETTINGS).tokenizer
    finished = dataclasses.replace(wanted, tokenizer=path, shards=tuple(notes))
    if not finished.count:
        raise DatasetError(f"all {wanted.source_records} images are unreadable")
    # Through the working folder, which goes: a kill leaves no half of it in the data set.
    write_text_atomically(out / WORK / DATASET_FILE, finished.to_json())
    (out / WORK / DATASET_FILE).replace(out / DATASET_FILE)
    sync_folder(out)
    return finished


def _wait_for_first(out: pathlib.Path, work: pathlib.Path) -> TokenDataset:
    """Wait until process 0 has written `dataset.json`."""
    while not (out / DATASET_FILE).exists():
        if _is_free(work / "process-0.lock") and not (out / DATASET_FILE).exists():
            raise DatasetError("process 0 ended before all shards were whole; its error says why")
        time.sleep(_POLL_SECONDS)
    return read_dataset(out)


@contextlib.contextmanager
def _hold(lock: pathlib.Path, out: pathlib.Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file; the system drops it when the process dies, however it dies."""
    with open(lock, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise DatasetError(
                f"{out} is in use by {file.read().strip() or 'another process'}; wait for it to "
                "end or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _is_free(lock: pathlib.Path) -> bool:
    """Tell whether nobody holds a lock file; one that is not there is free."""
    try:
        # NFS gives an exclusive lock only on a file that is open for writing.
        with open(lock, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _check_others(out: pathlib.Path, count: int) -> None:
    """See, in the first process, that the others hold their locks and that nobody else is there.

    Of an extraction by more processes some may still run after its first has ended.
    """
    for other in range(1, count):
        if _is_free(out / WORK / f"process-{other}.lock"):
            raise DatasetError(
                f"process 0 does not see the lock of process {other} in {out}: the folder is not "
                "the same one, or its file system does not share locks between machines; choose "
                "one that does, such as NFS"
            )
    own = {f"process-{index}.lock" for index in range(count)}
    for lock in sorted((out / WORK).glob("process-*.lock")):
        if lock.name not in own and not _is_free(lock):
            raise DatasetError(
                f"{out} is in use by {lock.read_text().strip() or 'a process'} of an extraction "
                "by more processes; wait for it to end or choose another folder"
            )


def open_source(args: argparse.Namespace) -> Source:
    """Open the data set of images that the command line names.

    Raises:
        ValueError: a flag that the kind of data set does not have, or no such data set.
    """
    if args.data in ("digits", "canvases") and args.path:
        raise ValueError(f"--path {args.path!r} is given, but {args.data} have no folder")
    if args.data != "tfds" and args.tfds_name is not None:
        raise ValueError(f"--tfds_name {args.tfds_name!r} is given, but --data is {args.data}")
    config = schema.preset()
    config.data.name, config.data.path, config.data.split = args.data, args.path, args.split
    if args.tfds_name is not None:
        config.data.tfds_name = args.tfds_name
    # None is replaced by another: that would store an image twice.
    config.data.max_bad_images = 0
    return build.make_source(config)


def describe(
    args: argparse.Namespace, source: Source, tokenizer: Tokenizer, crops: Crops
) -> TokenDataset:
    """Return what the command line asks for.

    Raises:
        ValueError: the image size does not suit the tokenizer, captions are asked for that are not
            there, or the number of shards is out of range.
    """
    spec = tokenizer.spec
    spec.grid_size(args.image_size, args.image_size)
    if spec.image_channels != 3:
        raise ValueError(f"the tokenizer takes {spec.image_channels} channels; images have 3 (RGB)")
    if args.captions and "caption" not in (fields := source[0]):
        raise DatasetError(
            f"--captions is given, but records of {source.name} have only {sorted(fields)}"
        )
    return TokenDataset(
        tokenizer=TokenizerOrigin(
            family=spec.family,
            path=args.tokenizer,
            fingerprint=tokenizer.fingerprint,
            codebook_size=spec.codebook_size,
            downsample_factor=spec.downsample_factor,
            dtype=tokenizer.config.to_dict()["dtype"],
        ),
        source=_identify(source),
        source_records=len(source),
        num_classes=getattr(source, "num_classes", None),
        has_captions=args.captions,
        image_size=(args.image_size, args.image_size),
        crops=crops.names,
        batch_size=args.batch_size,
        num_shards=args.num_shards,
    )


def _identify(source: Source) -> str:
    """Return the name of a data set, of a folder with a sum over the names of its files.

    Files that came and went between two starts would leave images out, or have them twice.
    """
    if isinstance(source, ImageFolderSource):
        return f"{source.name} {source.fingerprint[:12]}"
    return source.name


def make_crops(args: argparse.Namespace) -> Crops:
    """Return the crops that the command line asks for."""
    text = args.crop_scales
    try:
        scales = tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError as error:
        raise ValueError(f"--crop_scales {text!r}: write numbers, such as 1.1,1.05") from error
    if text is None and args.crops == "ten_crop":
        scales = crop_kinds.SCALES
    return Crops(kind=args.crops, size=args.image_size, scales=scales)


def make_encode(tokenizer: Tokenizer) -> tuple[Encode, sharding.Mesh]:
    """Return the encoder on all devices of this process, and their mesh."""
    mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
    encoder, rows = build.make_encoder(tokenizer, mesh), sharding.batch_sharding(mesh)
    return lambda x: encoder({"image": jax.device_put(x, rows), "label": None})["tokens"], mesh


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Extract what the command line asks for, and return the report that is printed."""
    for name in ("batch_size", "num_shards", "num_threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.max_bad_images < 0:
        raise ValueError(f"--max_bad_images {args.max_bad_images} must be at least 0")
    began = time.monotonic()
    crops, source = make_crops(args), open_source(args)
    tokenizer = generator.load_tokenizer(args.tokenizer)
    encode, mesh = make_encode(tokenizer)
    sharding.check_batch_size("--batch_size", args.batch_size, mesh)
    finished = extract(
        describe(args, source, tokenizer, crops),
        source,
        crops,
        encode,
        args.out,
        place=Place(index=jax.process_index(), count=jax.process_count()),
        max_bad_images=args.max_bad_images,
        num_threads=args.num_threads,
        synchronise=lambda: multihost_utils.sync_global_devices("extraction"),
    )
    return {
        "out": str(args.out),
        "images": finished.count,
        "skipped": sum(len(shard.skipped) for shard in finished.shards),
        "crops": len(finished.crops),
        "grid": finished.grid,
        "dtype": finished.layout.dtype,
        "seconds": round(time.monotonic() - began, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Extract; return the exit status, 1 after a refusal with its reason on stderr."""
    args = build_parser().parse_args(arguments)
    numbers = (args.num_processes, args.process_id)
    try:
        sharding.split_cpu(args.batch_size)
        if not (args.distributed or args.coordinator) and numbers != (None, None):
            raise ValueError("--num_processes and --process_id need --coordinator")
        if args.distributed or args.coordinator:
            jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
        report = run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Place(index=jax.process_index()).say(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
