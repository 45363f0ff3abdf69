"""LlamaGen: the causal LLaMA over image tokens in raster order.

The condition is prefilling tokens in front of the image tokens: one for a class, here; those of a
caption in `llamagen_text.py`. Training sees all tokens at once, each of them predicted from those
before it; decoding goes token by token, with a cache.

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
from maskgil_jax.models.base import ClassModelConfig, RotaryModelConfig
from maskgil_jax.models.cached import Cache, CachedTransformer, cast_kernels, look_back
from maskgil_jax.models.conditioning import Embedding, Labels
from maskgil_jax.models.maskgil import Head
from maskgil_jax.models.transformer import (
    Transformer,
    stack_config,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalModelConfig(RotaryModelConfig):
    """Shape and options of a LlamaGen, whatever it is conditioned on."""

    causal: ClassVar[bool] = True

    @property
    def num_prefill(self) -> int:
        """Number of prefilling tokens, padding included."""
        return 1

    def make_cached(
        self, params: Any, grid_size: tuple[int, int] | None = None
    ) -> "CachedLlamaGen":
        """Return the model for decoding, on a grid; the configured one if `None`."""
        return CachedLlamaGen.take_apart(self, params, grid_size or self.grid_size)

    def rope_table(self, grid_size: tuple[int, int] | None = None) -> np.ndarray:
        """Return the rotary table of the condition's tokens and the image tokens.

        Args:
            grid_size: grid to make the table for; the configured one if `None`.

        Returns:
            float32 [num_prefill + gh·gw, head_dim/2, 2].
        """
        span = self.grid_size if self.rope_interpolation else None
        condition = rope_lib.condition_rows(self.num_prefill, self.head_dim, self.cond_rope)
        grid = grid_size or self.grid_size
        return np.concatenate(
            [condition, rope_lib.rope_2d(grid, self.head_dim, self.rope_base, span)]
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaGenConfig(ClassModelConfig, CausalModelConfig):
    """Shape and options of a class-conditional LlamaGen."""

    family: ClassVar[str] = "llamagen"

    def make_module(self) -> "LlamaGen":
        """Return the Flax module."""
        return LlamaGen(self)


class CausalModel(nn.Module):
    """Causal LLaMA behind the tokens of a condition.

    A family adds the method `embed_condition`, which maps a condition to the prefilling tokens of
    every image [b n e] and to how many of them count [b], the last ones; all do if that is `None`.
    """

    config: Any  # of the family, a `CausalModelConfig`

    def setup(self):
        """Create the submodules that do not depend on what the condition is."""
        cfg = self.config
        self.token_embed = Embedding(cfg.codebook_size, cfg.width)
        self.dropout = nn.Dropout(cfg.embedding_dropout)
        self.transformer = Transformer(stack_config(cfg))
        self.head = Head(cfg)

    def __call__(
        self, tokens: Int[Array | np.ndarray, "b gh gw"], condition: Any, train: bool = False
    ) -> Float[Array, "b l v"]:
        """Return float32 logits [b, gh·gw, K], of every token from those before it.

        Args:
            tokens: codes 0…K-1; the grid may differ from the configured one.
            condition: what the images show, as the family takes it.
            train: whether dropout is on (needs an rng named `dropout`).
        """
        cfg = self.config
        b, gh, gw = tokens.shape
        prefix, lengths = self.embed_condition(condition)
        # Nothing is predicted from the last token.
        before = self.token_embed(tokens.reshape(b, gh * gw)[:, :-1])
        x = jnp.concatenate([prefix.astype(before.dtype), before], axis=1)
        x = self.dropout(x, deterministic=not train)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        length = x.shape[1]
        mask = look_back(0, length, length, prefix.shape[1], lengths)
        x = self.transformer(x, cfg.rope_table((gh, gw))[:length], mask, train=train)
        return self.head(x[:, prefix.shape[1] - 1 :])

    def embed_tokens(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l e"]:
        """Look up codes."""
        return self.token_embed(tokens)

    def logits(self, features: Float[Array, "b l e"]) -> Float[Array, "b l v"]:
        """Return the logits of the tokens behind those that the features are of."""
        return self.head(features)


class LlamaGen(CausalModel):
    """Causal LLaMA with a class token as its condition.

    Conditions are classes 0…C-1, or C for "no condition"; or float mixtures of them [b, C+1].
    """

    def setup(self):
        """Create the submodules."""
        super().setup()
        self.label_embed = Embedding(self.config.num_classes + 1, self.config.width)

    def embed_condition(self, condition: Labels) -> tuple[Float[Array, "b 1 e"], None]:
        """Return the prefilling token of every image; see the base."""
        return self.label_embed.embed_labels(condition), None


@dataclasses.dataclass(frozen=True)
class CachedLlamaGen:
    """LlamaGen for decoding: one token in, the logits of the next one out.

    Attributes:
        module: the model.
        variables: its parameters outside the transformer.
        transformer: the transformer's.
        rope: rotary table of the whole sequence.
        prefix_length: prefilling tokens, padding included.
    """

    module: Any
    variables: Any
    transformer: CachedTransformer
    rope: np.ndarray
    prefix_length: int

    @classmethod
    def take_apart(
        cls, config: CausalModelConfig, params: Any, grid_size: tuple[int, int]
    ) -> "CachedLlamaGen":
        """Return it for the parameters of the model."""
        rest = {name: tree for name, tree in params.items() if name != "transformer"}
        return cls(
            module=config.make_module(),
            variables={"params": cast_kernels(rest, config.dtype)},
            transformer=CachedTransformer.take_apart(stack_config(config), params["transformer"]),
            rope=config.rope_table(grid_size),
            prefix_length=config.num_prefill,
        )

    def start(self, condition: Any, length: int) -> tuple[Float[Array, "b v"], Cache]:
        """Read the condition: return the logits of the first token and a cache.

        Args:
            condition: as the model takes it.
            length: tokens that the cache is to hold.
        """
        x, lengths = self.module.apply(self.variables, condition, method="embed_condition")
        prefix = self.prefix_length
        caches = self.transformer.empty(x.shape[0], prefix + length)
        mask = look_back(0, prefix, prefix, prefix, lengths)
        x, caches = self.transformer.extend(x, self.rope[:prefix], mask, caches, 0)
        return self._logits(x[:, -1:]), Cache(caches, lengths)

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
