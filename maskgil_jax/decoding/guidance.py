"""Classifier-free guidance, `uncond + s · (cond - uncond)`, with s a schedule over the steps.

Reference: MaskGIL section 3.2; released code (linear ramp); Gao et al., 2023 (power-cosine);
Kynkäänniemi et al., 2024 (guidance in an interval only).
"""

import numpy as np
from jaxtyping import Array, Float

from maskgil_jax.masking import check_choice

GUIDANCE_SCHEDULES = ("constant", "linear", "power_cosine")


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


def guided_steps(
    schedule: str, scale: float, num_steps: int, interval: tuple[float, float] = (0.0, 1.0)
) -> tuple[bool, ...]:
    """Return which steps have another scale than 1, but for how it is rounded.

    All scales but 1 give the same answer, so that they can share a compiled program.
    """
    start, stop = interval
    first = 1 if schedule == "linear" and num_steps > 1 else 0
    return tuple(
        scale != 1 and i >= first and start <= i / num_steps < stop for i in range(num_steps)
    )


def guide(
    cond: Float[Array, "b *n v"], uncond: Float[Array, "b *n v"], scale: Float[Array, ""]
) -> Float[Array, "b *n v"]:
    """Return guided logits.

    Args:
        cond: logits with the condition.
        uncond: logits without.
        scale: guidance scale s of this step, may be traced.
    """
    return uncond + scale * (cond - uncond)
