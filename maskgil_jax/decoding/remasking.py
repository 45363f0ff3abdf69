"""Take decoded tokens back in later steps, so that early mistakes can be mended.

In a step that finds `decoded` tokens of its own (never those known at the start) and leaves `left`
masked by the schedule, a share σ of the decoded ones is masked again and as many more are revealed:
the number of masked tokens after each step stays the schedule's. σ cannot exceed left / decoded, or
more would be masked than the schedule leaves; so the last step takes nothing back.

    cap      σ = min(η, left / decoded)
    rescale  σ = η · min(1, left / decoded)

The expected number is σ·decoded; it is rounded up or down at random, so that a small η is not
always rounded to nothing.

Reference: Wang et al., 2025, "Remasking Discrete Diffusion Models with Inference-Time Scaling",
sections 3 and 4.1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from maskgil_jax import masking

REMASKING = ("none", "cap", "rescale")
CHOICES = ("random", "confidence")
# May be traced.
Number = float | np.floating | Array
# Apart from the keys of drawing and ordering, which a step splits off.
_REMASK = 2**31 - 2


def expected_count(
    kind: str, strength: Number, decoded: Int[Array, " b"], left: Int[Array, " b"]
) -> Float[Array, " b"]:
    """Return σ·decoded, the mean number of tokens that a step takes back.

    Args:
        kind: `cap` or `rescale`.
        strength: η in [0, 1].
        decoded: tokens revealed in earlier steps.
        left: tokens that the schedule leaves masked after this step.
    """
    decoded, left = decoded.astype(jnp.float32), left.astype(jnp.float32)
    if kind == "cap":
        return jnp.minimum(strength * decoded, left)
    return strength * jnp.minimum(decoded, left)


def draw_remasked(
    rngs: jax.Array,
    eligible: Bool[Array, "b l"],
    log_prob: Float[Array, "b l"],
    left: Int[Array, " b"],
    *,
    kind: str,
    strength: Number,
    choice: str,
) -> Bool[Array, "b l"]:
    """Mark the tokens that a step takes back.

    Args:
        rngs: one key per image and step.
        eligible: tokens revealed in earlier steps.
        log_prob: of each of them, when it was drawn.
        left: tokens that the schedule leaves masked after this step.
        kind: `cap` or `rescale`.
        strength: η in [0, 1].
        choice: `random` takes all alike; `confidence` takes a token of probability p in proportion
            to exp(-p).
    """
    decoded = jnp.sum(eligible, axis=1)
    expected = expected_count(kind, strength, decoded, left)
    keys = jax.vmap(lambda rng: jax.random.split(jax.random.fold_in(rng, _REMASK)))(rngs)
    rounding = jax.vmap(jax.random.uniform)(keys[:, 0])
    count = jnp.floor(expected + rounding).astype(jnp.int32)
    # With top-k Gumbel scores a subset is drawn without replacement in proportion to the weights.
    gumbel = jax.vmap(lambda rng: jax.random.gumbel(rng, eligible.shape[1:]))(keys[:, 1])
    weight = -jnp.exp(log_prob) if choice == "confidence" else jnp.zeros_like(log_prob)
    scores = jnp.where(eligible, weight + gumbel, -jnp.inf)
    count = jnp.minimum(count, jnp.minimum(decoded, left))
    return masking.select_top_k(scores, count) & eligible
