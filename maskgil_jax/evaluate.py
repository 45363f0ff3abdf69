r"""Evaluate samples: `python -m maskgil_jax.evaluate --workdir DIR --protocol digits --out X.json`.

Measures samples of a run (`--workdir`), of an `.npz` or of a folder (`--samples`) as a protocol
says, writes a JSON report and prints a row of Markdown. Started again after a kill, a command
goes on, and in the same environment its report is the same to the last byte. docs/evaluation.md
explains the protocols.

    python -m maskgil_jax.evaluate --workdir runs/b --protocol adm --inception pt_inception.pth \
        --reference VIRTUAL_imagenet256_labeled.npz --out b.json
    python -m maskgil_jax.evaluate --samples b.npz --protocol adm … --out b.json
    python -m maskgil_jax.evaluate --workdir runs/digits --protocol digits --out sweep.json \
        --sweep guidance_scale=1,1.5,2 --sweep num_steps=4,8,16 --plot sweep.png

Every `--sweep` is a sampler setting with the values it takes; all combinations are measured. The
table is written beside the report, as FILE.md. Sampler settings are those of
`python -m maskgil_jax.sample`, and those not given are the run's.
"""

import argparse
import functools
import pathlib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maskgil_jax import bulk, compilation, generator, sharding
from maskgil_jax.checkpoints import write_text_atomically
from maskgil_jax.evaluation import job, sweeps
from maskgil_jax.evaluation.image_sets import GeneratedImages, ImageSet, draw_labels, open_images
from maskgil_jax.evaluation.nets import open_net
from maskgil_jax.evaluation.protocols import LABELS, PROTOCOLS, Protocol, find_protocol
from maskgil_jax.evaluation.references import Reference, open_reference


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m maskgil_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", help="run or model directory whose samples are measured")
    add("--samples", help="samples instead: FILE.npz with arr_0, or a folder of pictures")
    add("--protocol", required=True, help=f"one of {', '.join(PROTOCOLS)}")
    add("--reference", help="what they are compared with: FILE.npz, or a folder of pictures")
    add("--inception", help="weights: pt_inception-2015-12-05-6726825d.pth, or a model directory")
    add("--metrics", help="such as fid,is,precision,recall; default: the protocol's")
    add("--num_images", type=int, help="samples; default: as many as the protocol takes")
    add("--num_per_class", type=int, help="the same, as samples of each class")
    add("--labels", help=f"of samples of a run, {' or '.join(LABELS)}; default: the protocol's")
    add("--seed", type=int, help="of all images, and of random labels; default: 0")
    add("--batch_size", type=int, default=64, help="images at a time")
    add("--size", help="HxW of samples of a run in pixels; default: as trained")
    add("--tokenizer", help="tokenizer to use instead of the run's")
    add("--ar_checkpoint", help="run or model directory of a causal model that begins every image")
    add("--image_size", type=int, help="side to which pictures of folders are cropped")
    add("--convert_to_rgb", action="store_true", help="take grey, CMYK and transparent files")
    add("--out", required=True, type=pathlib.Path, help="report to write, FILE.json")
    add("--sweep", action="append", default=[], metavar="FIELD=VALUES", help="a setting to vary")
    add("--plot", type=pathlib.Path, help="figures over what varies: FILE.png, .svg or .pdf")
    add("--compilation_cache", help="directory, or empty for none; default as in sample")
    sampler = parser.add_argument_group("sampler", "as in python -m maskgil_jax.sample --help")
    for name, kind in sweeps.TYPES.items():
        if kind is bool:
            sampler.add_argument(f"--{name}", action="store_true", default=None)
            sampler.add_argument(f"--no{name}", action="store_false", dest=name, default=None)
        else:
            read = functools.partial(_read, name)
            sampler.add_argument(f"--{name}", type=read, metavar=kind.__name__)
    return parser


