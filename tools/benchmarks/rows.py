"""The rows of the benchmark table: what each compares, at which batch and type, and its goals."""

import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from benchmarks import ours
from benchmarks.results import CPU, GPU, Result, gflops, seconds, summarise
from benchmarks.timing import Effort, measure
from jax.experimental.compilation_cache import compilation_cache

from maskgil_jax.build import tasks as build

SAMPLER = {
    "num_steps": 8,
    "schedule": "arccos",
    "guidance_scale": 2.0,
    "guidance_schedule": "linear",
    "temperature": 1.0,
    "gumbel_temperature": 4.5,
}


def training_rate(
    row: str, size: str, effort: Effort, *, batch_size: int, dtype: str, goals: Mapping[str, float]
) -> Iterator[Result]:
    """Measure the training step's achieved FLOP/s over the rate of a plain matmul."""
    config = ours.make_config(size, batch_size, dtype)
    times = measure({"step": ours.Ours(config).train}, dtype, effort)
    flops = batch_size * ours.training_flops(ours.model_config(config))
    rates = flops / times.seconds["step"]
    yield Result(
        row=row,
        name=f"training FLOP/s ÷ matmul ceiling, {size.upper()}",
        **summarise(rates / times.ceilings),
        goal=goals.get(size),
        times=times,
        figures={
            "batch": batch_size,
            "dtype": dtype,
            "step_seconds": seconds(times, "step"),
            "step_gflops": gflops(np.median(rates)),
            "images_per_second": round(batch_size / float(np.median(times.seconds["step"])), 2),
        },
    )


def against_torch(
    row: str,
    size: str,
    effort: Effort,
    *,
    batch_size: int,
    dtype: str,
    compiled: bool,
    goals: Mapping[str, float],
) -> Iterator[Result]:
    """Measure how many times as fast as PyTorch we are.

    Args:
        goals: `forward` and `train`, whichever are measured.
    """
    # PyTorch is an extra, and loading it takes seconds.
    from benchmarks.torch_peer import TorchSide

    config = ours.make_config(size, batch_size, dtype)
    model = ours.model_config(config)
    us = ours.Ours(config)
    peer = TorchSide(
        model,
        build.optimizer_config(config),
        smoothing=config.training.label_smoothing,
        condition_dropout=config.training.condition_dropout,
        batch=ours.draw_batch(config),
        device=_torch_device(),
        compiled=compiled,
    )
    flops = {"forward": ours.forward_flops(model), "train": ours.training_flops(model)}
    words = {"forward": "forward", "train": "training step"}
    baseline = f"PyTorch {'compiled' if compiled else 'eager'} {dtype}"
    for part, goal in goals.items():
        contenders = {"ours": getattr(us, part), "torch": getattr(peer, part)}
        times = measure(contenders, dtype, effort)
        work = batch_size * flops[part]
        yield Result(
            row=row,
            name=f"{words[part]}, speed ÷ {baseline}, {size.upper()}",
            **summarise(times.seconds["torch"] / times.seconds["ours"]),
            goal=goal,
            times=times,
            figures={
                "batch": batch_size,
                "dtype": dtype,
                **{f"{side}_seconds": seconds(times, side) for side in contenders},
                **{
                    f"{side}_gflops": gflops(work / np.median(times.seconds[side]))
                    for side in contenders
                },
            },
        )


def encoding_against_torch(row: str, size: str, effort: Effort, *, goal: float) -> Iterator[Result]:
    """Measure how many times as fast as PyTorch we turn images into tokens."""
    from benchmarks.torch_vq import LAYOUTS, TorchVQSide

    encodings = ours.TRIAL_ENCODINGS if size == ours.TRIAL_SIZE else ours.ENCODINGS
    for encoding in encodings:
        params, images = encoding.init_params(), encoding.draw_images()
        device = _torch_device()
        peers = {
            layout: TorchVQSide(encoding.config, params, images, layout=layout, device=device)
            for layout in LAYOUTS
        }
        yield _against_layouts(
            ours.OursVQ(encoding, params).encode,
            {layout: peer.encode for layout, peer in peers.items()},
            effort,
            row=row,
            name=f"encoding, images/s ÷ PyTorch eager float32, LlamaGen-VQ, {encoding}",
            goal=goal,
            batch_size=encoding.batch_size,
            settings={},
        )


def sampling_against_torch(
    row: str, size: str, effort: Effort, *, batch_size: int, goal: float
) -> Iterator[Result]:
    """Measure how many times as fast as PyTorch we turn labels into pixels."""
    from benchmarks.torch_sampling import TorchSampler
    from benchmarks.torch_vq import LAYOUTS

    us = ours.OursSampler(size, batch_size, SAMPLER)
    shared = (us.model, us.params, us.vq, us.vq_params)
    settings = {k: v for k, v in SAMPLER.items() if k != "guidance_schedule"}
    peers = {
        layout: TorchSampler(
            *shared, labels=us.labels, settings=settings, layout=layout, device=_torch_device()
        )
        for layout in LAYOUTS
    }
    yield _against_layouts(
        us.sample,
        {layout: peer.sample for layout, peer in peers.items()},
        effort,
        row=row,
        name=f"sampling with decode, images/s ÷ PyTorch eager float32, {size.upper()}",
        goal=goal,
        batch_size=batch_size,
        settings=SAMPLER,
    )


