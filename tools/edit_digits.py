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
from typing import Any

import numpy as np

import maskgil_jax
from maskgil_jax import editing, pictures
from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.evals.digits import digits_report

SETTINGS = ("guidance_scale", "num_steps", "gumbel_temperature")


def parse_box(text: str) -> tuple[int, int, int, int]:
    """Read `TOP,LEFT,BOTTOM,RIGHT` in pixels."""
    numbers = [int(part) for part in text.split(",")]
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is no box; write TOP,LEFT,BOTTOM,RIGHT")
    top, left, bottom, right = numbers
    return top, left, bottom, right


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Edit, write the picture if asked to, and return the report."""
    generator = maskgil_jax.ImageGenerator.from_checkpoint(arguments.workdir)
    train, heldout = digits_arrays("train"), digits_arrays("test")
    digits, classes = heldout
    rng = np.random.default_rng(arguments.seed)
    chosen = rng.choice(len(digits), arguments.num_trials, replace=False)
    originals, classes = np.asarray(digits)[chosen], np.asarray(classes)[chosen]
    num_classes = generator.model.config.num_classes
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
        shown = np.concatenate([originals[: arguments.shown], made.images[: arguments.shown]])
        grid = pictures.make_grid(shown, columns=arguments.shown, scale=2)
        pictures.save_png(arguments.out, grid)
    return {
        "trials": len(asked),
        "marked_tokens": int((~kept[0]).sum()),
        "read_as_asked": share_read_as_asked(made.images),
        "originals_read_as_asked": share_read_as_asked(originals),
        "changed_tokens_outside": int((made.tokens != known)[kept].sum()),
        "changed_pixels_outside": int((made.images != originals)[~masks].any(-1).sum()),
    }


def main() -> None:
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
    add("--num_trials", type=int, default=200)
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, help="FILE.png: originals above the results")
    add("--shown", type=int, default=16, help="how many of them")
    try:
        print(json.dumps(run(parser.parse_args())))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
