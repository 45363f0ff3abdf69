"""Conditions: class labels and captions, what is allowed of them, and their prefilling tokens.

Reference: MaskGIL sections 3.1 and 4.4; LlamaGen `LabelEmbedder` and `CaptionEmbedder`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskgil_jax.models.transformer import weight_init

# Classes 0…C-1, C for "no condition"; or the weights of a mixture of these C+1.
Labels = Int[Array | np.ndarray, " b"] | Float[Array | np.ndarray, "b n"]

_SUM_SLACK = 1e-3


def check_range(name: str, ids: np.ndarray, count: int) -> None:
    """Raise a `ValueError` that names the first id outside 0…count-1."""
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name}s have type {ids.dtype}; give integers 0 to {count - 1}")
    wrong = ids[(ids < 0) | (ids >= count)]
    if wrong.size:
        raise ValueError(f"{name} {int(wrong.flat[0])} is out of range; allowed: 0 to {count - 1}")


def mix_labels(
    first: int, second: int, shares: Sequence[float] | np.ndarray, num_classes: int
) -> Float[np.ndarray, "b n"]:
    """Return mixtures of two classes, to be given as labels: an interpolation of conditions.

    Args:
        first: class 0…C-1, or C for "no condition".
        second: the other one.
        shares: of the second, one per image, 0 to 1; 0 is the first class alone.
        num_classes: C, the model's.

    Returns:
        float32 [b, C+1], rows that sum to 1.

    Raises:
        ValueError: if a class or a share is out of range.
    """
    check_range("label", np.array([first, second]), num_classes + 1)
    eye = np.eye(num_classes + 1, dtype=np.float32)
    weights = np.asarray(shares, np.float32)[:, None]
    if (wrong := weights[~((weights >= 0) & (weights <= 1))]).size:
        raise ValueError(f"share {wrong[0]:g} of the second class is out of range; allowed: 0 to 1")
    return (1 - weights) * eye[first] + weights * eye[second]


def check_labels(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """Return labels as int32 [b] or, if they are mixtures, float32 [b, C+1].

    Raises:
        ValueError: if one is out of range, or a mixture has another width, another sum than 1 or a
            weight below 0.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2:
        sums = labels.astype(np.float64).sum(-1)
        if labels.shape[1] != num_classes + 1 or not np.all(np.abs(sums - 1) < _SUM_SLACK):
            raise ValueError(
                f"mixtures of classes have shape {labels.shape} and sums from "
                f"{sums.min(initial=1):g} to {sums.max(initial=1):g}; give [b, {num_classes + 1}], "
                "the last column for no condition, and rows that sum to 1"
            )
        if (lowest := labels.min(initial=0)) < 0:
            raise ValueError(
                f"a mixture of classes has the weight {lowest:g}; weights are 0 or more"
            )
        return labels.astype(np.float32)
    if labels.ndim != 1:
        raise ValueError(f"labels have shape {labels.shape}; give one class per image, [b]")
    if labels.size:
        check_range("label", labels, num_classes + 1)
    return labels.astype(np.int32)


class Embedding(nn.Module):
    """A table of `count` vectors, looked up by id."""

    count: int
    width: int
    param_dtype: str = "float32"

    def setup(self):
        """Create the table."""
        shape, stored = (self.count, self.width), jnp.dtype(self.param_dtype)
        self.embedding = self.param("embedding", weight_init("vocab", "embed"), shape, stored)

    def __call__(self, ids: Int[Array | np.ndarray, "*n"]) -> Float[Array, "*n e"]:
        """Look up rows; ids must lie in 0…count-1."""
        return jnp.asarray(self.embedding)[ids]

    def embed_labels(self, labels: Labels, first: int = 0) -> Float[Array, "b 1 e"]:
        """Return one vector per image: the label's row, or a weighted sum of all labels' rows.

        Args:
            labels: classes or mixtures.
            first: row of class 0; the classes are the last rows of the table.
        """
        return embed_labels(jnp.asarray(self.embedding), labels, first)


def embed_labels(
    table: Float[Array, "rows e"], labels: Labels, first: int = 0
) -> Float[Array, "b 1 e"]:
    """Return one vector per image: the label's row, or a weighted sum of all labels' rows."""
    if jnp.issubdtype(labels.dtype, jnp.floating):
        rows = table[first : first + labels.shape[1]]
        return jnp.einsum("bn,ne->be", jnp.asarray(labels), rows, precision="highest")[:, None]
    # In a narrower type of labels the sum would wrap around.
    return table[first + jnp.asarray(labels, jnp.int32)[:, None]]
