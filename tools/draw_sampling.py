"""Draw the pictures of docs/sampling.md with a model of digits.

    python tools/draw_sampling.py --workdir runs/digits --out docs/sampling

Every picture shows one group of the sampler's settings, a way of editing, or the decoder at work.
The captions are in docs/sampling.md; settings that a row does not name are the run's.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskgil_jax import pictures
from maskgil_jax.data.digits import NUM_CLASSES, digits_arrays
from maskgil_jax.generator import Generation, ImageGenerator
from maskgil_jax.models.conditioning import mix_labels
from maskgil_jax.tokenizers.tiling import Tiling

SEED = 4
STEPS = 8
SCALE = 2
# Of the mosaic in tiles, and how much brighter a difference is drawn than it is.
TILE_SIZE = 64
MAGNIFIED = 3
# The digit of which all steps are drawn.
SHOWN = 3
# Between a pixel's channels, of what is meant to be grey.
MAX_TINT = 48
DIGITS = range(NUM_CLASSES)


class Studio:
    """A generator of digits, what it has made already, and real digits to edit."""

    def __init__(self, generator: ImageGenerator):
        if generator.model.num_classes != NUM_CLASSES:
            raise ValueError(
                f"the model has {generator.model.num_classes} classes; give a run of digits"
            )
        self.generator = generator
        images, labels = digits_arrays("test")
        self.originals = images[[int(np.argmax(labels == digit)) for digit in DIGITS]]
        self.make = functools.cache(self._make)

    def _make(self, **sampler: Any) -> Generation:
        made = self.generator(DIGITS, seed=SEED, return_trace=True, **sampler)
        assert isinstance(made, Generation)
        return made

    def draw(self, labels: Sequence[int] | np.ndarray, **options: Any) -> np.ndarray:
        """Draw one picture per label, in eight steps."""
        tokens = self.generator.tokens(labels, seed=SEED, num_steps=STEPS, **options)
        return self.generator.decode(tokens)

    def trace(self, made: Generation) -> np.ndarray:
        """Return the trace, which was asked for."""
        assert made.trace is not None
        return made.trace

    def rows(self, *settings: dict[str, Any]) -> np.ndarray:
        """Draw ten digits per setting."""
        return grid(*(self.make(**changes).images for changes in settings))

    def steps(self, *settings: dict[str, Any]) -> np.ndarray:
        """Draw all steps of one digit per setting, and at last when its tokens were decided."""
        rows = []
        for changes in settings:
            trace = self.trace(self.make(**changes))[:, SHOWN : SHOWN + 1]
            rows.append([*self.generator.show_steps(trace)[:, 0], *self.heat(trace)])
        return grid(*rows)

    def heat(self, trace: np.ndarray) -> np.ndarray:
        """Draw when the tokens of a trace were decided, one picture per image."""
        decided = pictures.decided_at(trace, self.generator.model.config.mask_token_id)
        factor = self.generator.tokenizer.spec.downsample_factor
        return pictures.heat_map(decided, len(trace), factor)


def grid(*rows: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Lay rows of equally many pictures out."""
    cells = np.stack([picture for row in rows for picture in row])
    return pictures.make_grid(cells, columns=len(rows[0]), scale=SCALE)


def plain(picture: np.ndarray) -> np.ndarray:
    """Return a picture without the faint colours of decoded digits: a third of the file."""
    spread = np.ptp(picture, axis=-1, keepdims=True)
    mean = np.rint(picture.mean(-1, keepdims=True)).astype(np.uint8)
    coloured = spread > MAX_TINT
    return np.where(coloured, picture, mean) if coloured.any() else mean


def draw_schedules(studio: Studio) -> np.ndarray:
    """Draw the five curves."""
    names = ("root", "linear", "square", "cosine", "arccos")
    return studio.steps(*({"schedule": name, "num_steps": STEPS} for name in names))


def draw_forms(studio: Studio) -> np.ndarray:
    """Draw the two forms of a curve."""
    forms = ("increments", "mask_ratio")
    return studio.steps(*({"schedule_form": name, "num_steps": STEPS} for name in forms))


