"""Features of images as the metrics take them: [n, d] arrays, checked once, read block by block.

They stay where they are, so that a memory-mapped file need not fit into memory.
"""

from collections.abc import Iterator

import numpy as np
from jax import Array
from jaxtyping import Float64

# 64 MiB of float64 at the 2048 features of Inception's last pool.
BLOCK_ROWS = 4096


def as_features(name: str, values: Array | np.ndarray, *, first_row: int = 0) -> np.ndarray:
    """Return `values` as a NumPy array [n, d] of finite real numbers, not copied.

    Args:
        name: what errors call them.
        values: floating or integer; any other type is refused.
        first_row: number that errors give to the first row, where `values` are part of a set.

    Raises:
        ValueError: not two axes, empty, not of real numbers, or with NaN or infinity.
    """
    values = np.asarray(values)
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiu":
        raise ValueError(
            f"{name} has shape {values.shape} and dtype {values.dtype}; "
            "expected a non-empty [rows, features] array of real numbers (floating or integer)"
        )
    bad: list[int] = []
    for start in range(0, len(values), BLOCK_ROWS):
        finite = np.isfinite(values[start : start + BLOCK_ROWS]).all(axis=1)
        bad += (start + np.flatnonzero(~finite)).tolist()
    if bad:
        raise ValueError(
            f"{name} holds NaN or infinity in {len(bad)} of {len(values)} rows, first in row "
            f"{first_row + bad[0]}; a metric over the rest would be of another set"
        )
    return values


def read_blocks(
    features: np.ndarray, block_rows: int = BLOCK_ROWS
) -> Iterator[Float64[np.ndarray, "block d"]]:
    """Yield the rows in float64, `block_rows` at a time; the last block may be shorter."""
    for start in range(0, len(features), block_rows):
        yield features[start : start + block_rows].astype(np.float64)


def check_same_width(one: tuple[str, int], other: tuple[str, int]) -> None:
    """Refuse two sets, each a name and its number of features, that differ in that number.

    Raises:
        ValueError: they differ.
    """
    if one[1] != other[1]:
        raise ValueError(
            f"{one[0]} has {one[1]} features per row, {other[0]} {other[1]}; "
            "both must come from the same extractor"
        )
