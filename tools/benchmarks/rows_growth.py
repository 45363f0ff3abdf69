"""The rows about larger images: time and memory from one grid to one of four times the tokens."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from benchmarks import ours
from benchmarks.results import CPU, Result, seconds, summarise
from benchmarks.rows_sampling import SAMPLER
from benchmarks.timing import Effort, measure

# Steps cost the same but for guidance: one without it and one with it say how they grow.
FEW_STEPS = SAMPLER | {"num_steps": 2}


def sampling_growth(
    row: str, size: str, effort: Effort, *, batch_sizes: Mapping[str, int], goal: float
) -> Iterator[Result]:
    """Measure how time and memory of sampling codes grow, over the growth of the operations.

    Args:
        batch_sizes: JAX's backend → images; bfloat16 on accelerators, float32 on a CPU.
        goal: of both.
    """
    batch_size, dtype = _scale(batch_sizes)
    model = ours.model_config(ours.make_config(size, batch_size, dtype))
    params = ours.init_params(model)
    small, large = (
        ours.SampledGrid(model, params, grid, batch_size, FEW_STEPS)
        for grid in _grids(model.grid_size)
    )
    figures = {"batch": batch_size, "dtype": dtype, **FEW_STEPS}
    yield from _growth(row, f"sampling, {size.upper()}", small, large, effort, figures, goal)


def training_growth(
    row: str, size: str, effort: Effort, *, batch_sizes: Mapping[str, int], goal: float
) -> Iterator[Result]:
    """Measure the same of a training step; the arguments are those of `sampling_growth`."""
    batch_size, dtype = _scale(batch_sizes)
    config = ours.make_config(size, batch_size, dtype)
    small, large = (ours.TrainedGrid(config, grid) for grid in _grids(config.model.grid_size))
    figures = {"batch": batch_size, "dtype": dtype}
    yield from _growth(row, f"training step, {size.upper()}", small, large, effort, figures, goal)


def _scale(batch_sizes: Mapping[str, int]) -> tuple[int, str]:
    backend = jax.default_backend()
    return batch_sizes[backend], "float32" if backend == CPU else "bfloat16"


def _grids(grid_size: tuple[int, int]) -> list[tuple[int, int]]:
    gh, gw = grid_size
    return [(gh, gw), (2 * gh, 2 * gw)]


def _growth(
    row: str,
    what: str,
    small: ours.SampledGrid | ours.TrainedGrid,
    large: ours.SampledGrid | ours.TrainedGrid,
    effort: Effort,
    figures: Mapping[str, Any],
    goal: float,
) -> Iterator[Result]:
    sides = {"small": small, "large": large}
    times = measure({name: side.run for name, side in sides.items()}, figures["dtype"], effort)
    work = large.flops / small.flops
    shared = {**figures, "flops_ratio": round(work, 3)}
    ends = f"{large.length} ÷ {small.length} tokens, over the FLOP ratio"
    growth = times.seconds["large"] / times.seconds["small"]
    yield Result(
        row=row,
        name=f"time of {what}, {ends}",
        **summarise(growth / work),
        goal=goal,
        better="lower",
        times=times,
        figures={
            **shared,
            "time_ratio": round(float(np.median(growth)), 3),
            **{f"seconds_{side.length}_tokens": seconds(times, n) for n, side in sides.items()},
        },
    )
    memory = large.temp_bytes / small.temp_bytes
    yield Result(
        row=row,
        name=f"temporary memory of {what}, {ends}",
        ratio=memory / work,
        goal=goal,
        better="lower",
        spread=0.0,
        times=None,
        figures={
            **shared,
            "tokens_ratio": large.length / small.length,
            "memory_ratio": round(memory, 3),
            **{f"temp_bytes_{side.length}_tokens": side.temp_bytes for side in sides.values()},
        },
    )
