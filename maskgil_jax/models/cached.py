"""The causal transformer a few tokens at a time, with keys and values of those before in a cache.

The layers are not scanned here: to take a layer out of stacked parameters copies it, which costs as
much as reading it three times, and a single token does little else than read parameters. They are
taken apart once, before the loop over tokens.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from maskgil_jax.models.transformer import Block, LayerCache, TransformerConfig, make_norm


@flax.struct.dataclass
class Cache:
    """What a causal model keeps of a batch of sequences.

    Attributes:
        layers: keys and values of every layer.
        lengths: int32 [b], how many of the prefilling tokens count, of each image: the last ones,
            padding stands in front; `None` where all do.
    """

    layers: tuple[LayerCache, ...]
    lengths: Any = None

    def grow(self, length: int) -> "Cache":
        """Return it with room for `length` positions, of which none of the new is computed yet."""

        def pad(x):
            room = length - x.shape[2]
            return jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0))) if room else x

        return Cache(jax.tree.map(pad, self.layers), self.lengths)


@dataclasses.dataclass(frozen=True)
class CachedTransformer:
    """A `Transformer` whose parameters are taken apart by layer.

    Attributes:
        config: its shape.
        layers: parameters of every layer.
        final_norm: those of the norm behind them.
    """

    config: TransformerConfig
    layers: tuple[Any, ...]
    final_norm: Any

    @classmethod
    def take_apart(cls, config: TransformerConfig, params: Any) -> "CachedTransformer":
        """Return it for the parameters of a `Transformer`; the kernels in the type it computes in.

        Args:
            config: shape of the transformer.
            params: what it was initialised with, unboxed.
        """
        params = cast_kernels(params, config.dtype)

        def take(number):
            return jax.tree.map(lambda x: x[number], params["layers"])

        return cls(config, tuple(map(take, range(config.num_layers))), params["final_norm"])

    def empty(self, batch: Any, length: int) -> tuple[LayerCache, ...]:
        """Return the cache of `length` positions of which none is computed yet.

        The batch is a number, or the symbol of one in a program that is exported for any number.
        """
        cfg = self.config
        zeros = jnp.zeros((batch, cfg.kv_heads, length, cfg.head_dim), jnp.dtype(cfg.dtype))
        return tuple(LayerCache(zeros, zeros) for _ in self.layers)

    def extend(
        self,
        x: Float[Array, "b l e"],
        rope: Float[Array | np.ndarray, "l d2 2"],
        mask: Bool[Array, "#b l s"],
        caches: tuple[LayerCache, ...],
        position: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "b l e"], tuple[LayerCache, ...]]:
        """Return the normalised output at new positions, and the cache with them.

        Args:
            x: embedded tokens of the new positions.
            rope: their rotary rows.
            mask: true where they may look, over the first s positions of the cache; those beyond
                cost nothing.
            caches: of the positions before.
            position: place of the first new one, may be traced.
        """
        block: Any = Block(self.config, train=False)
        grown = []
        x = x.astype(jnp.dtype(self.config.dtype))
        for params, cache in zip(self.layers, caches, strict=True):
            x, cache = block.apply({"params": params}, x, rope, mask, None, cache, position)
            grown.append(cache)
        norm: Any = make_norm("rms", self.config, "final_norm")
        return norm.apply({"params": self.final_norm}, x).astype(x.dtype), tuple(grown)


def look_back(
    position: Int[Array, ""] | int,
    count: int,
    live: int,
    prefix_length: int,
    lengths: Int[Array, " b"] | None = None,
) -> Bool[Array, "#b l s"]:
    """Return where new positions may look: at themselves and at those before them that count.

    Args:
        position: place of the first new one, may be traced.
        count: how many there are, l.
        live: positions of the cache that are read, s.
        prefix_length: prefilling tokens, padding included.
        lengths: how many of them count, the last ones; all if `None`.
    """
    keys = jnp.arange(live)
    mask = (keys[None] <= position + jnp.arange(count)[:, None])[None]
    if lengths is None:
        return mask
    # What is padding itself looks at itself: a softmax over nothing is no number.
    is_own = keys[None] == position + jnp.arange(count)[:, None]
    counts = keys[None] >= (prefix_length - lengths)[:, None]
    return mask & (counts[:, None] | is_own[None])


def cast_kernels(params: Any, dtype: str) -> Any:
    """Return parameters with the kernels of linear maps in the type that they are used in."""

    def cast(path, x):
        return x.astype(dtype) if path[-1].key == "kernel" else x

    return jax.tree_util.tree_map_with_path(cast, params)
