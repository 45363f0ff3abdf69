"""LlamaGen: the causal LLaMA over image tokens in raster order.

The condition is a prefilling token in front of the image tokens. Training sees all tokens at once,
each of them predicted from those before it; decoding goes token by token, with a cache.

Reference: Sun et al., 2024, "Autoregressive Model Beats Diffusion"; LlamaGen
`autoregressive/models/gpt.py`; MaskGIL Figure 3 and Tables A.1 and A.2.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskgil_jax.models import rope as rope_lib
from maskgil_jax.models.base import ClassModelConfig
from maskgil_jax.models.cached import Cache, CachedTransformer, cast_kernels, look_back
from maskgil_jax.models.conditioning import Embedding, Labels
from maskgil_jax.models.maskgil import Head, stack_config
from maskgil_jax.models.transformer import (
    Transformer,
    TransformerConfig,
    causal_mask,
    check_choices,
)

_CHOICES = {"cond_rope": ("identity", "zero")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaGenConfig(ClassModelConfig, TransformerConfig):
    """Shape and options of a class-conditional LlamaGen.

    Attributes:
        cond_rope: row of the condition token: `identity` (cos 1, sin 0), or `zero` (cos = sin = 0),
            which the published weights were trained with.
        rope_base: base of the rotary frequencies.
        rope_interpolation: whether another grid than the configured one is spread over its
            positions, instead of reaching beyond them.
        embedding_dropout: dropout rate on the embedded sequence, in [0, 1).
    """

    family: ClassVar[str] = "llamagen"
    causal: ClassVar[bool] = True

    cond_rope: str = "identity"
    rope_base: float = 10000.0
    rope_interpolation: bool = False
    embedding_dropout: float = 0.0

    def __post_init__(self):
        TransformerConfig.__post_init__(self)
        ClassModelConfig.__post_init__(self)
        check_choices(self, _CHOICES)
        check_rope(self.rope_base, self.head_dim)
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(
                f"embedding_dropout {self.embedding_dropout} is out of range; allowed: [0, 1)"
            )

    def make_module(self) -> "LlamaGen":
        """Return the Flax module."""
        return LlamaGen(self)

    def make_cached(
        self, params: Any, grid_size: tuple[int, int] | None = None
    ) -> "CachedLlamaGen":
        """Return the model for decoding, on a grid; the configured one if `None`."""
        return CachedLlamaGen.take_apart(self, params, grid_size or self.grid_size)

    def rope_table(self, grid_size: tuple[int, int] | None = None) -> np.ndarray:
        """Return the rotary table of the condition token and the image tokens.

        Args:
            grid_size: grid to make the table for; the configured one if `None`.

        Returns:
            float32 [1 + gh·gw, head_dim/2, 2].
        """
        span = self.grid_size if self.rope_interpolation else None
        condition = rope_lib.condition_rows(1, self.head_dim, self.cond_rope)
        grid = grid_size or self.grid_size
        return np.concatenate(
            [condition, rope_lib.rope_2d(grid, self.head_dim, self.rope_base, span)]
        )


def check_rope(rope_base: float, head_dim: int) -> None:
    """Raise a `ValueError` unless a 2D rotary table can be made."""
    if not rope_base > 0:
        raise ValueError(f"rope_base {rope_base} must be more than 0")
    if head_dim % 4:
        raise ValueError(f"2D RoPE needs a head dimension divisible by 4, not {head_dim}")


class LlamaGen(nn.Module):
    """Causal LLaMA with a class token as its condition."""

    config: LlamaGenConfig

    def setup(self):
        """Create the submodules."""
        cfg = self.config
        self.token_embed = Embedding(cfg.codebook_size, cfg.width)
        self.label_embed = Embedding(cfg.num_classes + 1, cfg.width)
        self.dropout = nn.Dropout(cfg.embedding_dropout)
        self.transformer = Transformer(stack_config(cfg))
        self.head = Head(cfg)

    def __call__(
        self, tokens: Int[Array | np.ndarray, "b gh gw"], labels: Labels, train: bool = False
    ) -> Float[Array, "b l v"]:
        """Return float32 logits [b, gh·gw, K], of every token from those before it.

        Args:
            tokens: codes 0…K-1; the grid may differ from the configured one.
            labels: classes 0…C-1, or C for "no condition"; or float mixtures of them [b, C+1].
            train: whether dropout is on (needs an rng named `dropout`).
        """
        cfg = self.config
        b, gh, gw = tokens.shape
        # Nothing is predicted from the last token.
        before = self.token_embed(tokens.reshape(b, gh * gw)[:, :-1])
        x = jnp.concatenate([self.embed_condition(labels), before], axis=1)
        x = self.dropout(x, deterministic=not train)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        table = cfg.rope_table((gh, gw))[: gh * gw]
        return self.head(self.transformer(x, table, causal_mask(gh * gw), train=train))

    def embed_condition(self, labels: Labels) -> Float[Array, "b 1 e"]:
        """Return the prefilling token of every image."""
        return self.label_embed.embed_labels(labels)

    def embed_tokens(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l e"]:
        """Look up codes."""
        return self.token_embed(tokens)

    def logits(self, features: Float[Array, "b l e"]) -> Float[Array, "b l v"]:
        """Return the logits of the tokens behind those that the features are of."""
        return self.head(features)


@dataclasses.dataclass(frozen=True)
class CachedLlamaGen:
    """LlamaGen for decoding: one token in, the logits of the next one out.

    Attributes:
        module: the model.
        variables: its parameters outside the transformer.
        transformer: the transformer's.
        rope: rotary table of the whole sequence.
    """

    module: Any
    variables: Any
    transformer: CachedTransformer
    rope: np.ndarray

    # Prefilling tokens.
    prefix_length: ClassVar[int] = 1

    @classmethod
    def take_apart(
        cls, config: LlamaGenConfig, params: Any, grid_size: tuple[int, int]
    ) -> "CachedLlamaGen":
        """Return it for the parameters of the model."""
        rest = {name: tree for name, tree in params.items() if name != "transformer"}
        return cls(
            module=config.make_module(),
            variables={"params": cast_kernels(rest, config.dtype)},
            transformer=CachedTransformer.take_apart(stack_config(config), params["transformer"]),
            rope=config.rope_table(grid_size),
        )

    def start(self, labels: Labels, length: int) -> tuple[Float[Array, "b v"], Cache]:
        """Read the condition: return the logits of the first token and a cache.

        Args:
            labels: as the model takes them.
            length: tokens that the cache is to hold.
        """
        x = self.module.apply(self.variables, labels, method="embed_condition")
        caches = self.transformer.empty(len(x), self.prefix_length + length)
        x, caches = self.transformer.extend(x, self.rope[:1], causal_mask(1), caches, 0)
        return self._logits(x), Cache(caches)

    def step(
        self, tokens: Int[Array, " b"], index: Int[Array, ""] | int, live: int, cache: Cache
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Read one more token: return the logits of the next one and the cache with it.

        Args:
            tokens: codes at raster position `index`.
            index: 0…, may be traced.
            live: positions of the cache to read, prefilling tokens included; at least as many as
                are filled then.
            cache: of all tokens before.
        """
        position = self.prefix_length + index
        x = self.module.apply(self.variables, tokens[:, None], method="embed_tokens")
        rope = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.rope), position, 1)
        mask = look_back(position, 1, live, self.prefix_length, cache.lengths)
        x, caches = self.transformer.extend(x, rope, mask, cache.layers, position)
        return self._logits(x), Cache(caches, cache.lengths)

    def _logits(self, x: Float[Array, "b 1 e"]) -> Float[Array, "b v"]:
        return self.module.apply(self.variables, x, method="logits")[:, 0]