def draw_guidance(studio: Studio) -> np.ndarray:
    """Draw guidance by four schedules."""
    strong = {"guidance_scale": 3.0, "num_steps": STEPS}
    constant = strong | {"guidance_schedule": "constant"}
    return studio.rows(
        {"guidance_scale": 1.0, "num_steps": STEPS},
        constant,
        strong | {"guidance_schedule": "linear"},
        strong | {"guidance_schedule": "power_cosine", "guidance_power": 2.0},
        constant | {"guidance_start": 0.25, "guidance_stop": 0.75},
    )


def draw_temperature(studio: Studio) -> np.ndarray:
    """Draw low, plain, high and falling temperatures."""
    return studio.rows(
        {"temperature": 0.5, "num_steps": STEPS},
        {"temperature": 1.0, "num_steps": STEPS},
        {"temperature": 1.5, "num_steps": STEPS},
        {"temperature": 0.5, "temperature_annealing": 0.8, "num_steps": STEPS},
    )


def draw_filters(studio: Studio) -> np.ndarray:
    """Draw without and with top-k and top-p, at a temperature that needs them."""
    hot = {"temperature": 1.5, "num_steps": STEPS}
    return studio.rows(hot, hot | {"top_k": 8}, hot | {"top_p": 0.8})


def draw_orders(studio: Studio) -> np.ndarray:
    """Draw the orders."""
    plain = {"num_steps": STEPS}
    return studio.steps(
        plain | {"order": "confidence", "gumbel_temperature": 0.0},
        plain | {"order": "confidence", "gumbel_temperature": 4.5},
        plain | {"order": "halton"},
        plain | {"order": "halton", "halton_roll": True},
        plain | {"order": "random"},
    )


def draw_remasking(studio: Studio) -> np.ndarray:
    """Draw the ways to take tokens back."""
    plain = {"num_steps": STEPS}
    return studio.steps(
        plain | {"remasking": "none"},
        *(
            plain | {"remasking": kind, "remasking_strength": 0.4, "remasking_choice": choice}
            for kind in ("cap", "rescale")
            for choice in ("random", "confidence")
        ),
    )