def _torch_device() -> str:
    return "cpu" if jax.default_backend() == CPU else "cuda"


def _against_layouts(
    us: Callable[[], Any],
    peers: Mapping[str, Callable[[], Any]],
    effort: Effort,
    *,
    row: str,
    name: str,
    goal: float,
    batch_size: int,
    settings: Mapping[str, Any],
) -> Result:
    """Compare images per second with PyTorch in each memory layout; the fastest one counts."""
    contenders = {"ours": us, **peers}
    times = measure(contenders, "float32", effort)
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
            "dtype": "float32",
            **settings,
            "torch_layout": best,
            **{f"{side}_images_per_second": float(f"{r:.4g}") for side, r in rates.items()},
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


def compile_time(
    row: str, size: str, effort: Effort, *, layers: tuple[int, int], goal: float
) -> Iterator[Result]:
    """Measure how the time to compile a training step grows with depth; no cache is used."""
    config = ours.make_config(size, 8, "float32")

    def compile_layers(num_layers: int) -> None:
        with config.unlocked():
            config.model.num_layers = num_layers
        ours.compile_step(config)

    few, many = layers
    contenders = {str(n): functools.partial(compile_layers, n) for n in layers}
    times = measure(contenders, "float32", effort)
    yield Result(
        row=row,
        name=f"compile time, {many} ÷ {few} layers of width {config.model.width}",
        **summarise(times.seconds[str(many)] / times.seconds[str(few)]),
        goal=goal,
        better="lower",
        times=times,
        figures={f"seconds_{n}_layers": seconds(times, str(n)) for n in layers},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table, measured by `run(row, size, effort)`."""

    run: Callable[[str, str, Effort], Iterator[Result]]
    summary: str
    backend: str | None = None
    needs_torch: bool = False


ROWS = {
    "1": Row(
        run=functools.partial(
            training_rate,
            batch_size=256,
            dtype="bfloat16",
            goals={"b": 0.45, "l": 0.52, "xl": 0.57, "xxl": 0.57},
        ),
        summary="training FLOP/s ÷ matmul ceiling, bfloat16, batch 256",
        backend=GPU,
    ),
    "1c": Row(
        run=functools.partial(training_rate, batch_size=8, dtype="float32", goals={"b": 0.60}),
        summary="training FLOP/s ÷ matmul ceiling, float32, batch 8",
    ),
    "2": Row(
        run=functools.partial(
            against_torch, batch_size=256, dtype="bfloat16", compiled=True, goals={"train": 1.05}
        ),
        summary="training speed ÷ PyTorch bfloat16 torch.compile, batch 256",
        backend=GPU,
        needs_torch=True,
    ),
    "7": Row(
        run=functools.partial(
            against_torch,
            batch_size=8,
            dtype="float32",
            compiled=False,
            goals={"forward": 1.7, "train": 1.3},
        ),
        summary="forward and training speed ÷ PyTorch eager float32, batch 8",
        needs_torch=True,
    ),
    "7e": Row(
        run=functools.partial(encoding_against_torch, goal=1.0),
        summary="images/s of the tokenizer's encoder ÷ PyTorch eager float32",
        needs_torch=True,
    ),
    "7s": Row(
        run=functools.partial(sampling_against_torch, batch_size=4, goal=1.6),
        summary="images/s from labels to pixels ÷ PyTorch eager float32, batch 4",
        needs_torch=True,
    ),
    "8": Row(
        run=functools.partial(sampler_tail, batch_size=4, goal=0.06),
        summary="sampler without its model ÷ guided forward, batch 4",
    ),
    "12c": Row(
        run=functools.partial(warm_cache, batch_size=4, goal=0.25),
        summary="compile time of the sampler, warm ÷ cold compilation cache",
    ),
    "12": Row(
        run=functools.partial(compile_time, layers=(12, 48), goal=1.5),
        summary="compile time at 48 ÷ 12 layers",
    ),
}


def check_rows(names: list[str]) -> None:
    """Raise a `ValueError` unless every row exists and can be measured on this machine."""
    if unknown := [name for name in names if name not in ROWS]:
        raise ValueError(f"rows {', '.join(unknown)} are unknown; allowed: {', '.join(ROWS)}")
    backend = jax.default_backend()
    fit = [name for name, row in ROWS.items() if row.backend in (None, backend)]
    if wrong := [name for name in names if name not in fit]:
        raise ValueError(
            f"rows {', '.join(wrong)} need a GPU, and this machine's devices are {backend}; "
            f"allowed here: {', '.join(fit)}"
        )
    missing = [name for name in names if ROWS[name].needs_torch]
    if missing and importlib.util.find_spec("torch") is None:
        raise ValueError(
            f"rows {', '.join(missing)} need PyTorch; pip install 'maskgil_jax[torch]'"
        )
