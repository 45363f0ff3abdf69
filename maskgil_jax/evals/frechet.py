"""Fréchet distance of two sets of features, by the Gaussians fitted to them: FID, sFID, rFID.

A set is met block by block and kept as mean and covariance. Which features, which images and which
reference make it an FID that can be compared is the business of a protocol.

Reference: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local
Nash Equilibrium", equation 6; Chan et al. 1983, "Algorithms for Computing the Sample Variance",
equation 2.1 (merging).
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Float, Float64

from maskgil_jax.evals.archives import name_damage
from maskgil_jax.evals.features import BLOCK_ROWS, as_features, check_same_width


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Mean and covariance of a set of features, in float64.

    Attributes:
        mean: [d].
        covariance: [d, d], with n - 1 in the denominator (0 for a single row).
        count: rows it was computed from; None where a file does not tell.

    Raises:
        ValueError: shapes that do not go together, numbers that are not finite or of another type,
            a covariance that is not symmetric or has a negative variance, or a count below 1.
    """

    mean: Float64[np.ndarray, " d"]
    covariance: Float64[np.ndarray, "d d"]
    count: int | None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"count {self.count}: statistics need at least 1 row")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("statistics hold NaN or infinity; compute them again")
        spread = np.abs(self.covariance).max(initial=0)
        skew = np.abs(self.covariance - self.covariance.T).max(initial=0)
        if skew > 1e-5 * spread or np.diagonal(self.covariance).min(initial=0) < 0:
            raise ValueError(
                "the covariance is not symmetric or has a negative variance; compute it again"
            )

    @property
    def width(self) -> int:
        """Number of features per row."""
        return len(self.mean)

    @classmethod
    def of_features(cls, features: Array | np.ndarray) -> "Statistics":
        """Return the statistics of features [n, d], read in blocks of bounded size.

        Raises:
            ValueError: not a non-empty [n, d] array of finite real numbers.
        """
        return cls.of_blocks([features])

    @classmethod
    def of_blocks(cls, blocks: Iterable[Array | np.ndarray]) -> "Statistics":
        """Return the statistics of features that come as blocks [any, d], in one pass.

        Rows are gathered to blocks of a fixed number, so the same rows in the same order give the
        same bits however they were batched. Memory: some [4096, d] and [d, d] arrays of float64.

        Raises:
            ValueError: no rows, a block that is no [n, d] array of finite real numbers, blocks of
                different widths, or numbers so large that the covariance overflows.
        """
        total: Statistics | None = None
        for rows in _regroup(blocks):
            with np.errstate(over="ignore", invalid="ignore"):
                mean = rows.mean(axis=0)
                rows = rows - mean
                covariance = rows.T @ rows / max(len(rows) - 1, 1)
            if not np.isfinite(covariance).all():
                raise ValueError(
                    f"features up to {np.abs(rows).max():.3g} from their mean are too large: their "
                    "covariance overflows; scale them down, those of all sets alike"
                )
            part = cls(mean=mean, covariance=covariance, count=len(rows))
            total = part if total is None else total.merge(part)
        if total is None:
            raise ValueError("no features: statistics need at least one row")
        return total

    def merge(self, other: "Statistics") -> "Statistics":
        """Return the statistics of both sets together, such as those of two processes.

        Deviations are taken from the mean of each set, never from 0, so nothing cancels.

        Raises:
            ValueError: widths differ, or a count is not known.
        """
        check_same_width(("one", self.width), ("the other", other.width))
        if self.count is None or other.count is None:
            raise ValueError(
                "statistics without a count cannot be merged: their share is not known; "
                "compute them again from the features"
            )
        count = self.count + other.count
        step = other.mean - self.mean
        scatter = np.outer(step, step) * (self.count * other.count / count)
        scatter += self.covariance * (self.count - 1)
        scatter += other.covariance * (other.count - 1)
        mean = self.mean + step * (other.count / count)
        return Statistics(mean=mean, covariance=scatter / (count - 1), count=count)


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """Return |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2·(Σ₁Σ₂)^½), in float64, at least 0.

    The trace of the root is the sum of the roots of the eigenvalues of A·Σ₂·A with A = Σ₁^½. That
    matrix is symmetric: quicker and steadier than a Schur form of Σ₁Σ₂ (`scipy.linalg.sqrtm`), and
    covariances without full rank need no offset on their diagonals; eigenvalues that rounding left
    below 0 are 0.

    Raises:
        ValueError: widths differ, or statistics of a single row.
    """
    check_same_width(("one", one.width), ("the other", other.width))
    for statistics in (one, other):
        if statistics.count is not None and statistics.count < 2:
            raise ValueError("statistics of 1 row have no covariance; give at least 2 images")
    difference = one.mean - other.mean
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ other.covariance @ root
    overlaps = np.linalg.eigvalsh((product + product.T) / 2)
    spread = np.trace(one.covariance) + np.trace(other.covariance)
    distance = difference @ difference + spread - 2 * np.sqrt(np.maximum(overlaps, 0)).sum()
    # Rounding may leave the distance of equal sets a little below 0.
    return float(max(distance, 0.0))


def describe_bias(sets: dict[str, Statistics]) -> list[str]:
    """Return a note for each named set that has too few rows for a covariance of full rank.

    Such a distance is far above that of many images, and comparable with no other count.
    """
    return [
        f"{name}: {statistics.count} images are too few for a covariance of {statistics.width} "
        "features of full rank; the Fréchet distance is biased upwards and comparable only with "
        f"those of as many images (more than {statistics.width} are needed, 50000 are usual)"
        for name, statistics in sets.items()
        if statistics.count is not None and statistics.count <= statistics.width
    ]


