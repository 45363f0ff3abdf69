"""An image as a stream of tokens in which every row of codes is closed by a new line.

No new line is ever drawn: where they stand is known, and only codes may stand elsewhere. So no
model, whatever it predicts, makes a malformed row.

Reference: Lumina-mGPT `inference_solver.py`, which constrains logits to the same end.
"""

import numpy as np
from jaxtyping import Array, Int, Int32


def force_rows(count: int, columns: int, new_line: int) -> Int32[np.ndarray, " n"]:
    """Return the stream up to the last of some codes: -1 where a code is drawn, else the new line.

    Args:
        count: codes, in raster order; at least 1.
        columns: codes of a row.
        new_line: the token that closes a row.

    Raises:
        ValueError: if `count` or `columns` is not positive.
    """
    if count < 1 or columns < 1:
        raise ValueError(f"count {count} and columns {columns} must be at least 1")
    length = count + (count - 1) // columns
    closes = (np.arange(length) + 1) % (columns + 1) == 0
    return np.where(closes, new_line, -1).astype(np.int32)


def take_codes(
    tokens: Int[Array | np.ndarray, "b n"], forced: Int32[np.ndarray, " n"]
) -> Int[Array | np.ndarray, "b k"]:
    """Return the codes of a stream, without the tokens that were not drawn."""
    return tokens[:, np.flatnonzero(forced < 0)]
