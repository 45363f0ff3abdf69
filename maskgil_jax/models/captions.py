"""Captions as conditions: features of a text, or its bytes, to prefilling tokens.

On both paths this stands in front of the transformer. Features come from a language model outside,
or from the encoder here, which is trained with the model and reads bytes. Texts differ in length;
a caption is padded on the right, and what lies behind its length is never looked at.

Reference: MaskGIL section 4.4; LlamaGen `CaptionEmbedder`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from maskgil_jax.models import rope as rope_lib
from maskgil_jax.models.base import TokenModelConfig
from maskgil_jax.models.conditioning import Embedding, check_range
from maskgil_jax.models.transformer import (
    Projection,
    Transformer,
    TransformerConfig,
    check_choices,
    stack_config,
    weight_init,
)

NUM_BYTES = 256
NGRAMS = (2, 3, 4, 5)
TEXTS = ("features", "bytes")
_BYTE_FIELDS = ("byte_layers", "byte_heads", "byte_patch", "ngram_rows")
_HASH_FACTOR = 1_000_003


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Caption:
    """Captions of a batch, padded on the right.

    Attributes:
        values: int32 [b s], bytes of the text; or float [b s t], features of its tokens.
        lengths: int32 [b], how many of them count; 0 means "no condition". So does -n, in place
            of a caption of n, to a model whose null caption is seen as far as that caption is.
    """

    values: Any
    lengths: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionModelConfig(TokenModelConfig):
    """Vocabulary, grid and captions of a text-conditional model, which is a transformer, too.

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
    """

    # Whether the null caption is seen as far as the caption that it stands for.
    null_keeps_length: ClassVar[bool] = False

    text: str = "features"
    text_width: int = 2048
    text_length: int = 120
    byte_layers: int = 2
    byte_heads: int = 4
    byte_patch: int = 1
    ngram_rows: int = 2048

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, {"text": TEXTS})
        for name in ("text_width", "text_length", "byte_layers", "byte_heads", "byte_patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.ngram_rows < 0:
            raise ValueError(f"ngram_rows {self.ngram_rows} must be at least 0")
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
        whole: Any = self
        try:
            return dataclasses.replace(
                stack_config(whole),
                num_layers=self.byte_layers,
                width=self.text_width,
                num_heads=self.byte_heads,
                mlp_width=4 * self.text_width,
            )
        except ValueError as error:
            raise ValueError(f"the encoder of bytes (text_width, byte_heads): {error}") from error

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
        check_range(
            "caption length", np.abs(lengths) if self.null_keeps_length else lengths, limit + 1
        )
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
        """Return as many captions that mean "no condition"; see the base."""
        return Caption(jnp.zeros_like(condition.values), self._null_lengths(condition.lengths))

    def drop_condition(self, condition: Caption, dropped: Bool[Array, " b"]) -> Caption:
        """Return the captions with "no condition" where marked; see the base."""
        nothing = self._null_lengths(condition.lengths)
        return Caption(condition.values, jnp.where(dropped, nothing, condition.lengths))

    def _null_lengths(self, lengths: Any) -> Any:
        return -jnp.abs(lengths) if self.null_keeps_length else jnp.zeros_like(lengths)

    def example_condition(self) -> Caption:
        """Return one empty caption."""
        values = jnp.zeros((1, self.text_length), jnp.int32)
        if self.text == "features":
            values = jnp.zeros((1, self.text_length, self.text_width))
        return Caption(values, jnp.zeros((1,), jnp.int32))


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
    first layer on; and with its position, for the model that reads the features sees no order of
    them, and "a seven left of a three" is to be told from its converse.

    Reference: Pagnoni et al., 2024, "Byte Latent Transformer", section 3.2.1 (hashed n-grams).
    """

    config: TransformerConfig
    patch: int
    ngram_rows: int
    max_length: int

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b s"], lengths: Int[Array, " b"]
    ) -> tuple[Float[Array, "b n t"], Int[Array, " b"]]:
        """Return features [b, ceil(s/patch), patch·width] and their lengths, of a `Caption`."""
        cfg = self.config
        b, s = ids.shape
        there = jnp.arange(s)[None] < lengths[:, None]
        ids = jnp.where(there, ids, 0)
        x = Embedding(NUM_BYTES, cfg.width, name="embed")(ids)
        places = jnp.broadcast_to(jnp.arange(s), ids.shape)
        x += Embedding(self.max_length, cfg.width, name="embed_position")(places)
        for length in NGRAMS if self.ngram_rows else ():
            embed = Embedding(self.ngram_rows, cfg.width, name=f"embed_{length}")
            x += embed(hash_ngrams(ids, length, self.ngram_rows))
        table = rope_lib.rope_1d(s, cfg.head_dim)
        x = Transformer(cfg, name="transformer")(x, table, lengths=jnp.maximum(lengths, 1))
        x = jnp.where(there[..., None], x, 0)
        patch = self.patch
        x = jnp.pad(x, ((0, 0), (0, -s % patch), (0, 0)))
        counts = jnp.sign(lengths) * -(-jnp.abs(lengths) // patch)
        return x.reshape(b, -1, patch * cfg.width), counts


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
        """Return prefilling tokens and how many count; the null caption where none does.

        There are as many tokens as features, or as the null caption has if those are more. Of a
        null caption all count, or as many as a negative length says.
        """
        t, e, n = self.features, self.width, self.null_length
        null = jnp.asarray(self.param("null_caption", weight_init(None, None), (n, t)))
        length = max(features.shape[1], n)
        features = jnp.asarray(features, self.dtype)
        features = jnp.pad(features, ((0, 0), (0, length - features.shape[1]), (0, 0)))
        null = jnp.pad(null.astype(self.dtype), ((0, length - n), (0, 0)))
        lengths = jnp.asarray(lengths, jnp.int32)
        nothing = lengths <= 0
        x = jnp.where(nothing[:, None, None], null[None], features)
        x = Projection((t,), (e,), (None, "embed"), self.dtype, name="up")(x)
        x = nn.gelu(x, approximate=True)
        x = Projection((e,), (e,), ("embed", None), self.dtype, name="out")(x)
        return x, jnp.where(lengths == 0, n, jnp.abs(lengths))


def align_right(
    features: Float[Array | np.ndarray, "b s t"],
    lengths: Int[Array | np.ndarray, " b"],
    length: int,
) -> Float[Array, "b n t"]:
    """Return features in a sequence of `length`, those that count at its end.

    Args:
        features: padded on the right; no more than `length`.
        lengths: of a `Caption`; what is "no condition" may end up in any order.
        length: of the result, n.
    """
    features = jnp.pad(jnp.asarray(features), ((0, 0), (0, length - features.shape[1]), (0, 0)))
    places = (jnp.arange(length)[None] - (length - lengths)[:, None]) % length
    return jnp.take_along_axis(features, places[..., None], axis=1)
