"""Measure a digits run at many sampler settings and print a Markdown table.

    python tools/sweep_digits.py --workdir runs/digits \
        --sampler order=halton --sampler remasking=cap,remasking_strength=0.1 \
        --sweep num_steps=4,8,16 --plot sweep.png

Every `--sampler` is a set of settings, named in its row, and every `--sweep` a setting with the
values it takes; all combinations are measured. A setting is given once. What is left out is as in
the run. Every row is `--num_samples` images, measured as the run's last line is. The plot (extra
`plots`) needs exactly one `--sweep`, its axis. RESULTS.md has tables made from its output.
"""

import argparse
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import maskgil_jax
from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.evals.digits import NEIGHBOURS, digits_report
from maskgil_jax.masking import check_choice

COLUMNS = ("agreement", "precision", "recall", "novelty")
TYPES = {field.name: field.type for field in dataclasses.fields(maskgil_jax.SamplerConfig)}
THE_RUNS = "as in the run"
MIN_SAMPLES = NEIGHBOURS + 1  # an image and its neighbours

Sets = dict[str, dict[str, Any]]
Sweeps = list[list[dict[str, Any]]]


def parse_value(field: str, text: str) -> Any:
    """Read a value of a sampler setting.

    Raises:
        ValueError: if there is no such setting, or the text is no such value.
    """
    check_choice("sampler setting", field, TYPES)
    kind: Any = TYPES[field]
    if kind is bool:
        check_choice(field, text, ("true", "false"))
        return text == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{field}={text}: {text!r} is no {kind.__name__}") from error


def parse_settings(text: str) -> dict[str, Any]:
    """Read `field=value,field=value`; the empty text changes nothing.

    Raises:
        ValueError: if a part is no such pair, a field or value is unknown, or a field comes twice.
    """
    settings: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        field, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"--sampler {text!r}: write field=value, such as order=halton")
        if field in settings:
            raise ValueError(f"--sampler {text!r} gives {field} twice; give it once")
        settings[field] = parse_value(field, value)
    return settings


def parse_sweep(text: str) -> list[dict[str, Any]]:
    """Read `field=value,value,value` into one change for each value.

    Raises:
        ValueError: if it is no such list, or the field or a value is unknown.
    """
    field, separator, values = text.partition("=")
    if not separator:
        raise ValueError(f"--sweep {text!r}: write field=value,value, such as num_steps=4,8")
    return [{field: parse_value(field, value)} for value in values.split(",")]


def parse_plan(samplers: Sequence[str], sweeps: Sequence[str]) -> tuple[Sets, Sweeps]:
    """Read what is to be measured: sets of settings by their names, and changes for each sweep.

    Raises:
        ValueError: if one cannot be read, or a field is given where another would override it.
    """
    sets = {text or THE_RUNS: parse_settings(text) for text in samplers or [""]}
    changes = [parse_sweep(text) for text in sweeps]
    fields = [next(iter(values[0])) for values in changes]
    for place, field in enumerate(fields):
        if field in fields[:place]:
            raise ValueError(f"two --sweep vary {field}; give all its values in one")
        for name, settings in sets.items():
            if field in settings:
                raise ValueError(
                    f"--sampler {name!r} sets {field}, which --sweep {sweeps[place]!r} varies; "
                    "give it in one of them"
                )
    return sets, changes


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the table, a row as soon as it is measured, and return its rows.

    Raises:
        ValueError: before anything is loaded, if the settings or the number of samples cannot be.
    """
    sets, sweeps = parse_plan(arguments.sampler, arguments.sweep)
    if arguments.num_samples < MIN_SAMPLES:
        raise ValueError(
            f"--num_samples {arguments.num_samples} is too few; give {MIN_SAMPLES} or more, since "
            f"precision and recall need an image and {NEIGHBOURS} neighbours"
        )
    generator = maskgil_jax.ImageGenerator.from_checkpoint(arguments.workdir, batch_size=256)
    train, heldout = digits_arrays("train"), digits_arrays("test")
    labels = np.arange(arguments.num_samples) % generator.model.num_classes
    names = [next(iter(changes[0])) for changes in sweeps]
    print(f"| sampler | {' | '.join([*names, *COLUMNS])} |")
    print("|" + "---|" * (1 + len(names) + len(COLUMNS)), flush=True)
    rows = []
    combinations = list(itertools.product(*sweeps))
    for (name, settings), changes in itertools.product(sets.items(), combinations):
        swept = {field: value for change in changes for field, value in change.items()}
        tokens = generator.tokens(labels, seed=arguments.seed, **{**settings, **swept})
        images = generator.decode(tokens)
        report = digits_report(images, labels, train=train, heldout=heldout)
        rows.append({"sampler": name, **swept, **report})
        cells = [name, *swept.values(), *(f"{report[column]:.3f}" for column in COLUMNS)]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return rows


def draw(rows: list[dict[str, Any]], axis: str, path: pathlib.Path) -> None:
    """Draw every measure over the swept setting, one line for each set of settings."""
    from matplotlib import pyplot  # an extra

    figure, panels = pyplot.subplots(1, len(COLUMNS), figsize=(14, 4), layout="constrained")
    for panel, column in zip(panels, COLUMNS, strict=True):
        for name in dict.fromkeys(row["sampler"] for row in rows):
            line = [row for row in rows if row["sampler"] == name]
            panel.plot(
                [row[axis] for row in line], [row[column] for row in line], marker="o", label=name
            )
        panel.set(title=column, xlabel=axis)
        if axis == "num_steps":
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:g}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=90)


def main(command: Sequence[str] | None = None) -> None:
    """Parse the command line and sweep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workdir", required=True, help="directory of a digits run")
    add("--sampler", action="append", default=[], metavar="FIELD=VALUE,…", help="one row or curve")
    add("--sweep", action="append", default=[], metavar="FIELD=VALUES", help="a setting to vary")
    add("--num_samples", type=int, default=1000, help=f"of a row, {MIN_SAMPLES} or more")
    add("--seed", type=int, default=0)
    add("--plot", type=pathlib.Path, help="picture to write")
    arguments = parser.parse_args(command)
    try:
        if arguments.plot and len(arguments.sweep) != 1:
            raise ValueError(f"--plot needs one --sweep, not {len(arguments.sweep)}")
        rows = measure(arguments)
        if arguments.plot:
            draw(rows, arguments.sweep[0].partition("=")[0], arguments.plot)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
