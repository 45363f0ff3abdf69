"""Our images per second against those of PyTorch, on one device and in its faster layout."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from benchmarks.results import CPU, Result, summarise
from benchmarks.timing import Effort, measure


def torch_device() -> str:
    """Return PyTorch's name of the device that JAX computes on."""
    return "cpu" if jax.default_backend() == CPU else "cuda"


def against_layouts(
    us: Callable[[], Any],
    peers: Mapping[str, Callable[[], Any]],
    effort: Effort,
    *,
    row: str,
    name: str,
    goal: float | None,
    batch_size: int,
    dtype: str,
    settings: Mapping[str, Any],
) -> Result:
    """Compare images per second with PyTorch in each memory layout; the fastest one counts."""
    contenders = {"ours": us, **peers}
    times = measure(contenders, dtype, effort)
    best = min(peers, key=lambda layout: np.median(times.seconds[layout]))
    rates = {side: batch_size / np.median(times.seconds[side]) for side in contenders}
    return Result(
        row=row,
        name=name,
        **summarise(times.seconds[best] / times.seconds["ours"]),
        goal=goal,
        times=times,
        figures={
            "batch": batch_size,
            "dtype": dtype,
            **settings,
            "torch_layout": best,
            **{f"{side}_images_per_second": float(f"{r:.4g}") for side, r in rates.items()},
        },
    )
