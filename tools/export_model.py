"""Write a model, its sampler and its tokenizer as one file that runs without this package.

    python tools/export_model.py --workdir runs/digits --out digits.mgx --num_steps 8
    python tools/load_exported.py digits.mgx --labels 3,1,4 --seed 0 --out images.npy

The whole way from labels and a seed to uint8 pixels is one StableHLO program (`jax.export`), for
any number of images, beside the weights that it reads. `load_exported.py` runs it: one module to
copy, which needs JAX, NumPy and flatbuffers. Its images are those of `ImageGenerator`, to the bit
with the same `batch_size` (float32, CPU). Sampler flags are those of
`python -m maskgil_jax.sample`; what is left out keeps the run's value.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax import export
from load_exported import FORMAT, HEADER, NPY, PROGRAM, VERSION, WEIGHTS

import maskgil_jax
from maskgil_jax import ImageGenerator, cli, masking, programs
from maskgil_jax.decoding import masked
from maskgil_jax.decoding.autoregressive import AutoregressiveConfig
from maskgil_jax.models.base import count_classes

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workdir", required=True, help="run directory, or model directory or its hf:// address")
    add("--out", required=True, type=pathlib.Path, help="file to write, such as digits.mgx")
    add("--tokenizer", help="directory, hf:// address or asset:NAME (default: the run's)")
    add(
        "--batch_size",
        type=int,
        default=64,
        help="images at a time, at most (may be changed later)",
    )
    add("--size", help="HxW in pixels, such as 32x48 (default: the trained size)")
    add("--platforms", default="cpu,cuda,tpu", help=f"where it is to run: {','.join(PLATFORMS)}")
    sampler = parser.add_argument_group("sampler", "See python -m maskgil_jax.sample --help.")
    for field in {
        field.name: field
        for kind in (AutoregressiveConfig, masked.SamplerConfig)
        for field in dataclasses.fields(kind)
    }.values():
        if field.type is bool:
            for flag, value in ((field.name, True), (f"no{field.name}", False)):
                sampler.add_argument(
                    f"--{flag}", dest=field.name, action="store_const", const=value
                )
        else:
            sampler.add_argument(f"--{field.name}", type=type(field.default))
    return parser


def parse_platforms(text: str) -> tuple[str, ...]:
    """Read platforms separated by commas.

    Raises:
        ValueError: if one is unknown or is named twice.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        masking.check_choice("platform", name, PLATFORMS)
    if len(set(names)) < len(names):
        raise ValueError(f"--platforms {text!r} names a platform twice")
    return names


def export_program(
    run: Callable[..., Any], weights: Mapping[str, jax.Array], platforms: Sequence[str]
) -> tuple[bytes, list[str]]:
    """Lower labels to pixels, for any number of images.

    Args:
        run: what `make_image_fn` returns.
        weights: parameters under `model/…` and `tokenizer/…`.
        platforms: where it is to run.

    Returns:
        `(weights, labels int32 [b], seed uint32 [], indices uint32 [b]) → (images, finite)`,
        serialised; and the names of the weights that it reads: the tokenizer's encoder is none.
    """

    def program(weights, labels, seed, indices):
        trees = traverse_util.unflatten_dict(weights, sep="/")
        keys = masked.image_keys(seed, indices)
        return run(trees["model"], trees["tokenizer"], labels, keys)

    def lower(names, batch, platforms):
        shapes = {n: jax.ShapeDtypeStruct(weights[n].shape, weights[n].dtype) for n in names}
        labels, indices = (jax.ShapeDtypeStruct((batch,), x) for x in (np.int32, np.uint32))
        seed = jax.ShapeDtypeStruct((), np.uint32)
        return export.export(jax.jit(program), platforms=platforms)(shapes, labels, seed, indices)

    with _without_source_lines():
        # With a known batch JAX drops what is not read; with an unknown one it keeps everything.
        names = sorted(weights)
        kept = lower(names, 1, platforms[:1]).module_kept_var_idx
        read = [name for index, name in enumerate(names) if index in kept]
        (any_batch,) = export.symbolic_shape("b", constraints=["b >= 1"])
        exported = lower(read, any_batch, platforms)
        return bytes(exported.serialize()), read


