"""The rows about generation: against PyTorch, against the matmul's rate, over the image's size."""

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from benchmarks import ours
from benchmarks.comparison import against_layouts, torch_device
from benchmarks.results import Result, gflops, seconds, summarise
from benchmarks.timing import Effort, measure
from jax.experimental.compilation_cache import compilation_cache

SAMPLER: dict[str, Any] = {
    "num_steps": 8,
    "schedule": "arccos",
    "guidance_scale": 2.0,
    "guidance_schedule": "linear",
    "temperature": 1.0,
    "gumbel_temperature": 4.5,
}


def _peer_inputs(us: ours.OursSampler) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what PyTorch needs to do our work; linear guidance is the only one it has."""
    settings = {k: v for k, v in SAMPLER.items() if k != "guidance_schedule"}
    options = {"labels": us.labels, "settings": settings, "device": torch_device()}
    return (us.model, us.params, us.vq, us.vq_params), options


def sampling_against_torch(
    row: str,
    size: str,
    effort: Effort,
    *,
    batch_size: int,
    dtype: str,
    compiler: str | None,
    goals: Mapping[str, float],
) -> Iterator[Result]:
    """Measure how many times as fast as a vectorised PyTorch sampler we turn labels into pixels.

    Args:
        compiler: backend of `torch.compile`; eager if `None`.
    """
    # PyTorch is an extra, and loading it takes seconds.
    from benchmarks.torch_sampling import TorchSampler
    from benchmarks.torch_vq import LAYOUTS

    us = ours.OursSampler(size, batch_size, SAMPLER, dtype)
    shared, options = _peer_inputs(us)
    peer = TorchSampler(*shared, **options, layouts=tuple(LAYOUTS), dtype=dtype, compiler=compiler)
    baseline = f"PyTorch {'compiled' if compiler else 'eager'} {dtype}"
    yield against_layouts(
        us.sample,
        {layout: functools.partial(peer.sample, layout) for layout in LAYOUTS},
        effort,
        row=row,
        name=f"sampling with decode, images/s ÷ {baseline}, {size.upper()}",
        goal=goals.get(size),
        batch_size=batch_size,
        dtype=dtype,
        settings=SAMPLER,
    )


def sampling_against_released(
    row: str, size: str, effort: Effort, *, batch_size: int, autocast: bool, goal: float
) -> Iterator[Result]:
    """Measure how many times as fast we are as a sampler that works as the released trainer's.

    Args:
        autocast: whether its model computes in float16, as released.
    """
    from benchmarks.torch_sampling import NCHW, ReleasedSampler

    us = ours.OursSampler(size, batch_size, SAMPLER, "bfloat16")
    shared, options = _peer_inputs(us)
    peer = ReleasedSampler(*shared, **options, layouts=(NCHW,), autocast=autocast)
    yield against_layouts(
        us.sample,
        {NCHW: functools.partial(peer.sample, NCHW)},
        effort,
        row=row,
        name=f"sampling with decode, images/s ÷ the released trainer's way, {size.upper()}",
        goal=goal,
        batch_size=batch_size,
        dtype="bfloat16",
        settings=SAMPLER | {"torch_dtype": "float16 autocast" if autocast else "float32"},
    )


def sampling_rate(
    row: str, size: str, effort: Effort, *, batch_size: int, goals: Mapping[str, float]
) -> Iterator[Result]:
    """Measure the FLOP/s of sampling with decode over the rate of a plain matmul, in bfloat16.

    Two forward passes a step are credited, though the unconditional one is skipped without weight.
    """
    us = ours.OursSampler(size, batch_size, SAMPLER, "bfloat16")
    forward = ours.forward_flops(us.model)
    decode = ours.decode_flops(us.vq, us.model.grid_size)
    times = measure({"sampling": us.sample}, "bfloat16", effort)
    rates = batch_size * (2 * SAMPLER["num_steps"] * forward + decode) / times.seconds["sampling"]
    yield Result(
        row=row,
        name=f"sampling with decode, FLOP/s ÷ matmul ceiling, {size.upper()}",
        **summarise(rates / times.ceilings),
        goal=goals.get(size),
        times=times,
        figures={
            "batch": batch_size,
            "dtype": "bfloat16",
            **SAMPLER,
            "forward_gflop": gflops(forward),
            "decode_gflop": gflops(decode),
            "sampling_seconds": seconds(times, "sampling"),
            "sampling_gflops": gflops(np.median(rates)),
            "images_per_second": float(f"{batch_size / np.median(times.seconds['sampling']):.4g}"),
        },
    )


def sampler_tail(
    row: str, size: str, effort: Effort, *, batch_size: int, goal: float
) -> Iterator[Result]:
    """Measure what the sampler adds to the guided forward pass of a step."""
    tail = ours.SamplerTail(size, batch_size, SAMPLER)
    times = measure({"tail": tail.tail, "forward": tail.forward}, "float32", effort)
    yield Result(
        row=row,
        name=f"sampler's tail ÷ guided forward, {size.upper()}",
        **summarise(times.seconds["tail"] / times.seconds["forward"]),
        goal=goal,
        better="lower",
        times=times,
        figures={
            "batch": batch_size,
            "dtype": "float32",
            **{f"{name}_seconds": seconds(times, name) for name in ("tail", "forward")},
        },
    )


def warm_cache(
    row: str, size: str, effort: Effort, *, batch_size: int, goal: float
) -> Iterator[Result]:
    """Measure how long the sampler takes to compile when the compilation cache holds it."""
    settings = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in settings}

    compile_sampler = ours.sampler_compiler(size, batch_size, SAMPLER)

    def compile_in(folder: str) -> None:
        # JAX opens its cache once; another folder needs it closed.
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", folder)
        compile_sampler()

    def compile_cold() -> None:
        with tempfile.TemporaryDirectory() as empty:
            compile_in(empty)

    with tempfile.TemporaryDirectory() as filled:
        jax.config.update("jax_enable_compilation_cache", True)
        try:
            compile_in(filled)
            contenders: dict[str, Callable[[], Any]] = {
                "cold": compile_cold,
                "warm": functools.partial(compile_in, filled),
            }
            times = measure(contenders, "float32", effort)
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
    yield Result(
        row=row,
        name=f"compile time of the sampler, warm ÷ cold cache, {size.upper()}",
        **summarise(times.seconds["warm"] / times.seconds["cold"]),
        goal=goal,
        better="lower",
        times=times,
        figures={f"{name}_seconds": seconds(times, name) for name in contenders},
    )
