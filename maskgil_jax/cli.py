"""What all command lines do alike: flags, one line of news, one line of error."""

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging

USER_ERRORS: tuple[type[Exception], ...] = (ValueError, OSError)

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the processes the cluster started.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process.")


def start(argv: Sequence[str]) -> None:
    """Refuse what absl left of the arguments, and silence libraries that tell of every file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


def join_processes() -> None:
    """Join the other processes that the flags name, before JAX is used."""
    numbers = (_NUM_PROCESSES.value, _PROCESS_ID.value)
    if not (_DISTRIBUTED.value or _COORDINATOR.value) and numbers != (None, None):
        raise app.UsageError("--num_processes and --process_id need --coordinator")
    if _DISTRIBUTED.value or _COORDINATOR.value:
        jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)


def parse_size(text: str, flag: str = "--size") -> tuple[int, int]:
    """Read the `HxW` of a flag.

    Raises:
        ValueError: if the text is something else.
    """
    if not (match := re.fullmatch(r"\s*([0-9]+)\s*[x×]\s*([0-9]+)\s*", text)):
        raise ValueError(f"{flag} {text!r} is no size; write height and width in pixels: 256x384")
    return int(match[1]), int(match[2])


def say(text: str) -> None:
    """Print a line, in the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def exit_on_user_error(function: Callable[[], Any], *errors: type[Exception]) -> None:
    """Run a command; end it with one clear line and status 1 where the input is at fault.

    Args:
        function: what the command does.
        *errors: error types that are the user's to mend, besides `USER_ERRORS`.
    """
    expected = (*USER_ERRORS, *errors)
    try:
        function()
    except expected as error:
        logging.debug("The error was raised here:", exc_info=True)  # --verbosity=1 shows it
        sys.exit(f"error: {error}")
