"""Classifier-free guidance, `uncond + s · (cond - uncond)`, with s a schedule over the steps.

Reference: MaskGIL section 3.2; released code (linear ramp); Gao et al., 2023 (power-cosine);
Kynkäänniemi et al., 2024 (guidance in an interval only).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maskgil_jax.masking import check_choice

GUIDANCE_SCHEDULES = ("constant", "linear", "power_cosine")
LogitsFn = Callable[[Int[Array, "b l"], Any], Float[Array, "b l v"]]


def guidance_scales(
    schedule: str,
    scale: float,
    num_steps: int,
    power: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> np.ndarray:
    """Return the guidance scale of every step, float32 [num_steps].

    constant: s. linear: 1 + (s - 1)·i/(T-1). power_cosine: 1 + (s - 1)·(1 - cos(pi·((i+1)/T)^p))/2.
    The last step has s, so a single step is fully guided. Outside the interval the scale is 1: step
    i of T is inside if first ≤ i/T < second.

    Raises:
        ValueError: if the schedule is unknown, or a number out of range.
    """
    check_choice("guidance schedule", schedule, GUIDANCE_SCHEDULES)
    if not 0 <= scale <= np.finfo(np.float32).max:
        raise ValueError(f"guidance_scale {scale} is out of range; allowed: 0 or more, finite")
    if not power > 0:
        raise ValueError(f"guidance_power {power} is out of range; allowed: more than 0")
    start, stop = interval
    if not 0 <= start < stop <= 1:
        raise ValueError(
            f"guidance from {start} to {stop} is no interval; allowed: 0 ≤ guidance_start < "
            "guidance_stop ≤ 1, shares of the steps"
        )
    step = np.arange(num_steps)
    ramp = {
        "constant": np.ones(num_steps),
        "linear": step / (num_steps - 1) if num_steps > 1 else np.ones(1),
        "power_cosine": (1 - np.cos(np.pi * ((step + 1) / num_steps) ** power)) / 2,
    }[schedule]
    inside = (start <= step / num_steps) & (step / num_steps < stop)
    if scale != 1 and not inside.any():
        raise ValueError(
            f"guidance from {start} to {stop} contains none of {num_steps} steps, which lie at i/"
            f"{num_steps}; widen the interval, or set guidance_scale 1"
        )
    return np.where(inside, 1 + (scale - 1) * ramp, 1).astype(np.float32)


def guide(
    logits_fn: LogitsFn,
    tokens: Int[Array, "b l"],
    condition: Any,
    null_condition: Any,
    scale: Float[Array, ""],
) -> Float[Array, "b l v"]:
    """Return guided logits; where the scale is 1 the unconditional pass is not computed.

    Args:
        logits_fn: maps tokens and a condition to logits.
        tokens: current tokens.
        condition: pytree with a leading batch axis.
        null_condition: the same pytree, meaning "no condition".
        scale: guidance scale s of this step, may be traced.
    """

    def conditional():
        return logits_fn(tokens, condition)

    def doubled():
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition, null_condition)
        cond, uncond = jnp.split(logits_fn(jnp.concatenate([tokens, tokens]), both), 2)
        return uncond + scale * (cond - uncond)

    return jax.lax.cond(scale == 1, conditional, doubled)