def save_statistics(
    path: str | os.PathLike[str],
    pool: Statistics,
    spatial: Statistics | None = None,
    *,
    record: Mapping[str, Any] | None = None,
    features: Float[np.ndarray, "n d"] | None = None,
) -> None:
    """Write statistics as the `.npz` that the ADM evaluator and pytorch-fid read.

    Arrays `mu`, `sigma` of the pooled features and `mu_s`, `sigma_s` of the spatial ones (which
    the ADM evaluator wants); beside them `count` and what is given besides, which both pass over.
    The file appears whole or not at all.

    Args:
        path: ends in .npz; replaced.
        pool: of pooled features.
        spatial: of spatial ones of the same images.
        record: how they were made, for JSON; stored as the text `record`.
        features: pooled features of some of the images, stored as `pool`.

    Raises:
        ValueError: the path does not end in .npz, or the two are of different counts.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path} does not end in .npz")
    arrays = {"mu": pool.mean, "sigma": pool.covariance}
    if spatial is not None:
        if spatial.count != pool.count:
            raise ValueError(
                f"spatial features of {spatial.count} images, pooled ones of {pool.count}; "
                "both must be of the same images"
            )
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    if pool.count is not None:
        arrays["count"] = np.array(pool.count, np.int64)
    if record is not None:
        arrays["record"] = np.array(json.dumps(dict(record), sort_keys=True))
    if features is not None:
        arrays["pool"] = features
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type] # numpy's stub takes a flag there
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_statistics(path: str | os.PathLike[str]) -> tuple[Statistics, Statistics | None]:
    """Read statistics of pooled and, where the file has them, of spatial features.

    Takes the files of `save_statistics`, of the ADM evaluator (`mu`, `sigma`, `mu_s`, `sigma_s`,
    perhaps images beside them) and of pytorch-fid (`mu`, `sigma`), in any floating type.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no `.npz`, `mu` or `sigma` or half of the spatial pair is missing, or they are
            no statistics.
    """
    names, arrays = _read_arrays(path, ("mu", "sigma", "mu_s", "sigma_s", "count"))
    wanted = ["mu", "sigma"]
    if "mu_s" in arrays or "sigma_s" in arrays:
        wanted += ["mu_s", "sigma_s"]
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise ValueError(
            f"{path} holds {', '.join(names)} and lacks {', '.join(missing)}: no statistics. "
            "Expected mu and sigma, of spatial features mu_s and sigma_s, too; of images they are "
            "computed from features first"
        )
    count = None
    if "count" in arrays:
        stored = arrays["count"]
        if stored.ndim or not np.issubdtype(stored.dtype, np.integer):
            raise ValueError(f"{path}: count is {stored.tolist()!r}, and no whole number")
        count = int(stored)
    pool = _read_pair(path, arrays["mu"], arrays["sigma"], count)
    if "mu_s" not in arrays:
        return pool, None
    return pool, _read_pair(path, arrays["mu_s"], arrays["sigma_s"], count)


def load_record(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read what a file of `save_statistics` says of how it was made; `None` if it says nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no `.npz`, or the record is no JSON object.
    """
    arrays = _read_arrays(path, ("record",))[1]
    if not arrays:
        return None
    try:
        record = json.loads(str(arrays["record"]))
    except ValueError as error:
        raise ValueError(f"the record of {path} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"the record of {path} is {type(record).__name__}, no object")
    return record


def load_array(path: str | os.PathLike[str], name: str) -> np.ndarray | None:
    """Read another array of a file of statistics; `None` if it has none of that name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no `.npz`, or it is damaged.
    """
    return _read_arrays(path, (name,))[1].get(name)


def _read_arrays(
    path: str | os.PathLike[str], keys: Iterable[str]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the names of all arrays of an `.npz`, and those of `keys` that are there."""
    # Opened here: where numpy finds damage, it leaves the closing to chance.
    with name_damage(f"{path} cannot be read as an .npz of arrays"), open(path, "rb") as file:
        stored = np.load(file)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        names = sorted(stored.files)
        return names, {key: stored[key] for key in keys if key in names}


def _read_pair(
    path: str | os.PathLike[str], mean: np.ndarray, covariance: np.ndarray, count: int | None
) -> Statistics:
    if mean.ndim != 1 or covariance.shape != mean.shape * 2 or not mean.size:
        raise ValueError(
            f"{path}: mean of shape {mean.shape} and covariance of shape {covariance.shape}; "
            "expected [d] and [d, d]"
        )
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise ValueError(
            f"{path}: mean is {mean.dtype} and covariance {covariance.dtype}; expected floats"
        )
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    try:
        return Statistics(mean=mean, covariance=covariance, count=count)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _regroup(blocks: Iterable[Array | np.ndarray]) -> Iterator[Float64[np.ndarray, "rows d"]]:
    """Yield the rows of all blocks in float64, always `BLOCK_ROWS` of them but at the end."""
    waiting: np.ndarray | None = None
    filled = seen = 0
    for block in blocks:
        block = as_features("features", block, first_row=seen)
        if waiting is None:
            waiting = np.empty((BLOCK_ROWS, block.shape[1]), np.float64)
        check_same_width(("a block", block.shape[1]), ("the first block", waiting.shape[1]))
        seen += len(block)
        while len(block):
            taken = min(len(block), BLOCK_ROWS - filled)
            waiting[filled : filled + taken] = block[:taken]
            filled, block = filled + taken, block[taken:]
            if filled == BLOCK_ROWS:
                yield waiting
                filled = 0
    if waiting is not None and filled:
        yield waiting[:filled]
