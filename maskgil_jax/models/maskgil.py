"""MaskGIL: the Bidirectional LLaMA over masked image tokens.

On the generation path this is the `logits_fn` of the decoder; on the training path it predicts the
masked tokens. The condition is a prefilling token in front of the image tokens (or, for weights of
the released code, behind them); logits are returned for the image tokens only.

Reference: MaskGIL section 3.1 and Table 2; the options that reproduce the released code are listed
in `maskgil_jax.config.preset`.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskgil_jax.models import rope as rope_lib
from maskgil_jax.models.base import ClassModelConfig
from maskgil_jax.models.conditioning import Embedding, Labels
from maskgil_jax.models.transformer import (
    Transformer,
    TransformerConfig,
    check_choices,
    stack_config,
)

_CHOICES = {
    "condition": ("first", "last"),
    "rope": ("2d", "1d"),
    "cond_rope": ("identity", "zero", "table"),
    "embeddings": ("separate", "shared"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGILConfig(ClassModelConfig, TransformerConfig):
    """Shape and options of a class-conditional MaskGIL.

    Attributes:
        condition: whether the condition token stands `first` or `last`.
        rope: rotary table over the grid (`2d`) or over raster positions (`1d`).
        cond_rope: row of the condition token: `identity` (cos 1, sin 0), `zero` (cos = sin = 0), or
            `table`: the sequence as it stands takes the rows of a 1D table with one zero row in
            front, as the released code does.
        rope_base: base of the rotary frequencies.
        rope_interpolation: whether another grid than the configured one is spread over its
            positions, instead of reaching beyond them; for rope `2d`.
        embeddings: `separate` tables for tokens and labels, or one `shared` table in the order
            codes, mask, classes, null class.
        embedding_dropout: dropout rate on the embedded sequence, in [0, 1).
    """

    family: ClassVar[str] = "maskgil"

    condition: str = "first"
    rope: str = "2d"
    cond_rope: str = "identity"
    rope_base: float = 10000.0
    rope_interpolation: bool = False
    embeddings: str = "separate"
    embedding_dropout: float = 0.0

    def __post_init__(self):
        TransformerConfig.__post_init__(self)
        ClassModelConfig.__post_init__(self)
        check_choices(self, _CHOICES)
        if not self.rope_base > 0:
            raise ValueError(f"rope_base {self.rope_base} must be more than 0")
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(
                f"embedding_dropout {self.embedding_dropout} is out of range; allowed: [0, 1)"
            )
        if self.cond_rope == "table" and self.rope != "1d":
            raise ValueError("cond_rope 'table' needs rope '1d'; with '2d': 'identity' or 'zero'")
        if self.rope_interpolation and self.rope != "2d":
            raise ValueError("rope_interpolation needs rope '2d'; in 1D rows have no positions")
        if self.rope == "2d" and self.head_dim % 4:
            raise ValueError(
                f"rope '2d' needs a head dimension divisible by 4, not {self.head_dim}"
            )

    @property
    def preset(self) -> str:
        """Name of the preset whose settings such weights were trained for."""
        return "released" if self.cond_rope == "table" else "recommended"

    def make_module(self) -> "MaskGIL":
        """Return the Flax module."""
        return MaskGIL(self)

    def rope_table(self, grid_size: tuple[int, int] | None = None) -> np.ndarray:
        """Return the rotary table of the whole sequence, condition token included.

        Args:
            grid_size: grid to make the table for; the configured one if `None`.

        Returns:
            float32 [gh·gw + 1, head_dim/2, 2].
        """
        gh, gw = grid_size or self.grid_size
        if self.cond_rope == "table":
            zero = rope_lib.condition_rows(1, self.head_dim, "zero")
            return np.concatenate([zero, rope_lib.rope_1d(gh * gw, self.head_dim, self.rope_base)])
        condition = rope_lib.condition_rows(1, self.head_dim, self.cond_rope)
        if self.rope == "2d":
            span = self.grid_size if self.rope_interpolation else None
            image = rope_lib.rope_2d((gh, gw), self.head_dim, self.rope_base, span)
        else:
            image = rope_lib.rope_1d(gh * gw, self.head_dim, self.rope_base)
        parts = [condition, image]
        return np.concatenate(parts if self.condition == "first" else parts[::-1])


class Head(nn.Module):
    """The output layer, `features → logits` in float32; zero at initialisation."""

    config: Any  # of a family that is both a `TokenModelConfig` and a `TransformerConfig`

    @nn.compact
    def __call__(self, x: Float[Array, "b l e"]) -> Float[Array, "b l v"]:
        """Return logits over the tokens that the model knows."""
        cfg = self.config
        rows = cfg.num_tokens
        init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed", "vocab"))
        kernel = jnp.asarray(self.param("kernel", init, (cfg.width, rows)), x.dtype)
        kernel = jnp.pad(kernel, ((0, 0), (0, cfg.head_padding)))
        logits = jnp.einsum("ble,ev->blv", x, kernel, preferred_element_type=jnp.float32)
        return logits[..., :rows]


class MaskGIL(nn.Module):
    """Bidirectional LLaMA with a class token as its condition."""

    config: MaskGILConfig

    def setup(self):
        """Create the submodules."""
        cfg = self.config
        if cfg.embeddings == "shared":
            count = cfg.codebook_size + 1 + cfg.num_classes + 1
            self.token_embed = Embedding(count, cfg.width)
        else:
            self.token_embed = Embedding(cfg.codebook_size + 1, cfg.width)
            self.label_embed = Embedding(cfg.num_classes + 1, cfg.width)
        self.dropout = nn.Dropout(cfg.embedding_dropout)
        self.transformer = Transformer(stack_config(cfg))
        self.head = Head(cfg)

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "b gh gw"],
        labels: Labels,
        train: bool = False,
    ) -> Float[Array, "b l v"]:
        """Return float32 logits [b, gh·gw, K+1] for every image token.

        Args:
            tokens: codes 0…K-1, or K where masked; the grid may differ from the configured one.
            labels: classes 0…C-1, or C for "no condition"; or float mixtures of them [b, C+1].
            train: whether dropout is on (needs an rng named `dropout`).
        """
        return self.head(self.features(tokens, labels, train))

    def features(
        self,
        tokens: Int[Array | np.ndarray, "b gh gw"],
        labels: Labels,
        train: bool = False,
    ) -> Float[Array, "b l e"]:
        """Return what the head reads, of every image token; the arguments are those of a call."""
        cfg = self.config
        b, gh, gw = tokens.shape
        image = self.token_embed(tokens.reshape(b, gh * gw))
        if cfg.embeddings == "shared":
            condition = self.token_embed.embed_labels(labels, cfg.codebook_size + 1)
        else:
            condition = self.label_embed.embed_labels(labels)
        first = cfg.condition == "first"
        x = jnp.concatenate([condition, image] if first else [image, condition], axis=1)
        x = self.dropout(x, deterministic=not train)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        x = self.transformer(x, cfg.rope_table((gh, gw)), train=train)
        return x[:, 1:] if first else x[:, :-1]

    def logits(
        self, features: Float[Array, "b n e"], positions: Int[Array, "b n"]
    ) -> Float[Array, "b n v"]:
        """Return the logits of some features, whatever their positions in the image."""
        return self.head(features)
