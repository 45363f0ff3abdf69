"""What the decoder asks of a model: features of all positions, and logits of some.

The last layer of a model with 16,384 codes costs an eighth of its forward pass and is needed at
masked positions only. Shapes are fixed in a compiled program, so it is computed for one of a few
numbers of positions, the smallest that holds all masked ones.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LogitsFn = Callable[[Int[Array, "b l"], Any], Float[Array, "b l v"]]
# Shares of the positions that the head is computed for. Each is a branch of the program, and takes
# about a second to compile on a CPU.
_SHARES = (0.5, 1.0)
# For fewer positions a branch costs more than it spares.
_MIN_LENGTH = 256


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A model in two parts.

    Attributes:
        features: maps tokens [b, l] and a condition to what the head reads, [b, l, e].
        head: maps features [b, n, e] of the positions [b, n] to logits [b, n, v].
    """

    features: Callable[[Array, Any], Array]
    head: Callable[[Array, Array], Array]


def whole(logits_fn: LogitsFn) -> Predictor:
    """Return the predictor of a model in one part."""
    return Predictor(features=logits_fn, head=lambda logits, positions: logits)


def head_lengths(seq_len: int) -> tuple[int, ...]:
    """Return the numbers of positions that the head is computed for, ascending."""
    if seq_len < _MIN_LENGTH:
        return (seq_len,)
    return tuple(math.ceil(seq_len * share) for share in _SHARES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """Which images of a batch begin alike: with the same tokens and the same condition.

    The first step's logits are then computed once for each kind.

    Attributes:
        rows: int32 [u], an image of each kind; kinds may repeat.
        groups: int32 [b], the place of each image's kind among them.
    """

    rows: Any
    groups: Any


def take_positions(
    features: Float[Array, "b l e"], positions: Int[Array, "b n"]
) -> Float[Array, "b n e"]:
    """Return the features of some positions; all of them, in order, if there are as many."""
    if positions.shape[1] == features.shape[1]:
        return features
    return jnp.take_along_axis(features, positions[..., None], axis=1)


def at_all(
    masked: Bool[Array, "b l"],
    features: Float[Array, "u l e"],
    read: Callable[[Array, Array], tuple[Array, Array]],
) -> tuple[Array, Array]:
    """Compute two numbers of every position, masked or not; see `at_masked`."""
    return read(features, jnp.broadcast_to(jnp.arange(masked.shape[1])[None], masked.shape))


def at_masked(
    masked: Bool[Array, "b l"],
    features: Float[Array, "u l e"],
    read: Callable[[Array, Array], tuple[Array, Array]],
    fill: tuple[Any, Any],
) -> tuple[Array, Array]:
    """Compute two numbers of every masked position, and of some others with them.

    Args:
        masked: where they are needed.
        features: handed on to `read`.
        read: maps features and positions [b, n] to two arrays [b, n].
        fill: what the results hold where they were not computed.

    Returns:
        two arrays [b, l].
    """
    b, length = masked.shape
    # Stable, so that masked positions come first and each kind is in order.
    masked_first = jnp.argsort(~masked, axis=1, stable=True)

    def read_some(count, features):
        positions = masked_first[:, :count]

        def spread(values, rest):
            # `jnp.put_along_axis` needs a known batch, which an exported program has not.
            full = jnp.full((b, length), rest, values.dtype)
            return full.at[jnp.arange(b)[:, None], positions].set(values, unique_indices=True)

        first, second = read(features, positions)
        return spread(first, fill[0]), spread(second, fill[1])

    *shorter, _ = lengths = head_lengths(length)
    if not shorter:
        return at_all(masked, features, read)
    branches = [functools.partial(read_some, count) for count in shorter]
    needed = jnp.max(jnp.sum(masked, axis=1))
    return jax.lax.switch(
        jnp.searchsorted(jnp.array(lengths), needed),
        [*branches, functools.partial(at_all, masked, read=read)],
        features,
    )
