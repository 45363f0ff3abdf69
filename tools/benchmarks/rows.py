"""The rows of the benchmark table: what each compares, at which batch and type, and its goals."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from benchmarks import ours, rows_causal, rows_fusion, rows_growth, rows_sampling
from benchmarks.comparison import against_layouts, torch_device
from benchmarks.results import CPU, GPU, Result, gflops, seconds, summarise
from benchmarks.timing import Effort, measure

from maskgil_jax import convert
from maskgil_jax.build import tasks as build
from maskgil_jax.models.sizes import SIZES


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
        device=torch_device(),
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
        device = torch_device()
        peers = {
            layout: TorchVQSide(encoding.config, params, images, layout=layout, device=device)
            for layout in LAYOUTS
        }
        yield against_layouts(
            ours.OursVQ(encoding, params).encode,
            {layout: peer.encode for layout, peer in peers.items()},
            effort,
            row=row,
            name=f"encoding, images/s ÷ PyTorch eager float32, LlamaGen-VQ, {encoding}",
            goal=goal,
            batch_size=encoding.batch_size,
            dtype="float32",
            settings={},
        )


def inception_against_torch(
    row: str, size: str, effort: Effort, *, goal: float
) -> Iterator[Result]:
    """Measure how many times as fast as PyTorch we extract the features of FID."""
    from benchmarks.torch_inception import TorchInceptionSide
    from benchmarks.torch_vq import LAYOUTS

    us = ours.OursInception(size)
    state = convert.export_state_dict(us.config.family, us.config, us.params)
    peers = {
        layout: TorchInceptionSide(
            us.config, state, us.images, layout=layout, device=torch_device()
        )
        for layout in LAYOUTS
    }
    side = us.images.shape[1]
    yield against_layouts(
        us.extract,
        {layout: peer.extract for layout, peer in peers.items()},
        effort,
        row=row,
        name=f"Inception, images/s ÷ PyTorch eager float32, {side}×{side} px",
        goal=goal,
        batch_size=len(us.images),
        dtype="float32",
        settings={},
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
    "3": Row(
        run=functools.partial(
            rows_sampling.sampling_against_torch,
            batch_size=64,
            dtype="bfloat16",
            compiler="inductor",
            goals={"b": 1.15, "l": 1.10, "xl": 1.10, "xxl": 1.10},
        ),
        summary="images/s from labels to pixels ÷ PyTorch bfloat16 torch.compile, batch 64",
        backend=GPU,
        needs_torch=True,
    ),
    "3r": Row(
        run=functools.partial(
            rows_sampling.sampling_against_released, batch_size=64, autocast=True, goal=2.0
        ),
        summary="the same ÷ a sampler that works as the released trainer's (float16 autocast)",
        backend=GPU,
        needs_torch=True,
    ),
    "4": Row(
        run=functools.partial(
            rows_sampling.sampling_rate,
            batch_size=64,
            goals={"b": 0.48, "l": 0.56, "xl": 0.62, "xxl": 0.64},
        ),
        summary="FLOP/s from labels to pixels ÷ matmul ceiling, bfloat16, batch 64",
        backend=GPU,
    ),
    "5": Row(
        run=functools.partial(
            rows_causal.against_masked,
            batch_sizes={CPU: (1, 2, 8), GPU: (1, 8, 16, 32, 64)},
            goals={"l": {1: 6.0, 8: 1.3}},
        ),
        summary="time of LlamaGen's codes ÷ MaskGIL's, by batch; where they break even",
    ),
    "6": Row(
        run=functools.partial(
            rows_causal.reading_rate,
            batch_sizes={CPU: (1, 4), GPU: (1, 64)},
            goals={"l": {1: 0.35, 64: 0.45}},
        ),
        summary="bytes/s of LlamaGen's decoding ÷ copying",
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
    "7a": Row(
        run=functools.partial(
            rows_causal.decoding_against_torch,
            batch_sizes=(1, 4),
            dtype="float32",
            goals=dict.fromkeys(SIZES, 1.2),
        ),
        summary="AR decoding ÷ PyTorch eager float32 with a static cache",
        needs_torch=True,
    ),
    "7e": Row(
        run=functools.partial(encoding_against_torch, goal=1.0),
        summary="images/s of the tokenizer's encoder ÷ PyTorch eager float32",
        needs_torch=True,
    ),
    "7i": Row(
        run=functools.partial(inception_against_torch, goal=1.0),
        summary="images/s of FID's InceptionV3 ÷ PyTorch eager float32, batch 16",
        needs_torch=True,
    ),
    "7s": Row(
        run=functools.partial(
            rows_sampling.sampling_against_torch,
            batch_size=4,
            dtype="float32",
            compiler=None,
            goals=dict.fromkeys(SIZES, 1.6),
        ),
        summary="images/s from labels to pixels ÷ PyTorch eager float32, batch 4",
        needs_torch=True,
    ),
    "8": Row(
        run=functools.partial(rows_sampling.sampler_tail, batch_size=4, goal=0.06),
        summary="sampler without its model ÷ guided forward, batch 4",
    ),
    "11": Row(
        run=functools.partial(
            rows_growth.sampling_growth, batch_sizes={CPU: 1, GPU: 64}, goal=1.05
        ),
        summary="time and memory of sampling at 4 times the tokens, over the FLOP ratio",
    ),
    "11t": Row(
        run=functools.partial(rows_growth.training_growth, batch_sizes={CPU: 2, GPU: 8}, goal=1.05),
        summary="the same of a training step",
    ),
    "12c": Row(
        run=functools.partial(rows_sampling.warm_cache, batch_size=4, goal=0.25),
        summary="compile time of the sampler, warm ÷ cold compilation cache",
    ),
    "12": Row(
        run=functools.partial(compile_time, layers=(12, 48), goal=1.5),
        summary="compile time at 48 ÷ 12 layers",
    ),
    "13": Row(
        run=functools.partial(rows_fusion.text_fusion, goals={"xl": 3.6}),
        summary="codes from a prompt: time of Lumina-mGPT 7B alone ÷ a quarter of it and MaskGIL",
        backend=GPU,
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
