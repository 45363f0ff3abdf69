"""Sample images: `python -m maskgil_jax.sample --workdir DIR --labels 3,1,4 --out grid.png`.

`--out` says what is written: FILE.png a grid, FILE.npz the arrays `arr_0` (uint8, NHWC) and
`labels`, anything else a new directory of PNGs, `000000_label3.png` and so on. Sampler flags that
are not given keep the values of the run's configuration.
"""

import contextlib
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags

from maskgil_jax import checkpoints, cli, generator, loading, masking, pictures
from maskgil_jax.build import models as build
from maskgil_jax.decoding.guidance import GUIDANCE_SCHEDULES
from maskgil_jax.decoding.orders import ORDERS
from maskgil_jax.decoding.remasking import CHOICES, REMASKING
from maskgil_jax.tokenizers.base import Tokenizer

Writer = Callable[[np.ndarray, np.ndarray], None]

MAX_ROW = 8

_LABELS = flags.DEFINE_string(
    "labels", None, "Classes, such as 3,1,4; the number of classes means none. Default: every one."
)
_NUM_PER_LABEL = flags.DEFINE_integer("num_per_label", 1, "Images of each.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "samples.png", "FILE.png, FILE.npz or a new directory.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer to use instead of the run's.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all images.", lower_bound=0)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at a time.", lower_bound=1)

_SAMPLER = [
    flags.DEFINE_integer("num_steps", None, "Decoding steps, 1 to the number of tokens."),
    flags.DEFINE_string("schedule", None, f"One of {', '.join(masking.SCHEDULES)}."),
    flags.DEFINE_string("schedule_form", None, f"One of {', '.join(masking.FORMS)}."),
    flags.DEFINE_bool("rescale", None, "Scale the schedule to the tokens unknown at the start."),
    flags.DEFINE_float("guidance_scale", None, "0 or more; 1 is no guidance."),
    flags.DEFINE_string("guidance_schedule", None, f"One of {', '.join(GUIDANCE_SCHEDULES)}."),
    flags.DEFINE_float("guidance_power", None, "Exponent of power_cosine, more than 0."),
    flags.DEFINE_float("guidance_start", None, "Guide from this share of the steps on, 0 to 1."),
    flags.DEFINE_float("guidance_stop", None, "Guide up to this share of the steps, 0 to 1."),
    flags.DEFINE_float("temperature", None, "Of the codes, 0 or more."),
    flags.DEFINE_float("temperature_annealing", None, "Added at first, fading to 0 in the end."),
    flags.DEFINE_integer("top_k", None, "Draw among the k most likely codes; 0 for all."),
    flags.DEFINE_float("top_p", None, "Draw among the codes that make up this probability."),
    flags.DEFINE_string("order", None, f"One of {', '.join(ORDERS)}."),
    flags.DEFINE_float("gumbel_temperature", None, "Noise on the confidence, 0 or more."),
    flags.DEFINE_bool("halton_roll", None, "Shift the Halton order, differently for each image."),
    flags.DEFINE_string("remasking", None, f"One of {', '.join(REMASKING)}."),
    flags.DEFINE_float("remasking_strength", None, "Share taken back in a step, 0 to 1."),
    flags.DEFINE_string("remasking_choice", None, f"One of {', '.join(CHOICES)}."),
]
flags.adopt_module_key_flags(cli)


def sample(
    workdir: os.PathLike | str,
    out: os.PathLike | str,
    *,
    labels: Sequence[int] | None = None,
    num_per_label: int = 1,
    tokenizer: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    **sampler: Any,
) -> None:
    """Generate images, write them, and say so on one line.

    Args:
        workdir: directory of a training run, or a model directory.
        out: FILE.png, FILE.npz or a directory that is new or empty.
        labels: classes in the order of the images; every class once if `None`.
        num_per_label: images of each of them.
        tokenizer: tokenizer to use instead of the run's; a model directory names none.
        seed: seed of all images.
        batch_size: images at a time; it does not change them (float32).
        **sampler: fields of `SamplerConfig` that differ from the run's; `None` means no change.

    Raises:
        ValueError: if a setting or label is not allowed, or tokenizer and model do not fit.
        FileNotFoundError: if there is no model, or no checkpoint of it yet.
        FileExistsError: if `out` is a directory that holds something.
    """
    with open_writer(out, columns=num_per_label if num_per_label > 1 else None) as write:
        model = loading.load_model(workdir)
        config = build.sampler_config(model.run, **sampler)
        vq = open_tokenizer(model, workdir, tokenizer)
        classes = np.arange(model.config.num_classes) if labels is None else np.asarray(labels)
        loading.check_range("label", classes, model.config.num_classes + 1)
        classes = np.repeat(classes.astype(np.int32), num_per_label)
        began = time.monotonic()
        tokens = generator.generate_tokens(
            model.config, model.params, classes, config, seed=seed, batch_size=batch_size
        )
        images = generator.decode_images(vq, tokens, batch_size=batch_size)
        seconds = time.monotonic() - began
        write(images, classes)
    height, width = images.shape[1:3]
    cli.say(
        f"{out}: {len(images)} images of {height}×{width} pixels in {seconds:.1f} s, compilation "
        f"included ({len(images) / seconds:.1f} images/s); {config.num_steps} steps, "
        f"{config.schedule} {config.schedule_form}, {config.guidance_schedule} guidance "
        f"{config.guidance_scale:g}, temperature {config.temperature:g}, "
        f"Gumbel {config.gumbel_temperature:g}, seed {seed}"
    )


def open_tokenizer(model: loading.Model, workdir: os.PathLike | str, path: str | None) -> Tokenizer:
    """Load the tokenizer at `path`, by default the run's, and check that it fits the model."""
    path = path or model.run.tokenizer.path
    if not path:
        raise ValueError(f"{workdir} names no tokenizer; name the right one with --tokenizer")
    tokenizer = loading.load_tokenizer(path)
    run = model.run
    if checkpoints.is_model_dir(workdir):
        # It records no image size, so the grid decides.
        factor = tokenizer.spec.downsample_factor
        run.data.image_size = tuple(side * factor for side in model.config.grid_size)
    build.check_fit(run, tokenizer.spec, num_classes=None)
    return tokenizer


@contextlib.contextmanager
def open_writer(out: os.PathLike | str, columns: int | None = None) -> Iterator[Writer]:
    """Yield what writes uint8 images [b H W c] and labels [b]; refuse first what it could not.

    Args:
        out: FILE.png (replaced), FILE.npz (replaced) or a directory that is new or empty.
        columns: of the grid in FILE.png; if `None`, one row of up to `MAX_ROW` images, or about as
            many columns as rows.
    """
    path = pathlib.Path(out)
    suffix = path.suffix.lower()
    if path.is_dir() or not suffix[1:].isalpha():
        with checkpoints.new_directory(path) as directory:
            yield functools.partial(_write_each, directory)
    elif suffix == ".png":
        yield functools.partial(_write_grid, path, columns)
    elif suffix == ".npz":
        yield functools.partial(_write_arrays, path)
    else:
        raise ValueError(f"--out {path} ends in {suffix}; allowed: .png, .npz, or a directory")


def _write_grid(path: pathlib.Path, columns: int | None, images: np.ndarray, _: np.ndarray) -> None:
    if columns is None and len(images) <= MAX_ROW:
        columns = len(images)
    pictures.save_png(path, pictures.make_grid(images, columns=columns))


def _write_each(directory: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> None:
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        pictures.save_png(directory / f"{index:06}_label{label}.png", image)


def _write_arrays(path: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, arr_0=images, labels=labels)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def parse_labels(text: str) -> list[int]:
    """Read classes separated by commas.

    Raises:
        ValueError: if one of them is not a whole number.
    """
    items = [item.strip() for item in text.split(",")]
    for item in items:
        if not item.isdecimal():
            raise ValueError(f"--labels {text!r}: {item!r} is no class; write numbers: 3,1,4")
    return [int(item) for item in items]


def main(argv: list[str]) -> None:
    """Read the flags and sample."""
    cli.start(argv)
    cli.exit_on_user_error(
        lambda: sample(
            cli.WORKDIR.value,
            _OUT.value,
            labels=None if _LABELS.value is None else parse_labels(_LABELS.value),
            num_per_label=_NUM_PER_LABEL.value,
            tokenizer=_TOKENIZER.value,
            seed=_SEED.value,
            batch_size=_BATCH_SIZE.value,
            **{flag.name: flag.value for flag in _SAMPLER},
        )
    )


if __name__ == "__main__":
    app.run(main)
