"""A run's directory: claimed by one run at a time, and by one configuration for good."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from ml_collections import ConfigDict

from maskgil_jax import checkpoints, config

RUN_CONFIG = "run.json"
LOCK = "lock"

# Fields that a resumed run may change: they touch neither the state nor what is learnt.
_FREE = (
    "logging.",
    "evaluation.",
    "report.",
    "sampler.",
    "mesh.",
    "data.check_records",
    "data.max_bad_images",
    "data.num_threads",
    "data.prefetch",
    "tokenizer.batch_size",
)


@contextlib.contextmanager
def claim_workdir(path: os.PathLike | str, run: ConfigDict) -> Iterator[pathlib.Path]:
    """Create or reopen a run directory and hold it until the block ends.

    The configuration is written to `run.json` at first, and compared with it later. The lock
    belongs to the process: the system drops it when the process dies, however it dies.

    Args:
        path: directory of the run.
        run: its configuration.

    Raises:
        ValueError: if the directory holds another configuration (all differences are listed), is
            in use, or holds files that are no run's.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with lock(path):
        file = path / RUN_CONFIG
        for leftover in path.glob(f".{RUN_CONFIG}.*"):  # of a run killed while it wrote the file
            leftover.unlink()
        if not file.exists() and any(p.name != LOCK for p in path.iterdir()):
            raise ValueError(f"{path} holds files but no {RUN_CONFIG}; choose an empty directory")
        if file.exists():
            _check_same(path, _read(file), run)
        checkpoints.write_text_atomically(file, config.to_json(run))
        yield path


def read_run_config(path: os.PathLike | str) -> ConfigDict:
    """Return the configuration of a run directory.

    Raises:
        FileNotFoundError: if it is no run directory.
    """
    file = pathlib.Path(path) / RUN_CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is neither a run directory ({RUN_CONFIG} is missing) nor a model directory "
            "(params.safetensors is missing)"
        )
    return _read(file)


def _read(file: pathlib.Path) -> ConfigDict:
    try:
        return config.from_json(file.read_text())
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} cannot be read: {error}. Restore it, or choose another --workdir"
        ) from error


def _check_same(path: pathlib.Path, old: ConfigDict, new: ConfigDict) -> None:
    free: tuple[str, ...] = _FREE
    if old.optimizer.rate_schedule == "constant":
        free = (*free, "training.num_steps")
    changes = [line for line in config.diff(old, new) if not line.startswith(free)]
    if changes:
        raise ValueError(
            f"{path} holds a run with another configuration:\n  "
            + "\n  ".join(changes)
            + "\nResume with the configuration it was started with, or choose another --workdir."
        )


@contextlib.contextmanager
def lock(path: pathlib.Path, option: str = "--workdir") -> Iterator[None]:
    """Hold a directory until the block ends, or the process, however it ends.

    Args:
        path: an existing directory, in which a file named `LOCK` appears.
        option: what on the command line chooses another directory, for the message.

    Raises:
        ValueError: if another process holds it.
    """
    with open(path / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{path} is in use by {file.read().strip() or 'another process'}; wait for it to "
                f"end or choose another {option}"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
