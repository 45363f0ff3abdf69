"""MaskGIL with a caption as its condition: text-to-image at any aspect ratio.

The caption's features are prefilling tokens, as the class token is in `maskgil.py`. They stand
behind the image tokens in memory, because captions differ in length and attention can be told where
a sequence ends. Attention sees positions by their rotary rows alone, so the order is no part of the
model: weights that were trained with the caption in front give the same logits.

Reference: MaskGIL section 4.4; LlamaGen `gpt.py`, `model_type="t2i"`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from maskgil_jax.models import rope as rope_lib
from maskgil_jax.models.base import TokenModelConfig
from maskgil_jax.models.captions import NUM_BYTES, ByteEncoder, Caption, CaptionEmbedding
from maskgil_jax.models.conditioning import Embedding, check_range
from maskgil_jax.models.maskgil import Head, stack_config
from maskgil_jax.models.transformer import Transformer, TransformerConfig, check_choices

_BYTE_FIELDS = ("byte_layers", "byte_heads", "byte_patch", "ngram_rows")
_CHOICES = {
    "text": ("features", "bytes"),
    "cond_rope": ("identity", "zero"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGILTextConfig(TokenModelConfig, TransformerConfig):
    """Shape and options of a text-conditional MaskGIL.

    Attributes:
        text: what captions are: `features` of an encoder outside, or `bytes`, which the model's own
            encoder reads.
        text_width: channels t of a feature; of a byte, for `bytes`.
        text_length: features, or bytes, that a caption may have.
        byte_layers: blocks of the encoder of bytes, of width `text_width`.
        byte_heads: their attention heads.
        byte_patch: bytes that make one prefilling token.
        ngram_rows: rows of the tables in which two to five bytes in a row are looked up by their
            hash; 0 looks up single bytes alone.
        null_length: tokens of the learned null caption.
        cond_rope: rotary rows of the caption's tokens: `identity` (cos 1, sin 0), or `zero` (both).
        rope_base: base of the rotary frequencies.
        rope_interpolation: whether another grid than the configured one is spread over its
            positions, instead of reaching beyond them.
        embedding_dropout: dropout rate on the embedded sequence, in [0, 1).
    """

    family: ClassVar[str] = "maskgil-text"

    text: str = "features"
    text_width: int = 2048
    text_length: int = 120
    byte_layers: int = 2
    byte_heads: int = 4
    byte_patch: int = 1
    ngram_rows: int = 2048
    null_length: int = 1
    cond_rope: str = "identity"
    rope_base: float = 10000.0
    rope_interpolation: bool = False
    embedding_dropout: float = 0.0

    def __post_init__(self):
        TransformerConfig.__post_init__(self)
        TokenModelConfig.__post_init__(self)
        check_choices(self, _CHOICES)
        counts = ("text_width", "text_length", "byte_layers", "byte_heads", "byte_patch")
        for name in (*counts, "null_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.ngram_rows < 0:
            raise ValueError(f"ngram_rows {self.ngram_rows} must be at least 0")
        if not self.rope_base > 0:
            raise ValueError(f"rope_base {self.rope_base} must be more than 0")
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(
                f"embedding_dropout {self.embedding_dropout} is out of range; allowed: [0, 1)"
            )
        if self.head_dim % 4:
            raise ValueError(f"2D RoPE needs a head dimension divisible by 4, not {self.head_dim}")
        if self.null_length > self.num_prefill:
            raise ValueError(
                f"null_length {self.null_length} is more than the {self.num_prefill} tokens that a "
                "caption has at most"
            )
        if self.text == "bytes":
            self.byte_config()
            return
        for field in dataclasses.fields(self):
            if field.name in _BYTE_FIELDS and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name} {getattr(self, field.name)} has no meaning with text "
                    f"'features'; leave it at {field.default}"
                )

    @property
    def num_prefill(self) -> int:
        """Largest number of prefilling tokens."""
        return -(-self.text_length // self.byte_patch) if self.text == "bytes" else self.text_length

    @property
    def feature_width(self) -> int:
        """Channels of what the caption MLP reads."""
        return self.text_width * (self.byte_patch if self.text == "bytes" else 1)

    def byte_config(self) -> TransformerConfig:
        """Return the shape of the encoder of bytes.

        Raises:
            ValueError: if it makes no transformer.
        """
        try:
            return dataclasses.replace(
                stack_config(self),
                num_layers=self.byte_layers,
                width=self.text_width,
                num_heads=self.byte_heads,
                mlp_width=4 * self.text_width,
            )
        except ValueError as error:
            raise ValueError(f"the encoder of bytes (text_width, byte_heads): {error}") from error

    def make_module(self) -> "MaskGILText":
        """Return the Flax module."""
        return MaskGILText(self)

    def check_condition(self, condition: Any) -> Caption:
        """Return captions as NumPy arrays; see the base.

        Raises:
            ValueError: if shapes do not fit the model, a length or a byte is out of range, or a
                feature is no finite number.
        """
        if not isinstance(condition, Caption):
            raise ValueError(
                f"the condition is {type(condition).__name__}; a model of family {self.family!r} "
                "takes captions: give prompts, or a Caption of their features"
            )
        values, lengths = np.asarray(condition.values), np.asarray(condition.lengths)
        expected = "[b s]" if self.text == "bytes" else f"[b s {self.text_width}]"
        ndim = expected.count(" ") + 1
        width_fits = self.text == "bytes" or values.shape[-1:] == (self.text_width,)
        if values.ndim != ndim or not width_fits or lengths.shape != values.shape[:1]:
            raise ValueError(
                f"captions of shape {values.shape} with lengths of shape {lengths.shape} do not "
                f"fit; expected {expected} with [b]"
            )
        limit = min(values.shape[1], self.text_length)
        check_range("caption length", lengths, limit + 1)
        if self.text == "bytes":
            check_range("byte", values, NUM_BYTES)
            return Caption(values[:, :limit].astype(np.int32), lengths.astype(np.int32))
        there = np.arange(values.shape[1]) < lengths[:, None]
        if not np.isfinite(values[there]).all():
            raise ValueError("features of a caption are no finite numbers")
        kept = np.where(there[..., None], values, 0)[:, :limit]
        return Caption(kept, lengths.astype(np.int32))

    def read_condition(self, batch: Mapping[str, Any]) -> Caption:
        """Return the captions; see the base."""
        return Caption(batch["caption"], batch["caption_length"])

    def null_condition(self, condition: Caption) -> Caption:
        """Return as many captions of length 0; see the base."""
        return Caption(jnp.zeros_like(condition.values), jnp.zeros_like(condition.lengths))

    def drop_condition(self, condition: Caption, dropped: Bool[Array, " b"]) -> Caption:
        """Return the captions with length 0 where marked; see the base."""
        return Caption(condition.values, jnp.where(dropped, 0, condition.lengths))

    def example_condition(self) -> Caption:
        """Return one empty caption."""
        values = jnp.zeros((1, self.text_length), jnp.int32)
        if self.text == "features":
            values = jnp.zeros((1, self.text_length, self.text_width))
        return Caption(values, jnp.zeros((1,), jnp.int32))

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
            self.byte_encoder = ByteEncoder(cfg.byte_config(), cfg.byte_patch, cfg.ngram_rows)
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
