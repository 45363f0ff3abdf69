"""Improved precision and recall of a set of generated features against a set of real ones.

Each set's manifold is the union of the balls around its members that reach to their k-th nearest
neighbour in the same set. Precision is the share of generated features inside the real manifold,
recall the share of real features inside the generated one.

Reference: Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative
Models", section 2.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jax import Array
from jaxtyping import Bool, Float

BLOCK_ROWS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Fidelity and coverage of a set of samples, both in [0, 1]."""

    precision: float
    recall: float


def precision_recall(
    real: Array | np.ndarray,
    generated: Array | np.ndarray,
    *,
    k: int = 3,
    block_rows: int = BLOCK_ROWS,
) -> PrecisionRecall:
    """Measure precision and recall of `generated` [m, d] against `real` [n, d].

    Memory grows with `block_rows` times the larger set, never with the product of both sets.

    Raises:
      ValueError: a set is no finite [rows, d] array, widths differ, or a set has fewer than k + 1
        rows.

    Reference: Kynkäänniemi et al. 2019, equations 1 and 2.
    """
    real, generated = _as_features("real", real), _as_features("generated", generated)
    _check_same_width(("real", real), ("generated", generated))
    return PrecisionRecall(
        precision=float(_covered(generated, real, k, block_rows).mean()),
        recall=float(_covered(real, generated, k, block_rows).mean()),
    )


def neighbour_radii(
    features: Array | np.ndarray, *, k: int = 3, block_rows: int = BLOCK_ROWS
) -> Float[np.ndarray, " n"]:
    """Return each feature's distance to its k-th nearest neighbour, itself excluded.

    Raises:
      ValueError: `features` is no finite [n, d] array, or n < k + 1.
    """
    features = _as_features("features", features)
    return np.sqrt(_squared_radii(features, k, block_rows))


def nearest_distances(
    queries: Array | np.ndarray, references: Array | np.ndarray, *, block_rows: int = BLOCK_ROWS
) -> Float[np.ndarray, " n"]:
    """Return the distance of each query to its nearest reference; exactly 0 for a copy.

    Raises:
      ValueError: an input is no finite [rows, d] array or is empty, or widths differ.
    """
    queries = _as_features("queries", queries)
    references = _as_features("references", references)
    _check_same_width(("queries", queries), ("references", references))
    nearest = [block.argmin(1) for _, block in _squared_distances(queries, references, block_rows)]
    # Measured again as a difference: the products that found the neighbour leave rounding noise.
    return np.linalg.norm(queries - references[np.concatenate(nearest)], axis=1)


def _covered(
    queries: Float[np.ndarray, "m d"], centres: Float[np.ndarray, "n d"], k: int, block_rows: int
) -> Bool[np.ndarray, " m"]:
    """Say for each query whether it lies in at least one ball of the manifold of `centres`."""
    radii = _squared_radii(centres, k, block_rows)
    blocks = _squared_distances(queries, centres, block_rows)
    return np.concatenate([(block <= radii).any(1) for _, block in blocks])


def _squared_radii(
    features: Float[np.ndarray, "n d"], k: int, block_rows: int
) -> Float[np.ndarray, " n"]:
    if k < 1:
        raise ValueError(f"k = {k}: at least one neighbour is needed")
    if len(features) < k + 1:
        raise ValueError(
            f"{len(features)} features are too few for k = {k}: a neighbourhood needs at least "
            f"k + 1 = {k + 1}; give more or lower k"
        )
    radii = []
    for start, block in _squared_distances(features, features, block_rows):
        rows = np.arange(len(block))
        block[rows, start + rows] = np.inf  # not a neighbour of itself, yet its duplicates are
        radii.append(np.partition(block, k - 1, axis=1)[:, k - 1])
    return np.concatenate(radii)


def _squared_distances(
    rows: Float[np.ndarray, "m d"], columns: Float[np.ndarray, "n d"], block_rows: int
) -> Iterator[tuple[int, Float[np.ndarray, "block n"]]]:
    """Yield (first row, squared distances) for one block of rows after the other.

    As matrix products in float64: exact for 8-bit pixels and their box averages, where ties with
    the radius are common.
    """
    if block_rows < 1:
        raise ValueError(f"block_rows = {block_rows}: at least one row per block is needed")
    column_norms = np.square(columns).sum(1)
    for start in range(0, len(rows), block_rows):
        block = rows[start : start + block_rows]
        squared = block @ columns.T
        squared *= -2
        squared += np.square(block).sum(1)[:, None]
        squared += column_norms
        yield start, np.maximum(squared, 0, out=squared)


def _as_features(name: str, values: Array | np.ndarray) -> Float[np.ndarray, "n d"]:
    values = np.asarray(values)
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiu":
        raise ValueError(
            f"{name} has shape {values.shape} and dtype {values.dtype}; "
            "expected a non-empty [rows, features] array of real numbers"
        )
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        raise ValueError(
            f"{name} holds NaN or infinity in {len(bad)} of {len(values)} rows, first in row "
            f"{bad[0]}; a metric over the rest would be of another set"
        )
    return values


def _check_same_width(one: tuple[str, np.ndarray], other: tuple[str, np.ndarray]) -> None:
    if one[1].shape[1] != other[1].shape[1]:
        raise ValueError(
            f"{one[0]} has {one[1].shape[1]} features per row, {other[0]} {other[1].shape[1]}; "
            "both must come from the same extractor"
        )
