"""Our models drawing codes, causal and masked ones alike, and the bytes that a causal one reads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks import ours

from maskgil_jax import generation, sharding
from maskgil_jax.build import models as build_models
from maskgil_jax.decoding.autoregressive import AutoregressiveConfig
from maskgil_jax.decoding.sampler import SamplerConfig
from maskgil_jax.models.base import count_classes
from maskgil_jax.models.llamagen import LlamaGenConfig


class Codes:
    """One model drawing codes only, with random weights (and the zero head of a new model).

    On one device, as a user's: devices that are the cores of one CPU share its memory, and each
    would read all parameters for every token.

    Args:
        family: of the model.
        size: of it.
        settings: of the sampler.
        dtype: type of the computation.

    Attributes:
        model: architecture.
        params: random parameters.
    """

    def __init__(self, family: str, size: str, settings: dict[str, Any], dtype: str):
        config = ours.make_config(size, 1, dtype, family)
        self.model: Any = build_models.model_config(config)
        kind: Any = AutoregressiveConfig if self.model.causal else SamplerConfig
        self._sampler = kind(**settings)
        self._mesh = sharding.make_mesh({}, jax.devices()[:1])
        self.replace_params(ours.init_params(self.model))

    def replace_params(self, params: Any) -> None:
        """Draw with other parameters from now on."""
        self.params = generation.place(params, self._mesh)

    def labels(self, batch_size: int) -> np.ndarray:
        """Return the classes of a batch, int32 [b]."""
        return np.arange(batch_size, dtype=np.int32) % count_classes(self.model)

    def draw(self, batch_size: int) -> np.ndarray:
        """Return the codes [b, gh, gw] of a batch."""
        return generation.generate_tokens(
            self.model,
            self.params,
            self.labels(batch_size),
            self._sampler,
            batch_size=batch_size,
            mesh=self._mesh,
        )


def read_bytes(model: LlamaGenConfig, rows: int) -> int:
    """Return the bytes that must be read to draw all tokens of a batch, one after the other.

    For every token all kernels once, and the keys and values of every row up to that token. Norms
    and the looked-up rows of embeddings are left out: they are a thousandth.

    Args:
        model: architecture.
        rows: sequences, twice the images where all tokens are guided.
    """
    e, length = model.width, model.seq_len
    layer = 4 * e**2 + 3 * e * model.mlp_width
    kernels = model.num_layers * layer + e * model.codebook_size
    filled = length * (length + 1) // 2
    cache = model.num_layers * rows * filled * 2 * e
    return (length * kernels + cache) * jnp.dtype(model.dtype).itemsize
