"""The working folder of an unfinished extraction: its locks, its settings and its notes.

It lies in the folder of the data set and goes when that is whole. A process that dies leaves no
lock, and a shard is whole only if a note says so.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator

from maskgil_jax.checkpoints import write_text_atomically
from maskgil_jax.data.errors import DatasetError
from maskgil_jax.data.token_dataset import DATASET_FILE, Shard, TokenDataset, read_dataset
from maskgil_jax.data.token_records import find_shard_problem

WORK = ".extraction"
_SETTINGS = "settings.json"


def process_lock(out: pathlib.Path, index: int) -> pathlib.Path:
    """Return the lock file that a process holds while it runs."""
    return out / WORK / f"process-{index}.lock"


@contextlib.contextmanager
def hold(lock: pathlib.Path, out: pathlib.Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file; the system drops it when the process dies, however it dies.

    Raises:
        DatasetError: another process holds it, and `wait` is false.
    """
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


def is_free(lock: pathlib.Path) -> bool:
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


def check_others(out: pathlib.Path, count: int) -> None:
    """See, in the first process, that the others hold their locks and that nobody else is there.

    Of an extraction by more processes some may still run after its first has ended.

    Raises:
        DatasetError: a lock is not seen, or another extraction is at work.
    """
    for other in range(1, count):
        if is_free(process_lock(out, other)):
            raise DatasetError(
                f"process 0 does not see the lock of process {other} in {out}: the folder is not "
                "the same one, or its file system does not share locks between machines; choose "
                "one that does, such as NFS"
            )
    own = {process_lock(out, index) for index in range(count)}
    for lock in sorted((out / WORK).glob("process-*.lock")):
        if lock not in own and not is_free(lock):
            raise DatasetError(
                f"{out} is in use by {lock.read_text().strip() or 'a process'} of an extraction "
                "by more processes; wait for it to end or choose another folder"
            )


def prepare(out: pathlib.Path, wanted: TokenDataset) -> TokenDataset | None:
    """Claim the folder for these settings; return what is there if it is finished and whole.

    Raises:
        DatasetError: the folder holds other files, or tokens of other settings.
    """
    settings = out / WORK / _SETTINGS
    with hold(out / WORK / "prepare.lock", out, wait=True):
        if (out / DATASET_FILE).exists():
            there = read_dataset(out)
            _check_same(out, there, wanted)
            if not any(find_shard_problem(out, shard, full=True) for shard in there.shards):
                return there
            # Back to unfinished: whole shards stay, and the others are made again.
            for shard in there.shards:
                write_note(out, shard)
            write_text_atomically(settings, dataclasses.replace(there, shards=()).to_json())
            (out / DATASET_FILE).unlink()
        elif settings.exists():
            _check_same(out, read_settings(out), wanted)
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


def read_settings(out: pathlib.Path) -> TokenDataset:
    """Return what the extraction was started with.

    Raises:
        DatasetError: it cannot be read.
    """
    file = out / WORK / _SETTINGS
    try:
        return TokenDataset.from_json(file.read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{file} cannot be read: {error}; remove the folder and start anew"
        ) from error


def _note_path(out: pathlib.Path, name: str) -> pathlib.Path:
    return out / WORK / f"{name}.json"


def write_note(out: pathlib.Path, shard: Shard) -> None:
    """Note that a shard is whole; without the note it is made again."""
    write_text_atomically(_note_path(out, shard.name), json.dumps(dataclasses.asdict(shard)))


def read_note(out: pathlib.Path, name: str) -> Shard | None:
    """Return the note of a shard, or `None` if there is none."""
    try:
        return Shard.from_dict(json.loads(_note_path(out, name).read_text()))
    except (FileNotFoundError, ValueError):
        return None


def find_whole(out: pathlib.Path, name: str) -> Shard | None:
    """Return the note of a shard if its file is what the note says."""
    note = read_note(out, name)
    try:
        return note if note and find_shard_problem(out, note, full=True) is None else None
    except FileNotFoundError:  # another process has just removed it, to make it again
        return None


def read_whole(out: pathlib.Path, name: str) -> Shard | None:
    """Return the note of a shard if its file is what the note says; else remove both.

    Of a file without a note, nobody knows whether it is whole and what it left out.
    """
    if note := find_whole(out, name):
        return note
    _note_path(out, name).unlink(missing_ok=True)
    (out / name).unlink(missing_ok=True)
    return None
