"""Repaint parts of real digits as other digits, and let the SVM say what they have become.

    python tools/edit_digits.py --workdir runs/digits --box 4,4,28,28

Every trial takes a held-out digit, marks the box and asks for another class, drawn from the seed.
The last line is JSON: the share of results that the SVM reads as the class asked for, the share of
originals it reads so (they show another digit), and how many tokens and pixels outside the marked
part differ from the originals, which must be none.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import maskgil_jax
from maskgil_jax import editing, pictures
from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.evals.digits import NEIGHBOURS, digits_report

SETTINGS = ("guidance_scale", "num_steps", "gumbel_temperature")
MIN_TRIALS = NEIGHBOURS + 1  # of which `digits_report` makes a report


def parse_box(text: str) -> tuple[int, int, int, int]:
    """Read `TOP,LEFT,BOTTOM,RIGHT` in pixels.

    Raises:
        ArgumentTypeError: if these are not four whole numbers.
    """
    try:
        top, left, bottom, right = (int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no box; write TOP,LEFT,BOTTOM,RIGHT, such as 4,4,28,28"
        ) from error
    return top, left, bottom, right


def check(arguments: argparse.Namespace, digits: np.ndarray) -> None:
    """Raise a `ValueError` unless as many digits are there and the box marks a part of them."""
    count, height, width = digits.shape[:3]
    if not MIN_TRIALS <= arguments.num_trials <= count:
        raise ValueError(
            f"--num_trials {arguments.num_trials} is out of range; allowed: {MIN_TRIALS} to "
            f"{count}, the number of held-out digits"
        )
    if arguments.shown < 1:
        raise ValueError(f"--shown {arguments.shown} is out of range; allowed: 1 or more")
    top, left, bottom, right = arguments.box
    box = ",".join(map(str, arguments.box))
    if top >= bottom or left >= right:
        raise ValueError(f"--box {box} is empty; TOP is less than BOTTOM, LEFT less than RIGHT")
    if top < 0 or left < 0 or bottom > height or right > width:
        raise ValueError(
            f"--box {box} reaches outside the image; allowed: within 0,0,{height},{width}"
        )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Edit, write the picture if asked to, and return the report.

    Raises:
        ValueError: before anything is loaded, if the trials, the box or what is shown cannot be.
    """
    train, heldout = digits_arrays("train"), digits_arrays("test")
    digits, classes = heldout
    check(arguments, digits)
    generator = maskgil_jax.ImageGenerator.from_checkpoint(arguments.workdir)
    rng = np.random.default_rng(arguments.seed)
    chosen = rng.choice(len(digits), arguments.num_trials, replace=False)
    originals, classes = np.asarray(digits)[chosen], np.asarray(classes)[chosen]
    num_classes = generator.model.num_classes
    asked = (classes + rng.integers(1, num_classes, len(classes))) % num_classes
    masks = np.zeros(originals.shape[:3], bool)
    top, left, bottom, right = arguments.box
    masks[:, top:bottom, left:right] = True
    made = generator.edit(
        originals,
        masks,
        asked,
        grow=arguments.grow,
        seed=arguments.seed,
        **{name: getattr(arguments, name) for name in SETTINGS},
    )
    factor = generator.tokenizer.spec.downsample_factor
    kept = ~editing.token_mask(masks, factor, arguments.grow)
    known = generator.encode(originals)

    def share_read_as_asked(images: np.ndarray) -> float:
        report = digits_report(images, asked, train=train, heldout=heldout)
        return round(report["agreement"], 4)

    if arguments.out:
        count = min(arguments.shown, len(originals))
        shown = np.concatenate([originals[:count], made.images[:count]])
        pictures.save_png(arguments.out, pictures.make_grid(shown, columns=count, scale=2))
    return {
        "trials": len(asked),
        "marked_tokens": int((~kept[0]).sum()),
        "read_as_asked": share_read_as_asked(made.images),
        "originals_read_as_asked": share_read_as_asked(originals),
        "changed_tokens_outside": int((made.tokens != known)[kept].sum()),
        "changed_pixels_outside": int((made.images != originals)[~masks].any(-1).sum()),
    }


def main(command: Sequence[str] | None = None) -> None:
    """Parse the command line and edit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workdir", required=True, help="directory of a digits run")
    add("--box", type=parse_box, default=(4, 4, 28, 28), help="TOP,LEFT,BOTTOM,RIGHT in pixels")
    add("--grow", type=int, default=0, help="cells by which the marked part is widened")
    add("--guidance_scale", type=float, help="default: the run's")
    add("--num_steps", type=int, help="default: the run's")
    add("--gumbel_temperature", type=float, help="default: the run's")
    add("--num_trials", type=int, default=200, help=f"held-out digits, {MIN_TRIALS} or more")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, help="FILE.png: originals above the results")
    add("--shown", type=int, default=16, help="how many of them, at most")
    try:
        print(json.dumps(run(parser.parse_args(command))))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
