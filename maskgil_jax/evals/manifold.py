"""Generated and real features against each other's neighbourhoods.

Each set's manifold is the union of the balls around its members that reach to their k-th nearest
neighbour in the same set. Precision is the share of generated features inside the real manifold,
recall the share of real features inside the generated one. Density counts in how many real balls
a generated feature lies, coverage how many real balls hold one.

All distances are computed block by block on the default device; features stay on the host, and what
is kept grows with the sets, never with their product.

Reference: Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative
Models", section 2; Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative
Models", section 3.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int
from numpy.typing import DTypeLike

from maskgil_jax.evals.features import as_features, check_same_width, read_blocks

# Two blocks of 2048 features and their distances take 48 MiB; larger ones are slower on a CPU.
BLOCK_ROWS = 2048
# Of a ball's squared radius to its centre's squared distance from the mean: below, rounding of
# float32 products moves the edge by more than a thousandth.
_RESOLVED = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Fidelity and coverage of a set of samples, both in [0, 1]."""

    precision: float
    recall: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifolds(PrecisionRecall):
    """Precision and recall with density, at least 0 (about 1 for equal sets), and coverage."""

    density: float
    coverage: float


def precision_recall(
    real: Array | np.ndarray,
    generated: Array | np.ndarray,
    *,
    k: int = 3,
    block_rows: int = BLOCK_ROWS,
    dtype: DTypeLike = np.float32,
) -> PrecisionRecall:
    """Measure precision and recall of `generated` [m, d] against `real` [n, d].

    The arguments and errors of `compare_manifolds`.

    Reference: Kynkäänniemi et al. 2019, equations 1 and 2.
    """
    both = compare_manifolds(real, generated, k=k, density_k=k, block_rows=block_rows, dtype=dtype)
    return PrecisionRecall(precision=both.precision, recall=both.recall)


def compare_manifolds(
    real: Array | np.ndarray,
    generated: Array | np.ndarray,
    *,
    k: int = 3,
    density_k: int = 5,
    block_rows: int = BLOCK_ROWS,
    dtype: DTypeLike = np.float32,
) -> Manifolds:
    """Measure all four figures of `generated` [m, d] against `real` [n, d] in one pass.

    A feature on the edge of a ball lies inside for precision and recall, outside for density and
    coverage, as in the code of their authors.

    Args:
        real: features of the reference.
        generated: features of the samples, of the same extractor.
        k: neighbour that the balls of precision and recall reach to, the centre not counted.
        density_k: the same for density and coverage.
        block_rows: rows of either set that meet in one block. The device holds two blocks of
            features and a few arrays of [block_rows, block_rows].
        dtype: of the distances. In float32 features are taken from the mean of the real ones, so
            that no common offset cancels, and where balls are too small beside their distance from
            it, as in clusters far apart or of copies, float64 is taken instead. That takes features
            as they are, exact for 8-bit pixels and their averages, where ties with the radius are
            common.

    Raises:
        ValueError: a set is no finite [rows, d] array or too large for `dtype`, widths differ, a
            set has fewer than k + 1 rows, or a setting is out of range.

    Reference: Kynkäänniemi et al. 2019, equations 1 and 2; Naeem et al. 2020, equations 3 and 4.
    """
    real, generated = as_features("real", real), as_features("generated", generated)
    check_same_width(("real", real.shape[1]), ("generated", generated.shape[1]))
    _check_neighbours("real", real, max(k, density_k), min(k, density_k))
    _check_neighbours("generated", generated, k, k)
    dtype = _check_dtype(dtype)
    centre = _mean(real) if dtype == np.float32 else None
    ours, theirs = (
        _Cut(name, rows, centre, block_rows, dtype)
        for name, rows in (("generated", generated), ("real", real))
    )
    with jax.enable_x64(dtype == np.float64):
        their_nearest = _nearest_squared(theirs, max(k, density_k))
        our_nearest = _nearest_squared(ours, k)
        is_resolved = dtype == np.float64 or (
            _are_resolved(theirs, their_nearest[:, min(k, density_k) - 1])
            and _are_resolved(ours, our_nearest[:, k - 1])
        )
        if is_resolved:
            found = _compare(
                ours,
                theirs,
                our_radii=our_nearest[:, k - 1],
                their_radii=their_nearest[:, k - 1],
                density_radii=their_nearest[:, density_k - 1],
            )
    if not is_resolved:
        return compare_manifolds(
            real, generated, k=k, density_k=density_k, block_rows=block_rows, dtype=np.float64
        )
    return Manifolds(
        precision=float(found.ours_inside.mean()),
        recall=float(found.theirs_inside.mean()),
        density=float(found.balls.mean() / density_k),
        coverage=float(found.balls_filled.mean()),
    )


