"""The order of events of an extraction, and how its processes wait for one another."""

import contextlib
import dataclasses
import pathlib
import shutil
import time
from collections.abc import Callable

from extraction import work
from extraction.features import TextReader
from extraction.shards import Encode, Place, ShardMaker, check_skipped

from maskgil_jax.checkpoints import write_text_atomically
from maskgil_jax.data.crops import Crops
from maskgil_jax.data.errors import DatasetError
from maskgil_jax.data.pipeline import Source
from maskgil_jax.data.token_dataset import DATASET_FILE, TokenDataset, read_dataset
from maskgil_jax.data.token_records import sync_folder

_POLL_SECONDS = 0.2


def extract(
    wanted: TokenDataset,
    source: Source,
    crops: Crops,
    encode: Encode,
    out: pathlib.Path,
    *,
    place: Place | None = None,
    max_bad_images: int = 0,
    skipped_before: int = 0,
    num_threads: int = 8,
    text_reader: TextReader | None = None,
    may_be_empty: bool = False,
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
        skipped_before: how many of them were left out of other parts of the data set.
        num_threads: threads that read images.
        text_reader: makes the features of the texts, where `wanted.text` asks for them.
        may_be_empty: whether all images may be left out, as of one part of a data set; otherwise
            that is an error.
        synchronise: waits until every process has come there.

    Returns:
        what `dataset.json` now says.

    Raises:
        DatasetError: the folder holds something else or is in use, or more images are unreadable
            than allowed.
    """
    if (text_reader is None) != (wanted.text is None):
        raise ValueError(f"features by {wanted.text} need what reads texts, and nothing else does")
    place = place or Place()
    # Of fewer images than processes, one shard each is all there can be; the others wait.
    if place.count > wanted.num_shards and wanted.num_shards < wanted.source_records:
        raise ValueError(
            f"num_shards {wanted.num_shards} are too few for {place.count} processes; give at "
            "least one for each"
        )
    folder = out / work.WORK
    folder.mkdir(parents=True, exist_ok=True)
    with work.hold(work.process_lock(out, place.index), out):
        synchronise()
        if place.index == 0:
            work.check_others(out, place.count)
        synchronise()
        finished = work.prepare(out, wanted)
        if finished is None:
            maker = ShardMaker(
                wanted=wanted,
                source=source,
                crops=crops,
                encode=encode,
                out=out,
                place=place,
                max_bad_images=max_bad_images,
                skipped_before=skipped_before,
                num_threads=num_threads,
                text_reader=text_reader,
            )
            maker.make_shards()
        if place.index > 0:
            return _wait_for_first(out)
        finished = finished or _finish(
            out, wanted, place, max_bad_images, skipped_before, may_be_empty
        )
        for other in range(1, place.count):
            while not work.is_free(work.process_lock(out, other)):
                time.sleep(_POLL_SECONDS)
        # A network file system keeps the lock in its folder until it is closed.
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
    return finished


def _finish(
    out: pathlib.Path,
    wanted: TokenDataset,
    place: Place,
    max_bad_images: int,
    skipped_before: int,
    may_be_empty: bool,
) -> TokenDataset:
    """Wait for the shards of the other processes and write `dataset.json`."""
    notes = []
    for shard in range(wanted.num_shards):
        name, owner = wanted.shard_name(shard), shard % place.count
        lock = work.process_lock(out, owner)
        # The note of another may be older than a damage that its process has yet to find.
        find = work.read_note if owner == place.index else work.find_whole
        while (note := find(out, name)) is None:
            # Asked once more: its last note may have come between the two looks.
            ended = owner == place.index or work.is_free(lock)
            if ended and find(out, name) is None:
                raise DatasetError(
                    f"process {owner} ended before {name} was whole; its error says why. Start "
                    "all processes again to go on"
                )
            time.sleep(_POLL_SECONDS)
        notes.append(note)
    skipped = [why for note in notes for _, why in note.skipped]
    check_skipped(skipped_before + len(skipped), max_bad_images, skipped[-1] if skipped else "")
    # With the paths that were given at first: the same may lie elsewhere now.
    began = work.read_settings(out)
    finished = dataclasses.replace(
        wanted, tokenizer=began.tokenizer, text=began.text, shards=tuple(notes)
    )
    if not (finished.count or may_be_empty):
        raise DatasetError(f"all {wanted.source_records} images are unreadable")
    # Through the working folder, which goes: a kill leaves no half of it in the data set.
    partial = out / work.WORK / DATASET_FILE
    write_text_atomically(partial, finished.to_json())
    partial.replace(out / DATASET_FILE)
    sync_folder(out)
    return finished


def _wait_for_first(out: pathlib.Path) -> TokenDataset:
    """Wait until process 0 has written `dataset.json`."""
    while not (out / DATASET_FILE).exists():
        if work.is_free(work.process_lock(out, 0)) and not (out / DATASET_FILE).exists():
            raise DatasetError("process 0 ended before all shards were whole; its error says why")
        time.sleep(_POLL_SECONDS)
    return read_dataset(out)
