"""Many images to disk: chunk by chunk, so that memory is bounded and a kill costs one chunk.

The end of the generation path. Beside the output lies a working folder, `.NAME.work`, with the
settings of the job and every finished chunk; the output appears whole, under its name, when the
last chunk is there, and the working folder goes. Started again after a kill, a job keeps its
chunks, and its output is the same to the last byte. Several processes share the chunks, in a
folder that all of them see; the first one puts the output together.
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np

from maskgil_jax import processes, workdir
from maskgil_jax.checkpoints import write_text_atomically
from maskgil_jax.data.token_dataset import DATASET_FILE
from maskgil_jax.stores import CHUNKS, DONE, Job, Store, open_store, sweep

# (index of the first image, its and the next ones' labels [b]) → their pixels, uint8 [b H W c], or
# for token records their codes, int32 [b gh gw].
Make = Callable[[int, np.ndarray], np.ndarray]

PROGRESS_SECONDS = 5.0
_POLL_SECONDS = 0.5
# Characters of a setting in a message; 66 are those of a SHA-256 in quotes.
_SHOWN = 66
# A network file system may show a new file that much later than the end of an old one.
_GRACE_SECONDS = 60.0
_SETTINGS = "settings.json"
# What the settings are called once all chunks are there.
_COMPLETE = "complete.json"
# For headers, names and folders of the file system.
_SPARE_BYTES = 1 << 20


def write(job: Job, make: Make) -> int:
    """Write all images of a job, or what is missing of them; return how many were there already.

    If `make` fails before a chunk is finished, nothing stays behind.

    Raises:
        ValueError: if the working folder is of a job with other settings (each is named), in use,
            or no working folder.
        FileExistsError: if the output is a directory that holds something.
        OSError: if the disk has too little space, before anything is made; or, in another process,
            if the first one ended without the output.
    """
    index, count = jax.process_index(), jax.process_count()
    with processes.enter_first(_hold(job), job.out) as finished:
        if finished:
            return len(job.labels)
        before, store = _identify(job.out), open_store(job)
        missing = [first for first in job.starts if not store.has(first)]
        to_come = sum(job.chunk(first).stop - first for first in missing)
        with processes.enter_first(_check_space(job, store, to_come), job.out):
            own = [first for first in missing if first // job.chunk_size % count == index]
            _make_chunks(job, store, own, make)
        # If another process dies, JAX ends this one.
        if index > 0:
            _await_output(job, before)
        else:
            _await_chunks(job, set(missing) - set(own))
            (job.work / _SETTINGS).replace(job.work / _COMPLETE)
            store.finish()
    return len(job.labels) - to_come


def _await_chunks(job: Job, starts: Set[int]) -> None:
    while True:
        store = open_store(job)
        if not (starts := {first for first in starts if not store.has(first)}):
            return
        time.sleep(_POLL_SECONDS)


def _await_output(job: Job, before: tuple[int, int] | None) -> None:
    while (job.work / CHUNKS).exists():
        time.sleep(_POLL_SECONDS)
    # The folder of chunks also goes where the first process gives up.
    end = time.monotonic() + _GRACE_SECONDS
    while _identify(job.out) in (None, before):
        if time.monotonic() > end:
            raise OSError(f"process 0 ended without {job.out}; its error says why")
        time.sleep(_POLL_SECONDS)


def _identify(path: pathlib.Path) -> tuple[int, int] | None:
    """Return what tells a file or folder from another of its name; `None` if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _make_chunks(job: Job, store: Store, starts: Sequence[int], make: Make) -> None:
    progress = Progress(sum(job.chunk(first).stop - first for first in starts))
    for first in starts:
        part = job.chunk(first)
        made = make(first, job.labels[part])
        assert made.shape == (part.stop - part.start, *job.shape)
        store.store(first, made)
        progress.add(len(made))


def check_out(out: os.PathLike | str) -> None:
    """Refuse a directory that could not take the images, before anything is computed.

    Raises:
        ValueError: if it has no name, such as `.`.
        FileExistsError: if it holds something that no interrupted job put there.
    """
    path = pathlib.Path(out)
    if path.name in ("", ".."):
        raise ValueError(f"--out {path} has no name; allowed: FILE.png, FILE.npz, a new directory")
    work = path.with_name(f".{path.name}.work")
    if path.suffix.lower() == ".npz":
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory; choose another --out")
        return
    # Token records take their place before their chunks go.
    is_there = not (work / CHUNKS).exists() or (path / DATASET_FILE).exists()
    is_finished = (work / _COMPLETE).exists() and is_there
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not is_finished:
        with contextlib.suppress(OSError):  # what a kill at the very end left: no more than a lock
            if [entry.name for entry in work.iterdir()] == [workdir.LOCK]:
                (work / workdir.LOCK).unlink()
            work.rmdir()
        raise FileExistsError(f"{path} exists and is not empty; choose another --out or remove it")