def nearest_distances(
    queries: Array | np.ndarray, references: Array | np.ndarray, *, block_rows: int = BLOCK_ROWS
) -> Float[np.ndarray, " n"]:
    """Return the distance of each query to its nearest reference; exactly 0 for a copy.

    In float64.

    Raises:
        ValueError: an input is no finite [rows, d] array or is empty, or widths differ.
    """
    queries, references = as_features("queries", queries), as_features("references", references)
    check_same_width(("queries", queries.shape[1]), ("references", references.shape[1]))
    distances = []
    with jax.enable_x64(True):
        ours, theirs = (
            _Cut(name, rows, None, block_rows, np.dtype(np.float64))
            for name, rows in (("queries", queries), ("references", references))
        )
        for i, rows in enumerate(read_blocks(queries, ours.height)):
            block = ours[i]
            best = jnp.full(ours.height, np.inf), jnp.zeros(ours.height, int)
            for j in range(len(theirs)):
                best = jax.block_until_ready(
                    _closer(best, block, theirs[j], jnp.array(j * theirs.height))
                )
            nearest = references[np.asarray(best[1])[: len(rows)]].astype(np.float64)
            # Measured again as a difference: the products that found it leave rounding noise.
            distances.append(np.linalg.norm(rows - nearest, axis=1))
    return np.concatenate(distances)


class _Block(NamedTuple):
    """Rows of a set on the device, filled up to a fixed number with rows infinitely far away."""

    rows: Float[Array, "n d"]
    squares: Float[Array, " n"]


