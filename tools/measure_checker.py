"""Measure how far the checker of captioned canvases can be trusted.

    python tools/measure_checker.py --per_kind 300 --tokenizer asset:t2i_digits_tokenizer

For every column, held-out prompts are drawn as canvases of test digits that show what is asked, and
the same prompts are held against canvases drawn for other prompts of the column, of which the scene
tells whether they happen to show it. All are judged as they are and as the tokenizer rebuilds them.
Printed is one line of JSON: for `originals` and `rebuilt`, by column, `right` (share of the
pictures that show it which the checker passes), `wrong` (share of those that do not which it
fails), and `read`, the share of canvases whose digits and colours are all found, and none else.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np

from maskgil_jax import loading
from maskgil_jax.data.canvas_captions import KINDS, Expectation, heldout_prompts, holds
from maskgil_jax.data.canvases import COLOURS, SIZES, Scene, draw_digits
from maskgil_jax.evals.canvas_checker import CanvasChecker, FoundDigit, Verdict, judge
from maskgil_jax.report import known_digits, rebuild_canvases

Canvas = tuple[np.ndarray, Scene]


def draw_expected(expectation: Expectation, seed: Sequence[int], index: int) -> Canvas:
    """Draw a canvas of test digits that shows what is expected, and nothing else."""
    rng = np.random.default_rng((*seed, index))
    size = SIZES[index % len(SIZES)]
    digits = [digit for number, digit, _ in expectation.groups for _ in range(number)]
    told = [colour for number, _, colour in expectation.groups for _ in range(number)]
    while True:
        drawn = [tuple(COLOURS)[i] for i in rng.integers(len(COLOURS), size=len(told))]
        colours = [a or b for a, b in zip(told, drawn, strict=True)]
        image, scene = draw_digits(rng, "test", size, digits, colours)
        if expectation.relation is None or holds(expectation.relation, *scene.objects):
            return image, scene


def judge_scene(scene: Scene, expectation: Expectation) -> bool:
    """Tell by the scene itself whether the canvas shows what is expected."""
    truth = [FoundDigit(o.digit, o.colour, o.box, 1.0) for o in scene.objects]
    return judge(truth, expectation).correct


def measure(
    checker: CanvasChecker,
    images: Sequence[np.ndarray],
    canvases: Sequence[Canvas],
    expectations: Sequence[Expectation],
    explain: bool,
) -> dict[str, dict[str, float]]:
    """Compare verdicts on images with what the scenes tell, column by column."""
    found = checker.find(images)
    results: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        rows = [row for row, e in enumerate(expectations) if e.kind == kind]
        right, wrong, read = [], [], []
        for place, row in enumerate(rows):
            there = sorted((o.digit, o.colour) for o in canvases[row][1].objects)
            read.append(sorted((one.digit, one.colour) for one in found[row]) == there)
            verdict = judge(found[row], expectations[row])
            right.append(verdict.correct)
            if explain and not verdict.correct:
                _explain(row, verdict)
            other = expectations[rows[(place + 1) % len(rows)]]
            if not judge_scene(canvases[row][1], other):
                wrong.append(not judge(found[row], other).correct)
        results[kind] = {
            "right": round(float(np.mean(right)), 4),
            "wrong": round(float(np.mean(wrong)), 4),
            "read": round(float(np.mean(read)), 4),
        }
    return results


def _explain(row: int, verdict: Verdict) -> None:
    print(f"canvas {row}, {verdict.kind}: {verdict.reason}", file=sys.stderr)


def run(per_kind: int, seed: int, tokenizer: str | None, explain: bool) -> dict[str, object]:
    """Draw, rebuild, judge."""
    if per_kind < 2 or seed < 0:
        raise ValueError(f"per_kind = {per_kind}, seed = {seed}; give at least 2 and 0")
    expectations = [e for kind in KINDS for _, e in heldout_prompts(kind, per_kind, seed)]
    canvases = [draw_expected(e, (seed,), row) for row, e in enumerate(expectations)]
    trained = None if tokenizer is None else loading.load_tokenizer(tokenizer)
    checker = CanvasChecker(palette=COLOURS, train=known_digits(trained))
    originals = [image for image, _ in canvases]
    result: dict[str, object] = {
        "per_kind": per_kind,
        "originals": measure(checker, originals, canvases, expectations, explain),
    }
    if trained is not None:
        rebuilt = rebuild_canvases(canvases, trained)
        result["rebuilt"] = measure(checker, rebuilt, canvases, expectations, explain)
    return result


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--per_kind", type=int, default=300, help="canvases of each column")
    add("--seed", type=int, default=0, help="of prompts and canvases")
    add("--tokenizer", help="model directory or asset:NAME; without it, originals only")
    add("--explain", action="store_true", help="tell on stderr why pictures were failed")
    arguments = parser.parse_args()
    try:
        print(json.dumps(run(**vars(arguments))))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
