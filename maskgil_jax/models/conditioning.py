"""Embedding tables: tokens, and class labels as prefilling tokens.

Reference: MaskGIL section 3.1; LlamaGen `LabelEmbedder`.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskgil_jax.models.transformer import weight_init


class Embedding(nn.Module):
    """A table of `count` vectors, looked up by id."""

    count: int
    width: int

    @nn.compact
    def __call__(self, ids: Int[Array | np.ndarray, "*n"]) -> Float[Array, "*n e"]:
        """Look up rows; ids must lie in 0…count-1."""
        table = self.param("embedding", weight_init("vocab", "embed"), (self.count, self.width))
        return jnp.asarray(table)[ids]
