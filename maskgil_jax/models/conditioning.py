"""Embedding tables: tokens, and class labels as prefilling tokens.

Reference: MaskGIL section 3.1; LlamaGen `LabelEmbedder`.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskgil_jax.models.transformer import weight_init

# Classes 0…C-1, C for "no condition"; or the weights of a mixture of these C+1.
Labels = Int[Array | np.ndarray, " b"] | Float[Array | np.ndarray, "b n"]


class Embedding(nn.Module):
    """A table of `count` vectors, looked up by id."""

    count: int
    width: int

    def setup(self):
        """Create the table."""
        shape = (self.count, self.width)
        self.embedding = self.param("embedding", weight_init("vocab", "embed"), shape)

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
