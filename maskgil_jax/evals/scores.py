"""Inception score and kernel inception distance.

Reference: Salimans et al. 2016, "Improved Techniques for Training GANs", section 4; Bińkowski et
al. 2018, "Demystifying MMD GANs", section 4.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.special
from jax import Array
from jaxtyping import Float64

from maskgil_jax.evals.features import as_features, check_same_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Mean and standard deviation (n in the denominator) over parts of the images.

    Of a single part the deviation is NaN: it is not known, and 0 would look like certainty.
    """

    mean: float
    std: float

    @classmethod
    def of_values(cls, values: Sequence[float]) -> "Score":
        """Return the score of one value for each part."""
        std = float(np.std(values)) if len(values) > 1 else math.nan
        return cls(mean=float(np.mean(values)), std=std)


def inception_score(logits: Array | np.ndarray, *, split_size: int = 5000) -> Score:
    """Return exp(mean KL(p(y|x) ‖ p(y))) over splits of the images, from logits [n, classes].

    Splits are runs of `split_size` images in the order given, the last one shorter if the images
    do not divide: 10 splits for 50,000 images, as the ADM evaluator makes them. It leaves out the
    bias of Inception's last layer, so give logits without it. Scores over splits of other sizes
    are not comparable: a split of n images cannot score above n.

    Raises:
        ValueError: logits are no [n, classes] array of finite numbers, n < 2, or a split size
            below 2.
    """
    logits = as_features("logits", logits)
    if split_size < 2:
        raise ValueError(f"split_size {split_size}: a split needs at least 2 images")
    if len(logits) < 2:
        raise ValueError("logits of 1 image: an inception score needs at least 2")
    scores = []
    for start in range(0, len(logits), split_size):
        part = logits[start : start + split_size].astype(np.float64)
        log_p = scipy.special.log_softmax(part, axis=1)
        p = np.exp(log_p)
        # In logarithms throughout: a class that no image has would be 0·log 0 otherwise.
        log_marginal = scipy.special.logsumexp(log_p, axis=0) - np.log(len(part))
        scores.append(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))
    return Score.of_values(scores)


def kernel_distance(
    generated: Array | np.ndarray,
    real: Array | np.ndarray,
    *,
    subset_size: int = 1000,
    subsets: int = 100,
    seed: int = 2020,
) -> Score:
    """Return the unbiased squared MMD of features [m, d] and [n, d] over random subsets: KID.

    Kernel (x·y/d + 1)³, in float64. Each subset draws `subset_size` rows of each set without
    replacement, as torch-fidelity draws them at the same seed. Unlike FID it has no bias by the
    number of images, and may be a little below 0 for equal distributions.

    Raises:
        ValueError: sets that are no [rows, d] arrays of finite numbers, widths differ, fewer rows
            than `subset_size`, a subset size below 2, or no subsets.
    """
    generated, real = as_features("generated", generated), as_features("real", real)
    check_same_width(("generated", generated.shape[1]), ("real", real.shape[1]))
    if subset_size < 2 or subsets < 1:
        raise ValueError(
            f"subset_size {subset_size} and subsets {subsets}; at least 2 and 1 are needed"
        )
    if min(len(generated), len(real)) < subset_size:
        raise ValueError(
            f"{len(generated)} generated and {len(real)} real features are too few for subsets of "
            f"{subset_size}; give more, or a smaller subset_size, and state it with the figure"
        )
    rng = np.random.RandomState(seed)  # the legacy generator is part of the convention
    values = []
    for _ in range(subsets):
        x, y = (
            rows[rng.choice(len(rows), subset_size, replace=False)].astype(np.float64)
            for rows in (generated, real)
        )
        within = [_kernel(z, z) for z in (x, y)]
        pairs = sum(kernel.sum() - np.trace(kernel) for kernel in within)
        values.append(pairs / (subset_size * (subset_size - 1)) - 2 * _kernel(x, y).mean())
    return Score.of_values(values)


def _kernel(
    x: Float64[np.ndarray, "m d"], y: Float64[np.ndarray, "n d"]
) -> Float64[np.ndarray, "m n"]:
    return (x @ y.T / x.shape[1] + 1) ** 3
