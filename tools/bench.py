"""Measure speed as ratios, each side by side in one run: one JSON object per line.

    python tools/bench.py --rows 1c,7 --size b [--table]

The rows are those of BENCHMARKS.md, which keeps the figures. The device is JAX's default one; rows
1, 2, 3, 3r, 4 and 13 need a GPU. Contenders take turns in blocks; `ratio` is the median over the
blocks, `spread` is (largest - smallest) / median. A result is `void` if the rate of a plain matmul
moved by more than 5 % from before to after: then something else was running.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from benchmarks import ours, rows
from benchmarks.timing import Effort

from maskgil_jax import sharding

COLUMNS = ("row", "name", "ratio", "goal", "spread", "void", "hardware")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="rows:\n" + "\n".join(f"  {key:3} {row.summary}" for key, row in rows.ROWS.items()),
    )
    add = parser.add_argument
    add("--rows", required=True, help="which rows, separated by commas")
    add(
        "--size", default="b", help=f"{', '.join(ours.ALL_SIZES)} ({ours.TRIAL_SIZE}: try the tool)"
    )
    add("--blocks", type=int, default=5, help="turns of every contender, at least 5")
    add("--block_seconds", type=float, default=2.0, help="how long a turn lasts at least")
    add("--table", action="store_true", help="print a Markdown table at the end instead of JSON")
    return parser


def run_rows(names: list[str], size: str, effort: Effort) -> Iterable[dict[str, Any]]:
    """Measure the rows one after another.

    Raises:
        ValueError: before anything is measured, if a row or the size cannot be.
    """
    if size not in ours.ALL_SIZES:
        raise ValueError(f"size {size!r} is unknown; allowed: {', '.join(ours.ALL_SIZES)}")
    rows.check_rows(names)
    for name in names:
        for result in rows.ROWS[name].run(name, size, effort):
            if size == ours.TRIAL_SIZE:
                result = dataclasses.replace(result, goal=None)
            yield result.to_dict()


def format_table(results: Iterable[Mapping[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    signs = {"higher": "≥", "lower": "≤"}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for result in results:
        goal = "–" if result["goal"] is None else f"{signs[result['better']]} {result['goal']}"
        void = "void" if result["void"] else ""
        cells = {**result, "goal": goal, "void": void}
        lines.append("| " + " | ".join(str(cells[column]) for column in COLUMNS) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; return the exit status, 1 after a refusal with its reason on stderr."""
    args = build_parser().parse_args(arguments)
    # Else JAX takes most of a GPU's memory, and leaves PyTorch too little of the same one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sharding.split_cpu(min(encoding.batch_size for encoding in ours.ENCODINGS))
    # A compiler's answer from an earlier run is no measurement.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        effort = Effort(blocks=args.blocks, block_seconds=args.block_seconds)
        results = run_rows([name.strip() for name in args.rows.split(",")], args.size, effort)
        if args.table:
            print(format_table(results))
        else:
            for result in results:
                print(json.dumps(result, ensure_ascii=False), flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