@contextlib.contextmanager
def _hold(job: Job) -> Iterator[bool]:
    """Make or reopen the working folder; yield whether the output is there already."""
    check_out(job.out)
    work, chunks, file = job.work, job.work / CHUNKS, job.work / _SETTINGS
    new_parents = [parent for parent in work.parents if not parent.exists()]
    work.mkdir(parents=True, exist_ok=True)
    with workdir.lock(work, "--out"):
        _sweep(job)
        names = {path.name for path in work.iterdir()} - {workdir.LOCK}
        there = [name for name in (_SETTINGS, _COMPLETE) if name in names]
        if names and not there:
            raise ValueError(
                f"{work} holds files but no {_SETTINGS}; remove it or choose another --out"
            )
        if there:
            check_same(work, read_settings(work / there[0]), job.settings)
        finished = there == [_COMPLETE] and open_store(job).is_finished()
        if finished and chunks.exists():
            chunks.rename(work / DONE)
        elif not finished:
            if there == [_COMPLETE]:
                (work / _COMPLETE).replace(file)
            shutil.rmtree(work / DONE, ignore_errors=True)
            write_text_atomically(file, json.dumps(dict(job.settings), indent=1) + "\n")
            chunks.mkdir(exist_ok=True)
        try:
            yield finished
        finally:
            if not chunks.exists() or not any(chunks.iterdir()):
                _remove(work)
                for parent in [] if job.out.exists() else new_parents:
                    with contextlib.suppress(OSError):  # somebody else has put something there
                        parent.rmdir()


def _sweep(job: Job) -> None:
    """Remove what a killed job was writing."""
    sweep(job)
    for path in job.work.glob(f".{_SETTINGS}.*"):
        path.unlink()


def _remove(work: pathlib.Path) -> None:
    """Remove a working folder.

    The settings go after the chunks, as without them it could not be told whose they are; the lock
    goes last, as it guards the others.
    """
    try:
        (work / CHUNKS).rmdir()
    except FileNotFoundError:
        pass
    except OSError:  # another process has just stored a chunk
        return
    shutil.rmtree(work / DONE, ignore_errors=True)
    for name in (_SETTINGS, _COMPLETE, workdir.LOCK):
        (work / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a network file system keeps a file that is open
        work.rmdir()


def read_settings(file: pathlib.Path) -> dict[str, Any]:
    """Read the settings in a working folder.

    Raises:
        ValueError: if they are damaged, or no settings.
    """
    try:
        settings = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged; remove {file.parent} to begin anew") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings; remove {file.parent} to begin anew")
    return settings


def check_same(
    work: pathlib.Path,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    what: str = "a part of images made",
) -> None:
    """Refuse to continue what was begun with other settings.

    Args:
        work: the working folder.
        old: its settings.
        new: those of this command.
        what: what the folder holds, for the message.

    Raises:
        ValueError: if a setting differs; each is named with both values.
    """
    if differing := describe_differences(old, new):
        remedy = "Continue with those settings, choose another --out, or remove that folder to "
        if changed := describe_changed_files(old, new):
            # Nobody can go back to pictures that are gone.
            remedy = f"{changed} Choose another --out, or remove {work} to "
        raise ValueError(
            f"{work} holds {what} with other settings:\n"
            + "\n".join(differing)
            + f"\n{remedy}begin anew."
        )


def describe_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting that differs, with the value there and the one now."""
    there, here = _flatten(old), _flatten(json.loads(json.dumps(dict(new))))
    return [
        f"  {name}: {_shorten(there.get(name))} there, {_shorten(here.get(name))} now"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


def describe_changed_files(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return a sentence on files whose contents (`sha256`) differ; empty if there are none."""
    there, here = _flatten(old), _flatten(new)
    names = {
        name.partition(".")[0]
        for name in there.keys() & here.keys()
        if name.endswith(".sha256") and there[name] != here[name]
    }
    if not names:
        return ""
    files = " and ".join(sorted(names))
    return f"The files of {files} have changed since then, or others are given."


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    # A SHA-256 is shown whole: half of one cannot be looked up.
    if len(text) <= _SHOWN:
        return text
    return json.dumps(f"{value[:57]}...") if isinstance(value, str) else f"{text[:57]}..."


@contextlib.contextmanager
def _check_space(job: Job, store: Store, images: int) -> Iterator[None]:
    needed = store.bytes_to_come(job.item_bytes * images)
    free = shutil.disk_usage(job.work).free
    if needed + _SPARE_BYTES > free:
        raise OSError(
            f"{job.out} may need {_in_bytes(needed)} more on a disk with {_in_bytes(free)} free; "
            "make room, choose another disk for --out, or make fewer images"
        )
    yield


def _in_bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


class Progress:
    """Says on stderr every few seconds how far it is, at the speed since the first chunk.

    Args:
        total: images to come.
        label: put in front of every line.
    """

    def __init__(self, total: int, label: str = ""):
        self._total, self._done, self._first = total, 0, 0
        self._label = label
        self._said = time.monotonic()
        self._began = self._said

    def add(self, count: int) -> None:
        """Count images that are done."""
        now = time.monotonic()
        self._done += count
        if self._first == 0:
            self._first, self._began = self._done, now
        if now - self._said < PROGRESS_SECONDS or self._done == self._total:
            return
        self._said = now
        text = f"{self._label}{self._done:,} of {self._total:,} images"
        if self._done == self._first:  # it took in what was compiled, and tells no speed
            say(text)
            return
        rate = (self._done - self._first) / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate
        say(f"{text}, {rate:.1f} images/s, {_in_time(left)} left")


def say(text: str) -> None:
    """Print a line on stderr at once."""
    print(text, file=sys.stderr, flush=True)


def _in_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