def draw_edit(studio: Studio) -> np.ndarray:
    """Draw an edit of the lower half: original, what is marked, and three ways to edit."""
    chosen, wanted = np.array([3, 5, 7]), [9, 6, 2]
    originals = studio.originals[chosen]
    masks = np.zeros(originals.shape[:3], bool)
    masks[:, originals.shape[1] // 2 :] = True
    edit = functools.partial(
        studio.generator.edit, originals, masks, wanted, seed=SEED, num_steps=STEPS
    )
    ways: tuple[dict[str, Any], ...] = ({}, {"grow": 1}, {"grow": 1, "feather": 6.0})
    edited = [edit(**way).images for way in ways]
    columns = [originals, pictures.grey_out(originals, masks), *edited]
    return grid(*np.swapaxes(np.stack(columns), 0, 1))


def draw_outpaint(studio: Studio) -> np.ndarray:
    """Draw continuations of the left halves of digits."""
    chosen = np.array([0, 3, 8])
    originals = studio.originals[chosen]
    width = originals.shape[2] // 2
    unknown = np.zeros(originals.shape[:3], bool)
    unknown[:, :, width:] = True
    made = [
        studio.generator.outpaint(
            originals[:, :, :width], (0, 0, 0, width), chosen, seed=seed, num_steps=STEPS
        ).images
        for seed in range(SEED, SEED + 4)
    ]
    columns = [originals, pictures.grey_out(originals, unknown), *made]
    return grid(*np.swapaxes(np.stack(columns), 0, 1))


def draw_vary(studio: Studio) -> np.ndarray:
    """Draw digits and variations that keep less and less of them."""
    vary = functools.partial(
        studio.generator.vary, studio.originals, DIGITS, seed=SEED, num_steps=STEPS
    )
    kept = [vary(keep=keep).images for keep in (0.9, 0.6, 0.3, 0.0)]
    return grid(studio.originals, *kept)


def draw_mixtures(studio: Studio) -> np.ndarray:
    """Draw ways from one class to another."""
    shares = np.linspace(0, 1, 9)
    rows = []
    for first, second in ((3, 8), (1, 7), (4, 9)):
        mixed = mix_labels(first, second, shares, NUM_CLASSES)
        # In one call the places differ, and so would the noise: each is the first of its own.
        rows.append([studio.draw(one[None], gumbel_temperature=4.5)[0] for one in mixed])
    return grid(*rows)


def draw_sizes(studio: Studio) -> np.ndarray:
    """Draw five digits at other sizes than the trained one, which is the second row."""
    grids = [
        pictures.make_grid(
            studio.draw(range(2, 7), size=size),
            columns=5,
            scale=SCALE,
        )
        for size in ((24, 24), (32, 32), (32, 48), (48, 48))
    ]
    width = max(drawn.shape[1] for drawn in grids)
    white = functools.partial(np.pad, constant_values=pictures.BACKGROUND)
    return np.concatenate([white(x, ((0, 0), (0, width - x.shape[1]), (0, 0))) for x in grids])


def draw_tiling(studio: Studio) -> np.ndarray:
    """Draw a mosaic of digits: itself, taken whole, in tiles, and the magnified difference."""
    rows, columns = 4, 4
    images = digits_arrays("test")[0][: rows * columns]
    height, width = images.shape[1:3]
    mosaic = images.reshape(rows, columns, *images.shape[1:]).swapaxes(1, 2)
    mosaic = mosaic.reshape(1, rows * height, columns * width, -1)
    whole = studio.generator.tokenizer
    tiled = dataclasses.replace(whole, tiling=Tiling(tile_size=TILE_SIZE))
    rebuilt, near = (
        pictures.to_uint8(np.asarray(vq.decode(vq.encode(pictures.to_float(mosaic)))))
        for vq in (whole, tiled)
    )
    change = np.abs(near.astype(np.int16) - rebuilt) * MAGNIFIED
    change = change.clip(0, 255).astype(np.uint8)
    return grid(np.concatenate([mosaic, rebuilt, near, change]))


def draw_decided(studio: Studio) -> np.ndarray:
    """Draw ten digits and below when their tokens were decided."""
    made = studio.make(num_steps=STEPS)
    return grid(made.images, studio.heat(studio.trace(made)))


def animate(studio: Studio) -> np.ndarray:
    """Return the frames of a decoding of five digits; the end stays for some frames."""
    shown = studio.generator.show_steps(studio.trace(studio.make(num_steps=STEPS))[:, :5])
    frames = [pictures.make_grid(step, columns=5, scale=SCALE) for step in shown]
    return np.stack(frames + frames[-1:] * 4)


DRAWINGS: dict[str, Callable[[Studio], np.ndarray]] = {
    "schedules": draw_schedules,
    "forms": draw_forms,
    "guidance": draw_guidance,
    "temperature": draw_temperature,
    "filters": draw_filters,
    "orders": draw_orders,
    "remasking": draw_remasking,
    "edit": draw_edit,
    "outpaint": draw_outpaint,
    "vary": draw_vary,
    "mixtures": draw_mixtures,
    "sizes": draw_sizes,
    "tiling": draw_tiling,
    "decided": draw_decided,
}


def draw(workdir: str, out: Path) -> None:
    """Draw everything and say what was written."""
    studio = Studio(ImageGenerator.from_checkpoint(workdir))
    for name, function in DRAWINGS.items():
        pictures.save_png(out / f"{name}.png", plain(function(studio)))
        print(out / f"{name}.png", flush=True)
    pictures.save_gif(out / "steps.gif", plain(animate(studio)), seconds_per_frame=0.4)
    print(out / "steps.gif")


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="directory of a digits run")
    parser.add_argument("--out", required=True, type=Path, help="folder for the pictures")
    arguments = parser.parse_args()
    try:
        draw(arguments.workdir, arguments.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
