"""Sample images: `python -m maskgil_jax.sample --workdir DIR --labels 3,1,4 --out grid.png`.

A text-conditional model takes `--prompt "…"`, which may be repeated, or `--prompts_file FILE` with
one on every line, and `--num_per_prompt`.

`--out` says what is written: FILE.png a grid, FILE.npz the arrays `arr_0` (uint8, NHWC) and
`labels`, anything else a new directory of PNGs, `000000_label3.png` and so on; with `--records` a
new directory of codes, not decoded, to train from like those of `tools/extract_tokens.py`. All but
the grid are written chunk by chunk, and go on after a kill when the same command is started again.
Sampler flags that are not given keep the values of the run's configuration.

`--edit FILE` makes a picture's part anew (`--mask FILE`, white is generated), continues it beyond
its edges (`--outpaint TOP,BOTTOM,LEFT,RIGHT`) or varies it (`--vary KEEP`).

Several processes that see the same folder share the images: give each `--coordinator HOST:PORT
--num_processes N --process_id I`; on Cloud TPU pods and SLURM `--distributed` alone finds them.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from maskgil_jax import bulk, checkpoints, cli, compilation, loading, masking, pictures, sharding
from maskgil_jax.asked import Asked, parse_labels, read_prompts
from maskgil_jax.build.sizes import check_size
from maskgil_jax.data.token_dataset import TokenDataset, TokenizerOrigin
from maskgil_jax.decoding.guidance import GUIDANCE_SCHEDULES
from maskgil_jax.decoding.orders import ORDERS
from maskgil_jax.decoding.remasking import CHOICES, REMASKING
from maskgil_jax.drafts import load_drafting
from maskgil_jax.generation import padded_size
from maskgil_jax.generator import ImageGenerator
from maskgil_jax.photo_edit import Edit, read_edit

MAX_ROW = 8
_PROMPTS_NAME = "prompts.txt"
# Files of token records: at most so many, of at least so many records but for the only one.
MAX_SHARDS, MIN_SHARD_RECORDS = 16, 4096

_LABELS = flags.DEFINE_string(
    "labels", None, "Classes, such as 3,1,4; the number of classes means none. Default: every one."
)
_NUM_PER_CLASS = flags.DEFINE_integer("num_per_class", 1, "Images of each.", lower_bound=1)
_PROMPT = flags.DEFINE_multi_string("prompt", None, "What an image shows; may be repeated.")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "UTF-8 text, a prompt on every line.")
_NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", None, "What guidance leads away from.")
_NUM_PER_PROMPT = flags.DEFINE_integer("num_per_prompt", 1, "Images of each.", lower_bound=1)
_TEXT_ENCODER = flags.DEFINE_string(
    "text_encoder", None, "Directory of what reads the prompts. Default: the run's."
)
_OUT = flags.DEFINE_string("out", "samples.png", "FILE.png, FILE.npz or a new directory.")
_RECORDS = flags.DEFINE_bool(
    "records", False, "Write codes to train from, not pictures, into the new directory --out."
)
_SIZE = flags.DEFINE_string("size", None, "HxW of the images in pixels. Default: as trained.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer to use instead of the run's.")
_TILE_SIZE = flags.DEFINE_integer(
    "tile_size", None, "Pixels: larger images go through the tokenizer in tiles. Default: whole."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all images.", lower_bound=0)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at a time.", lower_bound=1)
_BATCH_INVARIANT = flags.DEFINE_bool(
    "batch_invariant", False, "Compute every image alone: the same bits for every batch size."
)
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Directory that keeps what was compiled; empty for none. Default: $JAX_COMPILATION_CACHE_DIR, "
    "else maskgil_jax in the user's cache directory.",
)

_AR_CHECKPOINT = flags.DEFINE_string(
    "ar_checkpoint", None, "Run or model directory of a causal model that begins every image."
)
_AR_SHARE = flags.DEFINE_float(
    "ar_share", None, "Share of the tokens that it draws, 0 to 1. Default: 0.25."
)

_EDIT = flags.DEFINE_string("edit", None, "Picture to edit; needs --labels or --prompt.")
_MASK = flags.DEFINE_string("mask", None, "Picture of its size, white where to generate.")
_OUTPAINT = flags.DEFINE_string("outpaint", None, "Pixels to add: TOP,BOTTOM,LEFT,RIGHT.")
_VARY = flags.DEFINE_float("vary", None, "Share of the tokens to keep; the others are drawn anew.")
_GROW = flags.DEFINE_integer("grow", None, "Widen the generated part by as many tokens.")
_FEATHER = flags.DEFINE_float("feather", None, "Pixels of transition around the mask.")

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
    flags.DEFINE_integer("guided_tokens", None, "Of a causal model: guide so many; 0 for all."),
    flags.DEFINE_float("ar_guidance_scale", None, "Of --ar_checkpoint: 0 or more; 1 is none."),
    flags.DEFINE_integer("ar_guided_tokens", None, "Of --ar_checkpoint: guide so many; 0: all."),
    flags.DEFINE_float("ar_temperature", None, "Of the codes of --ar_checkpoint, 0 or more."),
    flags.DEFINE_integer("ar_top_k", None, "As --top_k, of --ar_checkpoint."),
    flags.DEFINE_float("ar_top_p", None, "As --top_p, of --ar_checkpoint."),
]
flags.adopt_module_key_flags(cli)


def sample(
    workdir: os.PathLike | str,
    out: os.PathLike | str,
    *,
    labels: Sequence[int] | None = None,
    num_per_class: int = 1,
    prompts: Sequence[str] | None = None,
    negative_prompt: str | None = None,
    num_per_prompt: int = 1,
    text_encoder: str | None = None,
    records: bool = False,
    size: tuple[int, int] | None = None,
    edit: Edit | None = None,
    ar_checkpoint: str | None = None,
    ar_share: float | None = None,
    tokenizer: str | None = None,
    tile_size: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    batch_invariant: bool = False,
    **sampler: Any,
) -> None:
    """Generate images, write them, and say so on one line.

    Args:
        workdir: directory of a training run, or a model directory, here or on the hub
            (`hf://owner/repo[/folder][@revision]`).
        out: FILE.png, FILE.npz or a directory that is new or empty.
        labels: classes in the order of the images; every class once if `None`.
        num_per_class: images of each of them.
        prompts: what the images show, of a text-conditional model.
        negative_prompt: what guidance leads away from.
        num_per_prompt: images of each prompt.
        text_encoder: what reads prompts, instead of the run's.
        records: whether to write token records into the directory `out`, and no pixels.
        size: height and width in pixels; as trained if `None`.
        edit: picture to start from, and what to do with it.
        ar_checkpoint: directory of a causal model that begins every image, or, where there are
            prompts, of a Lumina-mGPT.
        ar_share: share of the tokens that it draws, 0 to 1; a quarter if `None`.
        tokenizer: tokenizer to use instead of the run's; a model directory names none.
        tile_size: side in pixels of the tiles in which the tokenizer encodes and decodes larger
            images; every image is taken whole if `None`.
        seed: seed of all images.
        batch_size: images at a time. Another one rounds differently, which now and then decides
            between two nearly equal codes.
        batch_invariant: whether every image is computed alone, so that it does not: in float32 on
            a CPU its bits are those of any other batch size or number of devices or processes.
        **sampler: fields of `SamplerConfig` that differ from the run's, of `AutoregressiveConfig`
            for a causal model, and with `ar_` in front for `ar_checkpoint`; `None` means no change.

    Raises:
        ValueError: if a setting or label is not allowed, tokenizer and model do not fit, or `out`
            was begun with other settings.
        FileNotFoundError: if there is no model, or no checkpoint of it yet.
        FileExistsError: if `out` is a directory that holds something.
        MemoryError: if the device's memory does not suffice for the tokenizer.
    """
    path, is_grid = pathlib.Path(out), check_out(out, records)
    if is_grid and jax.process_count() > 1:
        raise ValueError(
            f"--out {out} is a grid, which one process makes; several write FILE.npz or a directory"
        )
    if edit is not None and size is not None:
        raise ValueError("--size and --edit exclude each other: the picture has a size")
    if edit is not None and labels is None and prompts is None:
        raise ValueError("--edit needs --labels or --prompt, for the results")
    if edit is not None and records:
        raise ValueError("--records and --edit exclude each other: what an edit keeps are pixels")
    if records and tile_size is not None:
        raise ValueError("--records and --tile_size exclude each other: no pixels are decoded")
    if edit is not None and ar_checkpoint is not None:
        raise ValueError(
            "--edit and --ar_checkpoint exclude each other: an edit keeps tokens, which a causal "
            "model cannot begin before"
        )
    sampler = {name: value for name, value in sampler.items() if value is not None}
    model = loading.load_model(workdir)
    vq = loading.open_tokenizer(model, workdir, tokenizer, tile_size=tile_size)
    encoder = loading.open_text_encoder(model, workdir, text_encoder)
    # Several processes share the images, not the batches.
    mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
    ar_model = None
    if ar_checkpoint is not None:
        ar_model = load_drafting(ar_checkpoint, vq, encoder, mesh=mesh, whole=batch_invariant)
    generator = ImageGenerator(
        model,
        vq,
        ar_model=ar_model,
        ar_share=ar_share,
        text_encoder=encoder,
        batch_size=batch_size,
        mesh=mesh,
        batch_invariant=batch_invariant,
    )
    height, width = find_size(generator, size, edit)
    own, drafted = generator.split_settings(sampler)
    config = generator.sampler(vq.spec.grid_size(height, width), **own)
    begins = None if generator.drafter is None else generator.drafter.describe(drafted)
    asked = Asked.read(
        model,
        labels=labels,
        num_per_class=num_per_class,
        prompts=prompts,
        negative_prompt=negative_prompt,
        num_per_prompt=num_per_prompt,
        records=records,
    )
    if asked.prompts:
        # All of them, before the first image is made.
        generator.check_prompts(asked.prompts, asked.negative_prompt, (height, width))
    image_labels = asked.image_labels
    began, kept, shards = time.monotonic(), 0, sharding.batch_shards(mesh)
    chunk_size = padded_size(min(batch_size, len(image_labels)), shards)
    one_call: Callable[..., np.ndarray] = generator.tokens if records else generator
    call: Callable[..., np.ndarray] = functools.partial(one_call, size=(height, width))
    if edit is not None:
        call = functools.partial(_edit, edit, generator)
    make = asked.bind(functools.partial(call, seed=seed, **sampler))
    if not batch_invariant:
        make = functools.partial(_fill_up, make, chunk_size)
    if is_grid:
        starts = range(0, len(image_labels), chunk_size)
        parts = [
            make(image_labels[first : first + chunk_size], first_index=first) for first in starts
        ]
        images = np.concatenate(parts)
        _write_grid(path, images, asked.num_per_choice, bare=edit is not None)
    else:
        settings = {
            "model": model.fingerprint,
            "tokenizer": vq.fingerprint,
            "tokenizer_dtype": vq.config.to_dict()["dtype"],
            "text_encoder": None if encoder is None else encoder.fingerprint,
            "tile_size": tile_size,
            **asked.settings,
            "records": records,
            "size": [height, width],
            "edit": edit.settings if edit else None,
            "seed": seed,
            "sampler": dataclasses.asdict(config),
            "begins": begins and begins.settings,
            "batch_size": batch_size,
            "batch_invariant": batch_invariant,
            "chunk_size": chunk_size,
            "platform": jax.default_backend(),
            "devices": shards,
            "jax": jax.__version__,
        }
        origin = str(tokenizer or model.run.tokenizer.path)
        pixels = (height, width, vq.spec.image_channels)
        job = bulk.Job(
            out=path,
            labels=image_labels,
            noun="label" if prompts is None else "prompt",
            shape=vq.spec.grid_size(height, width) if records else pixels,
            chunk_size=chunk_size,
            settings=settings,
            records=describe_records(generator, origin, settings) if records else None,
        )
        kept = bulk.write(job, lambda first, labels: make(labels, first_index=first))
        if prompts is not None and jax.process_index() == 0:
            beside = path / _PROMPTS_NAME if path.is_dir() else f"{path}.{_PROMPTS_NAME}"
            lines = (" ".join(prompt.splitlines()) for prompt in asked.prompts)
            checkpoints.write_text_atomically(beside, "".join(f"{line}\n" for line in lines))
    seconds, made = time.monotonic() - began, len(image_labels) - kept
    cli.say(
        f"{out}: {len(image_labels)} {'records' if records else 'images'} of "
        f"{height}×{width} pixels in {seconds:.1f} s, "
        f"compilation included ({made / seconds:.1f} images/s)"
        + (f", {kept} of them kept from an earlier start" if kept else "")
        + ("" if begins is None else f"; {begins.text}")
        + f"; {config.describe()}, seed {seed}"
    )


def describe_records(
    generator: ImageGenerator, tokenizer: str, settings: Mapping[str, Any]
) -> TokenDataset:
    """Return what the token records of a job are, in the terms of an extraction.

    Args:
        generator: makes the codes.
        tokenizer: where its tokenizer came from.
        settings: of the job.
    """
    vq, model = generator.tokenizer, generator.model
    count = len(settings["labels"]) * settings["num_per_class"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return TokenDataset(
        tokenizer=TokenizerOrigin(
            family=vq.spec.family,
            path=tokenizer,
            fingerprint=vq.fingerprint,
            codebook_size=vq.spec.codebook_size,
            downsample_factor=vq.spec.downsample_factor,
            dtype=vq.config.to_dict()["dtype"],
        ),
        source=f"samples of {model.config.family} {model.fingerprint[:12]}, settings {digest[:12]}",
        source_records=count,
        num_classes=model.num_classes,
        has_captions=False,
        image_size=tuple(settings["size"]),
        crops=("whole",),
        batch_size=settings["batch_size"],
        num_shards=min(MAX_SHARDS, -(-count // MIN_SHARD_RECORDS)),
    )


def check_out(out: os.PathLike | str, records: bool = False) -> bool:
    """Return whether `out` names a grid, after refusing what could not be written.

    Args:
        out: what is to be written.
        records: whether it must be a directory.

    Raises:
        ValueError: if it ends in something else than .png, .npz or no suffix, or names a file where
            a directory is needed.
        FileExistsError: if it is a directory that holds something.
    """
    path = pathlib.Path(out)
    suffix = path.suffix.lower()
    if records and suffix in (".png", ".npz"):
        raise ValueError(f"--out {path} ends in {suffix}; with --records name a new directory")
    if suffix == ".png" and not path.is_dir():
        return True
    if suffix not in (".png", ".npz") and suffix[1:].isalpha() and not path.is_dir():
        raise ValueError(f"--out {path} ends in {suffix}; allowed: .png, .npz, or a directory")
    bulk.check_out(path)
    return False


def find_size(
    generator: ImageGenerator, size: tuple[int, int] | None, edit: Edit | None
) -> tuple[int, int]:
    """Return height and width of the results in pixels.

    Raises:
        ValueError: if they are no multiples of the tokenizer's factor.
    """
    spec, (gh, gw) = generator.tokenizer.spec, generator.model.config.grid_size
    trained = (gh * spec.downsample_factor, gw * spec.downsample_factor)
    height, width = edit.size if edit is not None else size or trained
    check_size(generator.model.run, (height, width))
    spec.grid_size(height, width)
    return height, width


def _fill_up(
    call: Callable[..., np.ndarray], chunk_size: int, labels: np.ndarray, *, first_index: int
) -> np.ndarray:
    # The last chunk is filled up, as the last batch of one call would be: same sums, same bits.
    padding = max(0, chunk_size - len(labels)) if first_index else 0
    padded = np.pad(labels, (0, padding), "edge")
    return call(padded, first_index=first_index)[: len(labels)]


def _edit(edit: Edit, generator: ImageGenerator, **options: Any) -> np.ndarray:
    count = len(options["labels"] if "labels" in options else options["prompts"])
    return edit.apply(generator, count, **options).images


def _write_grid(path: pathlib.Path, images: np.ndarray, num_per_class: int, *, bare: bool) -> None:
    if bare and len(images) == 1:
        pictures.save_png(path, images[0])
        return
    columns = num_per_class if num_per_class > 1 else None
    if columns is None and len(images) <= MAX_ROW:
        columns = len(images)
    pictures.save_png(path, pictures.make_grid(images, columns=columns))


def parse_outpaint(text: str) -> tuple[int, int, int, int]:
    """Read four numbers separated by commas.

    Raises:
        ValueError: if the text is something else.
    """
    items = [item.strip() for item in text.split(",")]
    if len(items) != 4 or not all(item.isdecimal() for item in items):
        raise ValueError(
            f"--outpaint {text!r}: write the pixels to add at TOP,BOTTOM,LEFT,RIGHT: 0,0,64,64"
        )
    top, bottom, left, right = map(int, items)
    return top, bottom, left, right


def run() -> None:
    """Sample as the flags say."""
    if _PROMPT.value and _PROMPTS_FILE.value:
        raise ValueError("--prompt and --prompts_file exclude each other")
    prompts = read_prompts(_PROMPTS_FILE.value) if _PROMPTS_FILE.value else _PROMPT.value
    labels = None if _LABELS.value is None else parse_labels(_LABELS.value)
    size = None if _SIZE.value is None else cli.parse_size(_SIZE.value)
    edit = read_edit(
        _EDIT.value,
        _MASK.value,
        outpaint=None if _OUTPAINT.value is None else parse_outpaint(_OUTPAINT.value),
        vary=_VARY.value,
        grow=_GROW.value,
        feather=_FEATHER.value,
    )
    compilation.use_cache(_CACHE.value)
    sample(
        cli.WORKDIR.value,
        _OUT.value,
        labels=labels,
        num_per_class=_NUM_PER_CLASS.value,
        prompts=prompts,
        negative_prompt=_NEGATIVE_PROMPT.value,
        num_per_prompt=_NUM_PER_PROMPT.value,
        text_encoder=_TEXT_ENCODER.value,
        records=_RECORDS.value,
        size=size,
        edit=edit,
        ar_checkpoint=_AR_CHECKPOINT.value,
        ar_share=_AR_SHARE.value,
        tokenizer=_TOKENIZER.value,
        tile_size=_TILE_SIZE.value,
        seed=_SEED.value,
        batch_size=_BATCH_SIZE.value,
        batch_invariant=_BATCH_INVARIANT.value,
        **{flag.name: flag.value for flag in _SAMPLER},
    )


def main(argv: list[str]) -> None:
    """Read the flags and sample."""
    cli.start(argv)
    cli.join_processes()
    cli.exit_on_user_error(run, ImportError, MemoryError)


if __name__ == "__main__":
    app.run(main)
