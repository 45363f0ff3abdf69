"""A measured ratio, and how it is told: one JSON line with the machine and the versions."""

import dataclasses
import importlib.util
import os
import pathlib
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from benchmarks.timing import MAX_DRIFT, Times

CPU, GPU = "cpu", "gpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One ratio.

    Attributes:
        row: key of the row in the table.
        name: what is divided by what.
        ratio: median over the blocks.
        goal: what the ratio should reach; `None` where none is set for this size and device.
        better: `higher` or `lower`.
        spread: (largest - smallest) / median of the blocks' ratios.
        times: the measurement behind it; `None` if nothing is timed, which no drift can void.
        figures: raw figures, each name ending in its unit.
    """

    row: str
    name: str
    ratio: float
    goal: float | None
    better: str = "higher"
    spread: float
    times: Times | None
    figures: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the JSON line."""
        met = None
        if self.goal is not None:
            met = self.ratio >= self.goal if self.better == "higher" else self.ratio <= self.goal
        ceiling = {}
        if self.times is not None:
            ceiling["ceiling_gflops"] = gflops(np.median(self.times.ceilings))
            ceiling["ceiling_drift"] = round(self.times.drift, 4)
        return {
            "row": self.row,
            "name": self.name,
            "ratio": round(self.ratio, 3),
            "goal": self.goal,
            "better": self.better,
            "met": met,
            "spread": round(self.spread, 3),
            "void": self.times is not None and self.times.drift > MAX_DRIFT,
            "hardware": describe_hardware(),
            "versions": describe_versions(),
            **ceiling,
            **self.figures,
        }


def summarise(ratios: np.ndarray) -> dict[str, Any]:
    """Return median and spread of the blocks' ratios."""
    median = float(np.median(ratios))
    return {"ratio": median, "spread": float(np.ptp(ratios)) / median}


def describe_hardware() -> str:
    """Return the name of the device and, for a CPU, how many cores this process may use."""
    if jax.default_backend() != CPU:
        return f"one {jax.devices()[0].device_kind}"
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(models or [platform.processor()])[0]}, {len(os.sched_getaffinity(0))} cores"


def describe_versions() -> str:
    """Return the versions of the libraries that do the work."""
    names = ["jax", "flax"] + (["torch"] if importlib.util.find_spec("torch") else [])
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


def gflops(flops_per_second: float) -> float:
    """Return a rate in GFLOP/s, to four digits."""
    return float(f"{flops_per_second / 1e9:.4g}")


def seconds(times: Times, name: str) -> float:
    """Return the median of a contender's seconds, to four digits."""
    return float(f"{np.median(times.seconds[name]):.4g}")