def evaluate(
    out: pathlib.Path,
    *,
    protocol: str,
    workdir: str | None = None,
    samples: str | None = None,
    reference: str | None = None,
    inception: str | None = None,
    metrics: Sequence[str] | None = None,
    num_images: int | None = None,
    num_per_class: int | None = None,
    labels: str | None = None,
    seed: int | None = None,
    batch_size: int = 64,
    size: tuple[int, int] | None = None,
    tokenizer: str | None = None,
    ar_checkpoint: str | None = None,
    image_size: int | None = None,
    convert_to_rgb: bool = False,
    sweep: Sequence[str] = (),
    plot: pathlib.Path | None = None,
    command: str = "",
    **sampler: Any,
) -> dict[str, Any]:
    """Measure, write the report, its table and plot, and return the report.

    The arguments are those of the command line; `sampler` are fields of `SamplerConfig`, or of
    `AutoregressiveConfig` for a causal model, and `ar_share` and with `ar_` in front fields of the
    latter for `ar_checkpoint`; `None` means no change.

    Raises:
        ValueError: if a setting is not allowed, files are damaged or do not fit the protocol, or
            the report was begun with other settings, or is finished with others.
        FileNotFoundError: if there is no such file or model.
    """
    began = time.monotonic()
    if workdir is not None and samples is not None:
        raise ValueError(
            f"both --workdir {workdir} and --samples {samples} are given; samples are made or "
            "given: leave one out"
        )
    if workdir is None and samples is None:
        raise ValueError("give the samples: one of --workdir DIR and --samples FILE.npz or FOLDER")
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size} must be at least 1")
    given = {name: value for name, value in sampler.items() if value is not None}
    varied = sweeps.parse_sweeps(sweep, given)
    sweeps.check_plot(plot, varied)
    job.check_out(out)
    made_only: dict[str, Any] = {
        **given,
        "sweep": sweep or None,
        "num_per_class": num_per_class,
        "labels": labels,
        "seed": seed,
        "size": size,
        "tokenizer": tokenizer,
        "ar_checkpoint": ar_checkpoint,
    }
    if samples is not None and (names := [n for n, v in made_only.items() if v is not None]):
        raise ValueError(
            f"--{names[0]} is about generating, but --samples {samples} exist already; give "
            "--workdir, or leave it out"
        )
    if num_images is not None and num_per_class is not None:
        raise ValueError("--num_images and --num_per_class exclude each other")
    bulk.say(f"protocol {protocol}: opening {samples if workdir is None else workdir}")
    make = None
    if workdir is not None:
        make = generator.ImageGenerator.from_checkpoint(
            workdir,
            tokenizer=tokenizer,
            ar_checkpoint=ar_checkpoint,
            batch_size=batch_size,
            mesh=sharding.make_mesh({"data": -1}),
        )
        if num_per_class is not None:
            num_images = num_per_class * make.model.num_classes
    chosen = find_protocol(
        protocol,
        metrics=None if metrics is None else tuple(metrics),
        num_images=num_images,
        labels=labels,
    )
    net = open_net(chosen.net, inception)
    folders = [path for path in (samples, reference) if path and pathlib.Path(path).is_dir()]
    if (image_size is not None or convert_to_rgb) and not folders:
        raise ValueError(
            "--image_size and --convert_to_rgb are for folders of pictures, and none is given"
        )
    if image_size is not None and image_size < 1:
        raise ValueError(f"--image_size {image_size} must be at least 1")
    crop = {"image_size": image_size, "convert": convert_to_rgb}
    whole = {"image_size": None, "convert": False}
    # The inception score looks at the samples alone.
    compared = Reference(settings={"kind": "none", "count": None}, image_shape=None)
    if reference is not None or chosen.split is not None or set(chosen.metrics) != {"is"}:
        crops = crop if reference in folders else whole
        compared = open_reference(chosen, net, reference, **crops)
    points = sweeps.grid(varied)
    sets: list[ImageSet]
    if make is None:
        assert samples is not None
        sets = [open_images(samples, labelled=True, **(crop if samples in folders else whole))]
    else:
        sets = [
            _generated(make, chosen, seed=seed or 0, size=size, **given, **changes)
            for changes in points
        ]
    evaluation = job.Evaluation(
        protocol=chosen,
        net=net,
        reference=compared,
        samples=sets,
        points=points,
        sweep=varied,
        out=out,
        batch_size=batch_size,
        command=command,
    )
    is_finished = out.exists()  # one of other settings is an error
    report = job.run(evaluation, say=functools.partial(_say_notes, set()))
    table = sweeps.make_table(report)
    if varied:
        write_text_atomically(out.with_suffix(".md"), table)
    if plot is not None:
        sweeps.draw(report, plot)
    print(table, end="", flush=True)
    if not is_finished:
        bulk.say(f"{out}: {time.monotonic() - began:.1f} s")
    return report


def _generated(
    make: generator.ImageGenerator,
    protocol: Protocol,
    *,
    seed: int,
    size: tuple[int, int] | None,
    **sampler: Any,
) -> GeneratedImages:
    (gh, gw), factor = make.model.config.grid_size, make.tokenizer.spec.downsample_factor
    classes = make.model.num_classes
    labels: np.ndarray = draw_labels(protocol.labels, protocol.num_images, classes, seed)
    return GeneratedImages(
        make, labels, seed=seed, size=size or (gh * factor, gw * factor), sampler=sampler
    )


def _say_notes(told: set[str], point: Mapping[str, Any]) -> None:
    """Say the figures of a point of a sweep, and the notes that were not told before."""
    if swept := " ".join(f"{name}={value}" for name, value in point.get("swept", {}).items()):
        figures = ", ".join(f"{name} {value:.4g}" for name, value in point["figures"].items())
        bulk.say(f"{swept}: {figures}")
    for note in point["notes"]:
        if note not in told:
            bulk.say(f"note: {note}")
    told.update(point["notes"])


def _read(name: str, text: str) -> Any:
    try:
        return sweeps.parse_value(name, text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_size(text: str) -> tuple[int, int]:
    """Read HxW.

    Raises:
        ValueError: if the text is something else.
    """
    height, _, width = text.replace("×", "x").partition("x")
    if not (height.strip().isdecimal() and width.strip().isdecimal()):
        raise ValueError(f"--size {text!r} is no size; write height and width in pixels: 256x384")
    return int(height), int(width)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and evaluate; end with one clear line where the input is at fault."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = vars(build_parser().parse_args(arguments))
    try:
        compilation.use_cache(options.pop("compilation_cache"))
        if options["size"] is not None:
            options["size"] = parse_size(options["size"])
        if options["metrics"] is not None:
            options["metrics"] = [name.strip() for name in options["metrics"].split(",")]
        command = shlex.join(["python", "-m", "maskgil_jax.evaluate", *arguments])
        evaluate(command=command, **options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
