"""Measure what it gains to let a causal model begin the images of a masked one.

    python tools/measure_fusion.py --workdir runs/digits --ar_checkpoint runs/digits_ar \
        --out fusion.json --plot fusion.png

For every share of the tokens that the causal model draws: the figures of `evaluate` under the
protocol, the number of model calls for an image, and seconds for an image, pixels included, in
batches of several sizes (the least of some repetitions, compilation left out). The table has the
shape of the paper's Table 5, the plot that of its Figure 8. The figures are the report --out, which
is continued where it is unfinished; with the times they are beside it, in FILE.timed.json.

Reference: MaskGIL section 5.1.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maskgil_jax import generator
from maskgil_jax.checkpoints import write_text_atomically
from maskgil_jax.decoding.fusion import count_drawn
from maskgil_jax.evaluate import evaluate
from maskgil_jax.evaluation.protocols import HIGHER_IS_BETTER, LOWER_IS_BETTER


def count_steps(make: generator.ImageGenerator, share: float) -> int:
    """Return how often a model is called for an image: once a drawn token, once a masked step."""
    seq_len = make.model.config.seq_len
    drawn = count_drawn(share, seq_len)
    return drawn + (0 if drawn == seq_len else make.model.run.sampler.num_steps)


def time_images(
    make: generator.ImageGenerator, share: float, batch_size: int, repeats: int
) -> float:
    """Return seconds for an image, labels to pixels, in a batch; the least of `repeats`."""
    labels = np.arange(batch_size) % make.model.num_classes
    seconds = []
    for seed in range(repeats + 1):
        began = time.perf_counter()
        make(labels, seed=seed, ar_share=share)
        seconds.append((time.perf_counter() - began) / batch_size)
    return min(seconds[1:])  # the first call compiles


def measure(
    workdir: str,
    ar_checkpoint: str,
    out: pathlib.Path,
    *,
    protocol: str,
    metrics: Sequence[str],
    shares: Sequence[float],
    num_images: int | None,
    batch_sizes: Sequence[int],
    repeats: int,
    reference: str | None = None,
    inception: str | None = None,
) -> list[dict[str, Any]]:
    """Return a row for every share: share, steps, figures, seconds by batch size.

    Args:
        workdir: run or model directory of the masked model.
        ar_checkpoint: of the causal one.
        out: FILE.json, the report of `evaluate`.
        protocol: of the figures.
        metrics: which of them.
        shares: of the tokens that the causal model draws.
        num_images: samples; as many as the protocol takes if `None`.
        batch_sizes: images at a time while the time is taken.
        repeats: how often it is taken.
        reference: as `evaluate` takes it.
        inception: as `evaluate` takes it.

    Raises:
        ValueError: fewer than one repetition, batch size or image in a batch; or as `evaluate`.
    """
    if repeats < 1:
        raise ValueError(f"--repeats {repeats} must be at least 1")
    if min(batch_sizes, default=0) < 1:
        raise ValueError(f"--batch_sizes {list(batch_sizes)} must be one or more, each at least 1")
    report = evaluate(
        out,
        protocol=protocol,
        workdir=workdir,
        ar_checkpoint=ar_checkpoint,
        metrics=metrics,
        num_images=num_images,
        sweep=[f"ar_share={','.join(map(str, shares))}"],
        reference=reference,
        inception=inception,
    )
    rows = []
    makers = {
        size: generator.ImageGenerator.from_checkpoint(
            workdir, ar_checkpoint=ar_checkpoint, batch_size=size
        )
        for size in batch_sizes
    }
    for share, point in zip(shares, report["points"], strict=True):
        times = {size: time_images(make, share, size, repeats) for size, make in makers.items()}
        steps = count_steps(next(iter(makers.values())), share)
        rows.append({"share": share, "steps": steps, "figures": point["figures"], "seconds": times})
    return rows


def make_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    names = [name for name in rows[0]["figures"] if name in HIGHER_IS_BETTER | LOWER_IS_BETTER]
    sizes = list(rows[0]["seconds"])
    heads = ["AR share", "steps", *names, *(f"ms/image, batch {size}" for size in sizes)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"{row['share']:.0%}", str(row["steps"])]
        cells += [f"{row['figures'][name]:.3f}" for name in names]
        cells += [f"{1000 * row['seconds'][size]:.2f}" for size in sizes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draw every figure against the seconds for an image, a line for each batch size."""
    from matplotlib.figure import Figure  # an extra
    from matplotlib.ticker import LogLocator, NullFormatter

    names = [name for name in rows[0]["figures"] if name in HIGHER_IS_BETTER | LOWER_IS_BETTER]
    figure = Figure(figsize=(3.8 * len(names), 3.4), layout="constrained")
    for name, panel in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for size in rows[0]["seconds"]:
            x = [1000 * row["seconds"][size] for row in rows]
            y = [row["figures"][name] for row in rows]
            panel.plot(x, y, marker="o", markersize=4, label=f"batch {size}")
            for row, at in zip(rows, zip(x, y, strict=True), strict=True):
                panel.annotate(f"{row['share']:.0%}", at, fontsize=7)
        panel.set(xlabel="ms per image", ylabel=name, xscale="log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure as the command line says; print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workdir", required=True, help="run or model directory of the masked model")
    add("--ar_checkpoint", required=True, help="of the causal model")
    add("--out", required=True, type=pathlib.Path, help="report of the figures, FILE.json")
    add("--plot", type=pathlib.Path, help="figures against time: FILE.png, .svg or .pdf")
    add("--protocol", default="digits", help="as in python -m maskgil_jax.evaluate --help")
    add("--metrics", default="fid,svm", help="as there")
    add("--reference", help="as there")
    add("--inception", help="as there")
    add("--shares", default="1,0.75,0.5,0.25,0", help="of the tokens, each 0 to 1")
    add("--num_images", type=int, help="samples; default: as many as the protocol takes")
    add("--batch_sizes", default="1,64", help="images at a time while the time is taken")
    add("--repeats", type=int, default=5, help="how often the time is taken")
    args = parser.parse_args(arguments)
    try:
        rows = measure(
            args.workdir,
            args.ar_checkpoint,
            args.out,
            protocol=args.protocol,
            metrics=args.metrics.split(","),
            shares=[float(share) for share in args.shares.split(",")],
            num_images=args.num_images,
            batch_sizes=[int(size) for size in args.batch_sizes.split(",")],
            repeats=args.repeats,
            reference=args.reference,
            inception=args.inception,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    timed = args.out.with_suffix(".timed.json")
    write_text_atomically(timed, json.dumps(rows, indent=2) + "\n")
    if args.plot is not None:
        draw(rows, args.plot)
    print(make_table(rows), end="")


if __name__ == "__main__":
    main()
