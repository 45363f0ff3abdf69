"""Leave out unlikely codes before one is drawn.

Reference: LlamaGen, `generate.py` (top-k, then top-p); Holtzman et al., 2020 (top-p).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def keep_top_k(logits: Float[Array, "b l k"], top_k: int) -> Float[Array, "b l k"]:
    """Forbid (-inf) all but the `top_k` most likely codes; those that tie with the last stay.

    Raises:
        ValueError: if there are fewer codes, or `top_k` is not positive.
    """
    codes = logits.shape[-1]
    if not 1 <= top_k <= codes:
        raise ValueError(f"top_k {top_k} is out of range; allowed: 1 to {codes}, the codes")
    least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(
    logits: Float[Array, "b l k"], top_p: float | np.floating | Array
) -> Float[Array, "b l k"]:
    """Forbid (-inf) all but the fewest most likely codes whose probabilities sum to `top_p`.

    A code stays if those before it sum to less than `top_p`, so there is always one; codes that tie
    with the last stay too.

    Args:
        logits: float32.
        top_p: in (0, 1], may be traced.
    """
    falling = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # A tiny top_p is 0 in float32; the most likely code stays all the same.
    first = jnp.arange(logits.shape[-1]) == 0
    stays = (before < top_p) | first[None, None]
    least = jnp.min(jnp.where(stays, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)
