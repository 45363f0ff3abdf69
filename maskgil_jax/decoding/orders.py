"""In which order unknown tokens are revealed: by confidence, along a Halton sequence, at random.

An order gives every position a score; each step reveals those of the highest scores among the
tokens that are still unknown, so known tokens are respected whatever the order.

Reference: MaskGIT (Chang et al., 2022), section 3.2, confidence with Gumbel noise; Besnier et al.,
2025, "Halton Scheduler for Masked Generative Image Transformer".
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

ORDERS = ("confidence", "halton", "random")
# Apart from the steps' own numbers, which count from 0.
_ROLL = 2**31 - 1


@functools.lru_cache(maxsize=64)
def halton_ranks(grid_size: tuple[int, int]) -> np.ndarray:
    """Return when the Halton sequence first visits each cell of a grid, in raster order.

    Point n = 1, 2, … lies in row floor(gh·h₂(n)) and column floor(gw·h₃(n)), where h_b(n) mirrors
    the digits of n in base b at the point.

    Returns:
        int32 [gh·gw], a permutation of 0…gh·gw-1.
    """
    gh, gw = grid_size
    ranks = np.full(gh * gw, -1, np.int32)
    visited = n = 0
    while visited < gh * gw:
        n += 1
        cell = _radical_inverse(n, 2, gh) * gw + _radical_inverse(n, 3, gw)
        if ranks[cell] < 0:
            ranks[cell] = visited
            visited += 1
    return ranks


def _radical_inverse(n: int, base: int, size: int) -> int:
    numerator, denominator = 0, 1
    while n:
        n, digit = divmod(n, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator * size // denominator


def halton_scores(grid_size: tuple[int, int], rngs: jax.Array, roll: bool) -> Float[Array, "b l"]:
    """Return the scores of the Halton order for a batch: the earlier a cell, the higher.

    Args:
        grid_size: (gh, gw), tokens per column and per row.
        rngs: one key per image, from which the shift is drawn.
        roll: whether each image's sequence is shifted around the grid, by its own random amount.
    """
    scores = -jnp.asarray(halton_ranks(grid_size), jnp.float32).reshape(grid_size)

    def shifted(rng):
        rows, columns = jax.random.split(jax.random.fold_in(rng, _ROLL))
        dy = jax.random.randint(rows, (), 0, grid_size[0])
        dx = jax.random.randint(columns, (), 0, grid_size[1])
        return jnp.roll(scores, jnp.stack([dy, dx]), (0, 1)).reshape(-1)

    if roll:
        return jax.vmap(shifted)(rngs)
    return jnp.broadcast_to(scores.reshape(1, -1), (rngs.shape[0], scores.size))
