"""The rows about autoregression: against our masked model, memory's bandwidth, and PyTorch."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from benchmarks.comparison import against_layouts, torch_device
from benchmarks.ours_causal import Codes, read_bytes
from benchmarks.results import CPU, GPU, Result, seconds, summarise
from benchmarks.rows_sampling import SAMPLER
from benchmarks.timing import Copy, Effort, measure

CAUSAL_SAMPLER: dict[str, Any] = {"guidance_scale": 2.0, "temperature": 1.0}


def against_masked(
    row: str,
    size: str,
    effort: Effort,
    *,
    batch_sizes: Mapping[str, tuple[int, ...]],
    goals: Mapping[str, Mapping[int, float]],
) -> Iterator[Result]:
    """Measure how many times as long as MaskGIL's codes those of LlamaGen take.

    Every line tells the batch from which on LlamaGen makes more images per second, or `null` if
    that is none between the smallest and the largest.

    Args:
        batch_sizes: JAX's backend → numbers of images.
        goals: size → batch → ratio; on a GPU.
    """
    dtype, batches = _type(), batch_sizes[jax.default_backend()]
    sides = {
        "llamagen": Codes("llamagen", size, CAUSAL_SAMPLER, dtype),
        "maskgil": Codes("maskgil", size, SAMPLER, dtype),
    }
    contenders = {
        f"{name}_{batch}": functools.partial(side.draw, batch)
        for batch in batches
        for name, side in sides.items()
    }
    times = measure(contenders, dtype, effort)
    ratios = {b: times.seconds[f"llamagen_{b}"] / times.seconds[f"maskgil_{b}"] for b in batches}
    even = break_even({batch: float(np.median(ratio)) for batch, ratio in ratios.items()})
    for batch in batches:
        yield Result(
            row=row,
            name=f"codes, time of LlamaGen ÷ MaskGIL in 8 steps, {size.upper()}, batch {batch}",
            **summarise(ratios[batch]),
            goal=_goal(goals, size, batch),
            times=times,
            figures={
                "batch": batch,
                "dtype": dtype,
                "guidance_scale": SAMPLER["guidance_scale"],
                **{f"{name}_seconds": seconds(times, f"{name}_{batch}") for name in sides},
                "break_even_batch": None if even is None else round(even, 2),
            },
        )


def break_even(ratios: Mapping[int, float]) -> float | None:
    """Return the batch at which a ratio falls to 1, between two that were measured; or `None`.

    Between them the ratio is taken for a power of the batch.
    """
    for low, high in itertools.pairwise(sorted(ratios)):
        if ratios[low] >= 1 > ratios[high]:
            share = math.log(ratios[low]) / math.log(ratios[low] / ratios[high])
            return low * (high / low) ** share
    return None


def reading_rate(
    row: str,
    size: str,
    effort: Effort,
    *,
    batch_sizes: Mapping[str, tuple[int, ...]],
    goals: Mapping[str, Mapping[int, float]],
) -> Iterator[Result]:
    """Measure how fast decoding reads parameters and cache, over the rate at which memory copies.

    The arguments are those of `against_masked`.
    """
    dtype = _type()
    side = Codes("llamagen", size, CAUSAL_SAMPLER, dtype)
    for batch in batch_sizes[jax.default_backend()]:
        copy = Copy()
        contenders: dict[str, Callable[[], Any]] = {
            "decoding": functools.partial(side.draw, batch),
            "copy": copy,
        }
        times = measure(contenders, dtype, effort)
        # Guidance doubles the sequences.
        rates = {
            "decoding": read_bytes(side.model, 2 * batch) / times.seconds["decoding"],
            "copy": copy.bytes / times.seconds["copy"],
        }
        yield Result(
            row=row,
            name=f"LlamaGen's decoding, bytes/s ÷ copying, {size.upper()}, batch {batch}",
            **summarise(rates["decoding"] / rates["copy"]),
            goal=_goal(goals, size, batch),
            times=times,
            figures={
                "batch": batch,
                "dtype": dtype,
                **CAUSAL_SAMPLER,
                "decoding_seconds": seconds(times, "decoding"),
                **{
                    f"{name}_gbytes_per_second": float(f"{np.median(rate) / 1e9:.4g}")
                    for name, rate in rates.items()
                },
            },
        )


def decoding_against_torch(
    row: str,
    size: str,
    effort: Effort,
    *,
    batch_sizes: tuple[int, ...],
    dtype: str,
    goals: Mapping[str, float],
) -> Iterator[Result]:
    """Measure how many times as fast as PyTorch with a static cache we draw codes one by one."""
    # PyTorch is an extra, and loading it takes seconds.
    from benchmarks.torch_causal import READS, TorchCausalSide

    us = Codes("llamagen", size, CAUSAL_SAMPLER, dtype)
    for batch in batch_sizes:
        peer = TorchCausalSide(
            us.model,
            us.params,
            labels=us.labels(batch),
            settings=CAUSAL_SAMPLER,
            device=torch_device(),
        )
        yield against_layouts(
            functools.partial(us.draw, batch),
            {reads: functools.partial(peer.sample_tokens, reads) for reads in READS},
            effort,
            row=row,
            name=(
                f"AR decoding, images/s ÷ PyTorch eager {dtype}, LlamaGen-{size.upper()}, "
                f"batch {batch}"
            ),
            goal=goals.get(size),
            batch_size=batch,
            dtype=dtype,
            settings=CAUSAL_SAMPLER,
        )


def _type() -> str:
    return "float32" if jax.default_backend() == CPU else "bfloat16"


def _goal(goals: Mapping[str, Mapping[int, float]], size: str, batch: int) -> float | None:
    return goals.get(size, {}).get(batch) if jax.default_backend() == GPU else None
