"""MaskGIL with a caption as its condition: text-to-image at any aspect ratio.

The caption's features are prefilling tokens, as the class token is in `maskgil.py`. They stand
behind the image tokens in memory, because captions differ in length and attention can be told where
a sequence ends. Attention sees positions by their rotary rows alone, so the order is no part of the
model: weights that were trained with the caption in front give the same logits.

Reference: MaskGIL section 4.4; LlamaGen `gpt.py`, `model_type="t2i"`.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskgil_jax.models import rope as rope_lib
from maskgil_jax.models.base import RotaryModelConfig
from maskgil_jax.models.captions import (
    ByteEncoder,
    Caption,
    CaptionEmbedding,
    CaptionModelConfig,
)
from maskgil_jax.models.conditioning import Embedding
from maskgil_jax.models.maskgil import Head
from maskgil_jax.models.transformer import (
    Transformer,
    stack_config,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGILTextConfig(CaptionModelConfig, RotaryModelConfig):
    """Shape and options of a text-conditional MaskGIL.

    Attributes:
        null_length: tokens of the learned null caption.
        cond_rope: as in the base, or `diagonal`: the tokens of a caption of `text_length` would
            fill the diagonal of the grid, so that the image sees their order.
    """

    family: ClassVar[str] = "maskgil-text"
    cond_ropes: ClassVar[tuple[str, ...]] = ("identity", "zero", "diagonal")

    null_length: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.null_length < 1:
            raise ValueError(f"null_length {self.null_length} must be at least 1")
        if self.null_length > self.num_prefill:
            raise ValueError(
                f"null_length {self.null_length} is more than the {self.num_prefill} tokens that a "
                "caption has at most"
            )

    def make_module(self) -> "MaskGILText":
        """Return the Flax module."""
        return MaskGILText(self)

    def rope_table(self, num_prefill: int, grid_size: tuple[int, int] | None = None) -> np.ndarray:
        """Return the rotary table of the image tokens and, behind them, the caption's.

        Args:
            num_prefill: number of the caption's tokens, padding included.
            grid_size: grid to make the table for; the configured one if `None`.

        Returns:
            float32 [gh·gw + num_prefill, head_dim/2, 2].
        """
        span = self.grid_size if self.rope_interpolation else None
        grid = grid_size or self.grid_size
        image = rope_lib.rope_2d(grid, self.head_dim, self.rope_base, span)
        if self.cond_rope == "diagonal":
            sizes = (num_prefill, self.num_prefill, self.grid_size)
            caption = rope_lib.diagonal_rows(*sizes, self.head_dim, self.rope_base)
        else:
            caption = rope_lib.condition_rows(num_prefill, self.head_dim, self.cond_rope)
        return np.concatenate([image, caption])


class MaskGILText(nn.Module):
    """Bidirectional LLaMA with the tokens of a caption as its condition."""

    config: MaskGILTextConfig

    def setup(self):
        """Create the submodules."""
        cfg = self.config
        self.token_embed = Embedding(cfg.codebook_size + 1, cfg.width)
        if cfg.text == "bytes":
            self.byte_encoder = ByteEncoder(
                cfg.byte_config(), cfg.byte_patch, cfg.ngram_rows, cfg.text_length
            )
        self.caption_embed = CaptionEmbedding(
            cfg.feature_width, cfg.width, cfg.null_length, jnp.dtype(cfg.dtype)
        )
        self.dropout = nn.Dropout(cfg.embedding_dropout)
        self.transformer = Transformer(stack_config(cfg))
        self.head = Head(cfg)

    def __call__(
        self, tokens: Int[Array | np.ndarray, "b gh gw"], caption: Caption, train: bool = False
    ) -> Float[Array, "b l v"]:
        """Return float32 logits [b, gh·gw, K+1] for every image token.

        Args:
            tokens: codes 0…K-1, or K where masked; the grid may differ from the configured one.
            caption: what the images show; where its length is 0, "no condition".
            train: whether dropout is on (needs an rng named `dropout`).
        """
        return self.head(self.features(tokens, caption, train))

    def features(
        self, tokens: Int[Array | np.ndarray, "b gh gw"], caption: Caption, train: bool = False
    ) -> Float[Array, "b l e"]:
        """Return what the head reads, of every image token; the arguments are those of a call."""
        cfg = self.config
        b, gh, gw = tokens.shape
        image = self.token_embed(tokens.reshape(b, gh * gw))
        values, lengths = jnp.asarray(caption.values), jnp.asarray(caption.lengths)
        if cfg.text == "bytes":
            values, lengths = self.byte_encoder(values, lengths)
        prefill, lengths = self.caption_embed(values, lengths)
        x = jnp.concatenate([image, prefill.astype(image.dtype)], axis=1)
        x = self.dropout(x, deterministic=not train)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        table = cfg.rope_table(prefill.shape[1], (gh, gw))
        x = self.transformer(x, table, train=train, lengths=gh * gw + lengths)
        return x[:, : gh * gw]

    def logits(
        self, features: Float[Array, "b n e"], positions: Int[Array, "b n"]
    ) -> Float[Array, "b n v"]:
        """Return the logits of some features, whatever their positions in the image."""
        return self.head(features)
