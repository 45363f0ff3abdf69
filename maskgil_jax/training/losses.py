"""Cross-entropy with label smoothing in closed form.

Reference: MaskGIL section 2.3 (loss on masked tokens); Szegedy et al., 2016 (label smoothing).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def smoothed_cross_entropy(
    logits: Float[Array, "b l v"], targets: Int[Array, "b l"], smoothing: float = 0.1
) -> Float[Array, "b l"]:
    """Return the cross-entropy against (1 - ε)·one-hot + ε/v, in nats.

    Computed as (1-ε)·(lse - z_y) + ε·(lse - mean z), so no one-hot array exists.

    Args:
        logits: any float type; the arithmetic is float32.
        targets: ids in 0…v-1.
        smoothing: ε in [0, 1).
    """
    z = logits.astype(jnp.float32)
    lse = jax.nn.logsumexp(z, axis=-1)
    at_target = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
    return lse - (1 - smoothing) * at_target - smoothing * jnp.mean(z, axis=-1)