class _Cut:
    """A set of features on the host, cut into blocks of equal height."""

    def __init__(
        self,
        name: str,
        features: np.ndarray,
        centre: Float[np.ndarray, " d"] | None,
        block_rows: int,
        dtype: np.dtype,
    ) -> None:
        if block_rows < 1:
            raise ValueError(f"block_rows = {block_rows}: at least one row per block is needed")
        self.name, self.features, self.centre, self.dtype = name, features, centre, dtype
        # Small sets are filled up to powers of two, so that few shapes are compiled.
        self.height = min(block_rows, max(256, 1 << (len(features) - 1).bit_length()))

    def __len__(self) -> int:
        return -(-len(self.features) // self.height)

    def __getitem__(self, index: int) -> _Block:
        start = index * self.height
        part = self.features[start : start + self.height].astype(np.float64)
        if self.centre is not None:
            part -= self.centre
        rows = np.zeros((self.height, part.shape[1]), self.dtype)
        squares = np.full(self.height, np.inf, self.dtype)
        with np.errstate(over="ignore"):  # is looked for below
            rows[: len(part)] = part
            squares[: len(part)] = np.square(rows[: len(part)].astype(np.float64)).sum(axis=1)
        if squares[: len(part)].max() > np.finfo(self.dtype).max / 4:
            raise ValueError(
                f"{self.name}: features as large as {np.abs(part).max():.3g} overflow distances in "
                f"{self.dtype}; scale both sets down"
            )
        return _Block(jnp.asarray(rows), jnp.asarray(squares))

    def spread(self, values: np.ndarray, index: int) -> Array:
        """Return a block's part of one value per row; -1 for the rows that fill up."""
        part = values[index * self.height : (index + 1) * self.height]
        room = self.height - len(part)
        return jnp.asarray(np.pad(part, (0, room), constant_values=-1))


class _Comparison(NamedTuple):
    ours_inside: Bool[np.ndarray, " m"]
    theirs_inside: Bool[np.ndarray, " n"]
    balls: Int[np.ndarray, " m"]
    balls_filled: Bool[np.ndarray, " n"]


def _squared_distances(one: _Block, other: _Block) -> Float[Array, "m n"]:
    """Return all squared distances of two blocks, by their products.

    Those that rounding cannot tell from 0 are 0: copies lie in balls of radius 0, too.
    """
    products = jnp.matmul(one.rows, other.rows.T, precision=lax.Precision.HIGHEST)
    squares = one.squares[:, None] + other.squares[None, :]
    squared = squares - 2 * products
    noise = 8 * jnp.finfo(squares.dtype).eps
    return jnp.where(squared < noise * squares, 0, squared)


def _keep_smallest(best: Float[Array, "n k"], squared: Float[Array, "n m"]) -> Float[Array, "n k"]:
    k = best.shape[1]
    found = -lax.top_k(-squared, min(k, squared.shape[1]))[0]
    return -lax.top_k(-jnp.concatenate([best, found], axis=1), k)[0]


@jax.jit
def _nearest_within(best: Float[Array, "n k"], block: _Block) -> Float[Array, "n k"]:
    squared = _squared_distances(block, block)
    # Not a neighbour of itself, yet its duplicates are.
    itself = jnp.eye(len(squared), dtype=bool)
    return _keep_smallest(best, jnp.where(itself, jnp.inf, squared))


@jax.jit
def _nearest_between(
    best: Float[Array, "m k"], other_best: Float[Array, "n k"], block: _Block, other: _Block
) -> tuple[Float[Array, "m k"], Float[Array, "n k"]]:
    squared = _squared_distances(block, other)
    return _keep_smallest(best, squared), _keep_smallest(other_best, squared.T)


def _nearest_squared(cut: _Cut, k: int) -> Float[np.ndarray, "n k"]:
    """Return each feature's squared distances to its k nearest others, ascending."""
    best = [jnp.full((cut.height, k), np.inf, cut.dtype) for _ in range(len(cut))]
    for i in range(len(cut)):
        block = cut[i]
        best[i] = _nearest_within(best[i], block)
        for j in range(i + 1, len(cut)):
            best[i], best[j] = _nearest_between(best[i], best[j], block, cut[j])
            best[j].block_until_ready()  # or the blocks of many steps would wait in memory
    return np.concatenate([np.asarray(rows) for rows in best])[: len(cut.features)]


def _are_resolved(cut: _Cut, squared_radii: Float[np.ndarray, " n"]) -> bool:
    """Return whether all balls of a set are larger than what rounding does to distances."""
    for i in range(len(cut)):
        part = squared_radii[i * cut.height : (i + 1) * cut.height]
        if (part < _RESOLVED * np.asarray(cut[i].squares)[: len(part)]).any():
            return False
    return True


@jax.jit
def _meet(
    ours: _Block,
    theirs: _Block,
    our_radii: Float[Array, " m"],
    their_radii: Float[Array, " n"],
    density_radii: Float[Array, " n"],
) -> tuple[Array, Array, Array, Array]:
    squared = _squared_distances(ours, theirs)
    in_balls = squared < density_radii[None, :]
    return (
        jnp.any(squared <= their_radii[None, :], axis=1),
        jnp.any(squared <= our_radii[:, None], axis=0),
        jnp.sum(in_balls, axis=1),
        jnp.any(in_balls, axis=0),
    )


def _compare(
    ours: _Cut,
    theirs: _Cut,
    *,
    our_radii: Float[np.ndarray, " m"],
    their_radii: Float[np.ndarray, " n"],
    density_radii: Float[np.ndarray, " n"],
) -> _Comparison:
    m, n = len(ours) * ours.height, len(theirs) * theirs.height
    found = _Comparison(np.zeros(m, bool), np.zeros(n, bool), np.zeros(m, int), np.zeros(n, bool))
    for i in range(len(ours)):
        block, radii = ours[i], ours.spread(our_radii, i)
        rows = slice(i * ours.height, (i + 1) * ours.height)
        for j in range(len(theirs)):
            columns = slice(j * theirs.height, (j + 1) * theirs.height)
            inside, covered, balls, filled = _meet(
                block,
                theirs[j],
                radii,
                theirs.spread(their_radii, j),
                theirs.spread(density_radii, j),
            )
            found.ours_inside[rows] |= np.asarray(inside)
            found.theirs_inside[columns] |= np.asarray(covered)
            found.balls[rows] += np.asarray(balls)
            found.balls_filled[columns] |= np.asarray(filled)
    m, n = len(ours.features), len(theirs.features)
    return _Comparison(
        found.ours_inside[:m], found.theirs_inside[:n], found.balls[:m], found.balls_filled[:n]
    )


@jax.jit
def _closer(
    best: tuple[Float[Array, " m"], Int[Array, " m"]],
    block: _Block,
    other: _Block,
    first: Int[Array, ""],
) -> tuple[Float[Array, " m"], Int[Array, " m"]]:
    squared = _squared_distances(block, other)
    found = squared.min(axis=1)
    nearer = found < best[0]
    return jnp.where(nearer, found, best[0]), jnp.where(
        nearer, squared.argmin(axis=1) + first, best[1]
    )


def _mean(features: np.ndarray) -> Float[np.ndarray, " d"]:
    return sum(block.sum(axis=0) for block in read_blocks(features)) / len(features)


def _check_neighbours(name: str, features: np.ndarray, most: int, least: int) -> None:
    if least < 1:
        raise ValueError(f"k = {least}: at least one neighbour is needed")
    if len(features) < most + 1:
        raise ValueError(
            f"{name}: {len(features)} features are too few for k = {most}: a neighbourhood needs "
            f"at least k + 1 = {most + 1}; give more or lower k"
        )


def _check_dtype(dtype: DTypeLike) -> np.dtype:
    if dtype not in (np.float32, np.float64):
        raise ValueError(f"dtype {dtype!r}; distances are computed in float32 or float64")
    return np.dtype(dtype)
