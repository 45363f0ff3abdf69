"""What several processes of one command do together."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


@contextlib.contextmanager
def enter_first(context: contextlib.AbstractContextManager[Any], what: object) -> Iterator[bool]:
    """Enter a context in the first process only; all end if it is refused there.

    Args:
        context: such as one that holds a directory.
        what: its name in the message of the other processes.

    Yields:
        in every process, whether what the context gave in the first is true.

    Raises:
        ValueError, OSError: if the first process raises one.
    """
    with contextlib.ExitStack() as stack:
        refusal: ValueError | OSError | None = None
        given = False
        if jax.process_index() == 0:
            try:
                given = bool(stack.enter_context(context))
            except (ValueError, OSError) as error:
                refusal = error
        if jax.process_count() > 1:
            state = np.array([refusal is not None, given])
            refused, given = (bool(x) for x in multihost_utils.broadcast_one_to_all(state))
            if refused and refusal is None:
                refusal = ValueError(f"process 0 refused {what}; its error says why")
        if refusal is not None:
            raise refusal
        yield given
