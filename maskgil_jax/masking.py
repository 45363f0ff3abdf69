"""Masking rules shared by training and decoding: schedules, mask draws, exact-k selection.

A *schedule* is a decreasing curve f on [0, 1] with f(0) = 1 and f(1) = 0: the share of tokens that
is masked at progress r. Training draws r at random; decoding walks along the curve.

Reference: MaskGIL, section 3 and Figure A.1; MaskGIT (Chang et al., 2022), section 3.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

SCHEDULES = ("root", "linear", "cosine", "square", "arccos")
FORMS = ("increments", "mask_ratio")
DRAWS = ("exact", "bernoulli")


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise a `ValueError` that names the nearest allowed value unless `value` is allowed."""
    allowed = tuple(allowed)
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} {value!r} is unknown; allowed: {', '.join(allowed)}.{hint}")


def mask_rate(schedule: str, r: Any) -> Any:
    """Return the masked share f(r) in [0, 1] at progress r in [0, 1].

    root 1 - sqrt(r), linear 1 - r, square 1 - r², cosine cos(pi r / 2), arccos 2 arccos(r) / pi.
    NumPy input stays in NumPy (and float64); JAX input may be traced.

    Raises:
        ValueError: if the schedule is unknown.
    """
    xp = jnp if isinstance(r, jax.Array) else np
    curves: dict[str, Callable] = {
        "root": lambda: 1 - xp.sqrt(r),
        "linear": lambda: 1 - r,
        "square": lambda: 1 - r**2,
        "cosine": lambda: xp.cos(r * (math.pi / 2)),
        "arccos": lambda: xp.arccos(r) / (math.pi / 2),
    }
    check_choice("schedule", schedule, SCHEDULES)
    return xp.clip(curves[schedule](), 0.0, 1.0)


def reveal_table(
    schedule: str, num_steps: int, seq_len: int, form: str = "increments"
) -> np.ndarray:
    """Return how many tokens each step reveals, for every possible number of unknown tokens.

    `increments` reveals counts proportional to f(1 - i/(T-1)), rounded, at least one while any
    token is left, the remainder in the last step. `mask_ratio` leaves ceil(f((i+1)/T)·N) tokens
    masked after step i. In both forms row N sums to N.

    Args:
        schedule: one of `SCHEDULES`.
        num_steps: T, in 1…seq_len.
        seq_len: largest number of unknown tokens.
        form: one of `FORMS`.

    Returns:
        int32 [seq_len + 1, num_steps]; row N is for N unknown tokens.

    Raises:
        ValueError: if a name is unknown or `num_steps` is out of range.

    Reference: MaskGIL section 3.2 (`mask_ratio`); released code, `utils/sampling` (`increments`).
    """
    check_choice("schedule form", form, FORMS)
    check_choice("schedule", schedule, SCHEDULES)
    if not 1 <= num_steps <= seq_len:
        raise ValueError(
            f"num_steps {num_steps} is out of range; allowed: 1 to {seq_len} (the sequence length)"
        )
    unknown = np.arange(seq_len + 1, dtype=np.int64)[:, None]
    step = np.arange(num_steps, dtype=np.float64)
    if form == "increments":
        weights = mask_rate(schedule, 1 - step / (num_steps - 1)) if num_steps > 1 else np.ones(1)
        counts = np.maximum(np.round(weights / weights.sum() * unknown), 1).astype(np.int64)
        revealed = np.minimum(np.cumsum(counts, axis=1), unknown)
    else:
        # The small shift keeps products that are whole in exact arithmetic from being rounded up.
        rate = mask_rate(schedule, (step + 1) / num_steps)
        revealed = unknown - np.ceil(rate * unknown - 1e-9).astype(np.int64)
    revealed[:, -1] = unknown[:, 0]
    return np.diff(revealed, axis=1, prepend=0).astype(np.int32)


def select_top_k(scores: Float[Array, "b l"], k: Int[Array, " b"]) -> Bool[Array, "b l"]:
    """Mark exactly `k[i]` positions of row i, those with the highest scores.

    Among equal scores the lower index wins, so the count is exact with ties too.

    Args:
        scores: any floats without NaN; -inf marks positions to be taken last.
        k: how many to select, 0…l.
    """
    order = jnp.argsort(-scores, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return rank < k[:, None]


def draw_mask(
    rng: PRNGKeyArray,
    batch_size: int,
    seq_len: int,
    *,
    schedule: str = "arccos",
    draw: str = "exact",
) -> Bool[Array, "b l"]:
    """Draw a training mask (true = masked) for every sequence of a batch.

    The rate of each sequence is f(r) with r uniform on [0, 1). `exact` masks ceil(f(r)·l) tokens,
    at least one, in a uniformly random subset; `bernoulli` decides for each token on its own and
    may mask none.

    Raises:
        ValueError: if a name is unknown.

    Reference: MaskGIL section 3.2; `bernoulli` is what its released trainer does.
    """
    check_choice("mask draw", draw, DRAWS)
    rate_rng, token_rng = jax.random.split(rng)
    rate = mask_rate(schedule, jax.random.uniform(rate_rng, (batch_size,)))
    noise = jax.random.uniform(token_rng, (batch_size, seq_len))
    if draw == "bernoulli":
        return noise < rate[:, None]
    count = jnp.clip(jnp.ceil(rate * seq_len), 1, seq_len).astype(jnp.int32)
    return select_top_k(noise, count)
