"""Sampler settings to vary, and what is made of the figures: a table and plots.

All but the parsing works on reports, as they are stored.
"""

import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from maskgil_jax.decoding.autoregressive import AutoregressiveConfig
from maskgil_jax.decoding.sampler import SamplerConfig
from maskgil_jax.evaluation.protocols import HIGHER_IS_BETTER, LOWER_IS_BETTER
from maskgil_jax.masking import check_choice

_CAUSAL = {field.name: field.type for field in dataclasses.fields(AutoregressiveConfig)}
# Of both decoders, and of a causal model that begins the images of a masked one.
TYPES: dict[str, Any] = {
    **{field.name: field.type for field in dataclasses.fields(SamplerConfig)},
    **_CAUSAL,
    "ar_share": float,
    **{f"ar_{name}": kind for name, kind in _CAUSAL.items()},
}
# Shown as "mean ± this".
_SPREADS = {"is": "is_std", "kid": "kid_std"}


def parse_value(field: str, text: str) -> Any:
    """Read a value of a sampler setting.

    Raises:
        ValueError: if there is no such setting, or the text is no such value.
    """
    check_choice("sampler setting", field, TYPES)
    kind = TYPES[field]
    if kind is bool:
        check_choice(field, text, ("true", "false"))
        return text == "true"
    try:
        value = kind(text)
    except ValueError as error:
        raise ValueError(f"{field}={text}: {text!r} is no {kind.__name__}") from error
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{field}={text}: give a finite number")
    return value


def parse_sweeps(texts: Sequence[str], given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Read `field=value,value,value` for each setting that varies.

    Args:
        texts: what the command line says.
        given: sampler settings that are fixed there.

    Raises:
        ValueError: if one is no such list, a field or value is unknown or comes twice, or a field
            is fixed as well.
    """
    sweeps: dict[str, list[Any]] = {}
    for text in texts:
        field, separator, values = text.partition("=")
        if not separator:
            raise ValueError(f"--sweep {text!r}: write field=value,value, such as num_steps=4,8")
        parsed = [parse_value(field, value) for value in values.split(",")]
        if field in sweeps:
            raise ValueError(f"two --sweep vary {field}; give all its values in one")
        if len(set(parsed)) < len(parsed):
            raise ValueError(f"--sweep {text!r} gives a value twice; give it once")
        if given.get(field) is not None:
            raise ValueError(f"--{field} is given and --sweep {text!r} varies it; give one of them")
        sweeps[field] = parsed
    return sweeps


def grid(sweeps: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return all combinations of the values, the last setting varying fastest."""
    combinations = itertools.product(*sweeps.values())
    return [dict(zip(sweeps, values, strict=True)) for values in combinations]


def make_table(report: Mapping[str, Any]) -> str:
    """Return the figures of a report as a Markdown table, a row for each point."""
    points = report.get("points", [report])
    swept = list(report.get("sweep", {}))
    columns = [name for name in points[0]["figures"] if name not in _SPREADS.values()]
    names = ["protocol", *swept, "images", *(name + _arrow(name) for name in columns)]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for point in points:
        cells = [report["protocol"]["name"], *(str(point["swept"][name]) for name in swept)]
        cells.append(f"{report['protocol']['num_images']:,}")
        cells += [_cell(name, point["figures"]) for name in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _arrow(name: str) -> str:
    return " ↑" if name in HIGHER_IS_BETTER else " ↓" if name in LOWER_IS_BETTER else ""


def _cell(name: str, figures: Mapping[str, float]) -> str:
    spread = figures.get(_SPREADS.get(name, ""))
    number = _format(figures[name])
    return number if spread is None else f"{number} ± {_format(spread)}"


def _format(value: float) -> str:
    if abs(value) >= 10:
        return f"{value:.2f}"
    # KID of good samples is a few thousandths.
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def check_plot(path: str | os.PathLike[str] | None, sweeps: Mapping[str, Sequence[Any]]) -> None:
    """Refuse, before anything is measured, a plot that could not be drawn.

    Raises:
        ValueError: if no number varies, the file is of another kind, or matplotlib is missing.
    """
    if path is None:
        return
    if pathlib.Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {path}: allowed are FILE.png, FILE.svg and FILE.pdf")
    if not _axes(sweeps):
        raise ValueError(
            "--plot needs a --sweep over a number, such as guidance_scale=1,1.5,2 or num_steps=4,8"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--plot needs matplotlib, of the extra plots: pip install 'maskgil_jax[plots]'"
        ) from error


def draw(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw every metric over every number that varies, a line for each of the other settings.

    The file appears whole or not at all.
    """
    from matplotlib.figure import Figure  # an extra

    path = pathlib.Path(path)
    axes, points = _axes(report["sweep"]), report["points"]
    names = [name for name in points[0]["figures"] if name in HIGHER_IS_BETTER | LOWER_IS_BETTER]
    figure = Figure(figsize=(3.6 * len(names), 3.2 * len(axes)), layout="constrained")
    panels = figure.subplots(len(axes), len(names), squeeze=False)
    for axis, row in zip(axes, panels, strict=True):
        others = [name for name in report["sweep"] if name != axis]
        lines: dict[str, list[Any]] = {}
        for point in points:
            label = ", ".join(f"{name} {point['swept'][name]}" for name in others)
            lines.setdefault(label, []).append(point)
        for name, panel in zip(names, row, strict=True):
            for label, line in lines.items():
                line = sorted(line, key=lambda point: point["swept"][axis])
                x = [point["swept"][axis] for point in line]
                y = [point["figures"][name] for point in line]
                panel.plot(x, y, marker="o", markersize=4, label=label)
            panel.set(xlabel=axis, ylabel=name + _arrow(name))
            panel.grid(alpha=0.3)
            if axis == "num_steps":
                panel.set_xscale("log", base=2)
                panel.set_xticks(sorted(report["sweep"][axis]))
                panel.xaxis.set_major_formatter("{x:g}")
        if others:
            row[-1].legend(fontsize="small")
    protocol = report["protocol"]
    figure.suptitle(f"protocol {protocol['name']}, {protocol['num_images']:,} images")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(partial, dpi=110)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _axes(sweeps: Mapping[str, Sequence[Any]]) -> list[str]:
    return [name for name, values in sweeps.items() if TYPES[name] in (int, float) and values]