@contextlib.contextmanager
def _without_source_lines():
    """Let programs not name the lines of source that made them, nor where they lay on this machine.

    Equal models then make equal programs, whoever exports them.
    """
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def write_file(
    path: pathlib.Path,
    header: Mapping[str, Any],
    program: bytes,
    weights: Mapping[str, jax.Array],
) -> None:
    """Write header, program and weights; the file appears whole or not at all."""
    sums: dict[str, str] = {}

    def put(archive: zipfile.ZipFile, name: str, part: bytes) -> None:
        # Always of the same time, so that equal models make equal files.
        archive.writestr(zipfile.ZipInfo(name), part)
        sums[name] = hashlib.sha256(part).hexdigest()

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            put(archive, PROGRAM, program)
            for name, array in weights.items():
                buffer = io.BytesIO()
                np.save(buffer, np.asarray(array))
                put(archive, f"{WEIGHTS}{name}{NPY}", buffer.getvalue())
            text = json.dumps({**header, "sha256": dict(sums)}, indent=2, ensure_ascii=False)
            put(archive, HEADER, text.encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def export_model(
    workdir: os.PathLike | str,
    out: os.PathLike | str,
    *,
    tokenizer: str | None = None,
    batch_size: int = 64,
    size: tuple[int, int] | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    **sampler: Any,
) -> dict[str, Any]:
    """Write one file and return its header.

    Args:
        workdir: directory of a training run, or a model directory, here or on the hub
            (`hf://owner/repo[/folder][@revision]`).
        out: file to write, replaced if it exists.
        tokenizer: tokenizer to use instead of the run's; a model directory names none.
        batch_size: images at a time, at most; the loader may be told otherwise.
        size: (H, W) in pixels, multiples of the tokenizer's factor; the trained one if `None`.
        platforms: where it is to run, of `PLATFORMS`.
        **sampler: fields of `SamplerConfig`, of a causal model of `AutoregressiveConfig`, that
            differ from the run's; `None` means no change.

    Raises:
        ValueError: if a setting is not allowed, tokenizer and model do not fit, or the model is
            conditioned on captions.
        FileNotFoundError: if there is no model, or no checkpoint of it yet.
        ImportError: if flatbuffers is missing, or the client of the hub that is asked.
    """
    made = ImageGenerator.from_checkpoint(workdir, tokenizer=tokenizer, batch_size=batch_size)
    model, spec = made.model.config, made.tokenizer.spec
    num_classes = count_classes(model)
    grid_size = model.grid_size if size is None else spec.grid_size(*size)
    changes = {name: value for name, value in sampler.items() if value is not None}
    config = made.sampler(grid_size, **changes)
    trees = {"model": made.model.params, "tokenizer": dict(made.tokenizer.params)}
    weights = traverse_util.flatten_dict(trees, sep="/")
    run = programs.make_image_fn(model, made.tokenizer.config, config, grid_size)
    program, names = export_program(run, weights, platforms)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "maskgil_jax": maskgil_jax.__version__,
        "jax": jax.__version__,
        "platforms": list(platforms),
        "image_size": [side * spec.downsample_factor for side in grid_size],
        "image_channels": spec.image_channels,
        "grid_size": list(grid_size),
        "num_classes": num_classes,
        "batch_size": batch_size,
        "sampler": dataclasses.asdict(config),
        "model": {"family": model.family, **model.to_dict()},
        "tokenizer": {"family": spec.family, **made.tokenizer.config.to_dict()},
    }
    write_file(pathlib.Path(out), header, program, {name: weights[name] for name in names})
    return header


def main(arguments: list[str] | None = None) -> int:
    """Export; return the exit status, 1 after a refusal with its reason on stderr."""
    values = vars(build_parser().parse_args(arguments))
    began = time.monotonic()
    try:
        values["size"] = None if values["size"] is None else cli.parse_size(values["size"])
        values["platforms"] = parse_platforms(values["platforms"])
        out = values.pop("out")
        header = export_model(values.pop("workdir"), out, **values)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    height, width = header["image_size"]
    steps = header["sampler"].get("num_steps")
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, {height}×{width} pixels, "
        f"{header['num_classes']} classes, "
        f"{'token by token' if steps is None else f'{steps} steps'}, for "
        f"{', '.join(header['platforms'])}; {time.monotonic() - began:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
