"""Captions as conditions: features of a text, or its bytes, to prefilling tokens.

On both paths this stands in front of the transformer. Features come from a language model outside,
or from the encoder here, which is trained with the model and reads bytes. Texts differ in length;
a caption is padded on the right, and what lies behind its length is never looked at.

Reference: MaskGIL section 4.4; LlamaGen `CaptionEmbedder`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskgil_jax.models import rope as rope_lib
from maskgil_jax.models.conditioning import Embedding
from maskgil_jax.models.transformer import Projection, Transformer, TransformerConfig, weight_init

NUM_BYTES = 256
NGRAMS = (2, 3, 4, 5)
_HASH_FACTOR = 1_000_003


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Caption:
    """Captions of a batch, padded on the right.

    Attributes:
        values: int32 [b s], bytes of the text; or float [b s t], features of its tokens.
        lengths: int32 [b], how many of them count; 0 means "no condition".
    """

    values: Any
    lengths: Any


def hash_ngrams(ids: Int[Array, "b s"], length: int, rows: int) -> Int[Array, "b s"]:
    """Return for every byte the row, 0…rows-1, of it and the `length - 1` bytes in front of it.

    Different ones may share a row. In front of the first byte stand zeros.
    """
    ids = ids.astype(jnp.uint32)
    code = jnp.zeros_like(ids)
    for back in range(length):
        before = jnp.pad(ids, ((0, 0), (back, 0)))[:, : ids.shape[1]]
        code = code * jnp.uint32(_HASH_FACTOR) + before + jnp.uint32(1)
    return ((code ^ (code >> 15)) % jnp.uint32(rows)).astype(jnp.int32)


class ByteEncoder(nn.Module):
    """A small bidirectional transformer over the bytes of a caption, `patch` of them a feature.

    A byte is embedded with the two to five that end with it, so that words are told apart from the
    first layer on.

    Reference: Pagnoni et al., 2024, "Byte Latent Transformer", section 3.2.1 (hashed n-grams).
    """

    config: TransformerConfig
    patch: int
    ngram_rows: int

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b s"], lengths: Int[Array, " b"]
    ) -> tuple[Float[Array, "b n t"], Int[Array, " b"]]:
        """Return features [b, ceil(s/patch), patch·width] and how many of them count."""
        cfg = self.config
        b, s = ids.shape
        there = jnp.arange(s)[None] < lengths[:, None]
        ids = jnp.where(there, ids, 0)
        x = Embedding(NUM_BYTES, cfg.width, name="embed")(ids)
        for length in NGRAMS if self.ngram_rows else ():
            embed = Embedding(self.ngram_rows, cfg.width, name=f"embed_{length}")
            x += embed(hash_ngrams(ids, length, self.ngram_rows))
        table = rope_lib.rope_1d(s, cfg.head_dim)
        x = Transformer(cfg, name="transformer")(x, table, lengths=jnp.maximum(lengths, 1))
        x = jnp.where(there[..., None], x, 0)
        patch = self.patch
        x = jnp.pad(x, ((0, 0), (0, -s % patch), (0, 0)))
        return x.reshape(b, -1, patch * cfg.width), -(-lengths // patch)


class CaptionEmbedding(nn.Module):
    """The MLP that brings features to the width of the model, and the learned null caption."""

    features: int
    width: int
    null_length: int
    dtype: Any

    @nn.compact
    def __call__(
        self, features: Float[Array | np.ndarray, "b s t"], lengths: Int[Array | np.ndarray, " b"]
    ) -> tuple[Float[Array, "b n e"], Int[Array, " b"]]:
        """Return prefilling tokens and how many count; the null caption where the length is 0.

        There are as many tokens as features, or as the null caption has if those are more.
        """
        t, e, n = self.features, self.width, self.null_length
        null = jnp.asarray(self.param("null_caption", weight_init(None, None), (n, t)))
        length = max(features.shape[1], n)
        features = jnp.asarray(features, self.dtype)
        features = jnp.pad(features, ((0, 0), (0, length - features.shape[1]), (0, 0)))
        null = jnp.pad(null.astype(self.dtype), ((0, length - n), (0, 0)))
        lengths = jnp.asarray(lengths, jnp.int32)
        nothing = lengths == 0
        x = jnp.where(nothing[:, None, None], null[None], features)
        x = Projection((t,), (e,), (None, "embed"), self.dtype, name="up")(x)
        x = nn.gelu(x, approximate=True)
        x = Projection((e,), (e,), ("embed", None), self.dtype, name="out")(x)
        return x, jnp.where(nothing, n, lengths)
