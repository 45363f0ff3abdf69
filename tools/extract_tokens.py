"""Encode a data set of images once, into sharded records of tokens to train from.

    python tools/extract_tokens.py --tokenizer DIR --data folder --path imagenet --split train \
        --image_size 256 --crops ten_crop --out imagenet_tokens

Train from the folder with `--config.data.name=tokens --config.data.path=imagenet_tokens
--config.data.flip=False`. Started again after a kill with the same command, it keeps the shards
that are whole. All devices encode; several processes share the shards: give each
`--coordinator HOST:PORT --num_processes N --process_id I` and the same folder.
"""

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import jax
from extraction.processes import extract
from extraction.shards import Encode, Place
from jax.experimental import multihost_utils

from maskgil_jax import config as schema
from maskgil_jax import loading, sharding
from maskgil_jax.build import data as build
from maskgil_jax.data import crops as crop_kinds
from maskgil_jax.data.crops import Crops
from maskgil_jax.data.errors import DatasetError
from maskgil_jax.data.folder import ImageFolderSource
from maskgil_jax.data.pipeline import Source
from maskgil_jax.data.token_dataset import TokenDataset, TokenizerOrigin
from maskgil_jax.tokenizers.base import Tokenizer

IMAGE_SETS = tuple(name for name in build.DATASETS if name != "tokens")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="directory, hf:// address or asset:NAME")
    add("--out", required=True, type=pathlib.Path, help="folder to write")
    add("--data", required=True, choices=IMAGE_SETS, help="kind of data set")
    add("--path", default="", help="folder: root of <split>/<class>/<image>; tfds: data_dir")
    add("--tfds_name", help="name of a prepared TFDS data set (default: imagenet2012)")
    add("--split", default="train")
    add("--image_size", required=True, type=int, help="side of the encoded squares in pixels")
    add("--crops", default="center", choices=crop_kinds.KINDS, help="what is encoded of an image")
    add("--crop_scales", help="of ten_crop: sides of the larger squares (default: 1.1,1.05)")
    add("--captions", action="store_true", help="keep the texts of the images")
    add("--batch_size", type=int, default=64, help="crops at a time, on all devices together")
    add("--num_shards", type=int, default=16, help="files to write")
    add("--num_threads", type=int, default=8, help="threads that read and crop images")
    add("--max_bad_images", type=int, default=0, help="unreadable images to leave out and list")
    add("--distributed", action="store_true", help="join the processes the cluster started")
    add("--coordinator", help="HOST:PORT of process 0")
    add("--num_processes", type=int, help="number of processes")
    add("--process_id", type=int, help="index of this process")
    return parser


def open_source(args: argparse.Namespace) -> Source:
    """Open the data set of images that the command line names.

    Raises:
        ValueError: a flag that the kind of data set does not have, or no such data set.
    """
    if args.data in ("digits", "canvases") and args.path:
        raise ValueError(f"--path {args.path!r} is given, but {args.data} have no folder")
    if args.data != "tfds" and args.tfds_name is not None:
        raise ValueError(f"--tfds_name {args.tfds_name!r} is given, but --data is {args.data}")
    config = schema.preset()
    config.data.name, config.data.path, config.data.split = args.data, args.path, args.split
    if args.tfds_name is not None:
        config.data.tfds_name = args.tfds_name
    # None is replaced by another: that would store an image twice.
    config.data.max_bad_images = 0
    return build.make_source(config)


def describe(
    args: argparse.Namespace, source: Source, tokenizer: Tokenizer, crops: Crops
) -> TokenDataset:
    """Return what the command line asks for.

    Raises:
        ValueError: the image size does not suit the tokenizer, captions are asked for that are not
            there, or the number of shards is out of range.
    """
    spec = tokenizer.spec
    spec.grid_size(args.image_size, args.image_size)
    if spec.image_channels != 3:
        raise ValueError(f"the tokenizer takes {spec.image_channels} channels; images have 3 (RGB)")
    if args.captions and "caption" not in (fields := source[0]):
        raise DatasetError(
            f"--captions is given, but records of {source.name} have only {sorted(fields)}"
        )
    return TokenDataset(
        tokenizer=TokenizerOrigin(
            family=spec.family,
            path=args.tokenizer,
            fingerprint=tokenizer.fingerprint,
            codebook_size=spec.codebook_size,
            downsample_factor=spec.downsample_factor,
            dtype=tokenizer.config.to_dict()["dtype"],
        ),
        source=_identify(source),
        source_records=len(source),
        num_classes=getattr(source, "num_classes", None),
        has_captions=args.captions,
        image_size=(args.image_size, args.image_size),
        crops=crops.names,
        batch_size=args.batch_size,
        num_shards=args.num_shards,
    )


def _identify(source: Source) -> str:
    """Return the name of a data set, of a folder with a sum over the names of its files.

    Files that came and went between two starts would leave images out, or have them twice.
    """
    if isinstance(source, ImageFolderSource):
        return f"{source.name} {source.fingerprint[:12]}"
    return source.name


def make_crops(args: argparse.Namespace) -> Crops:
    """Return the crops that the command line asks for."""
    text = args.crop_scales
    try:
        scales = tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError as error:
        raise ValueError(f"--crop_scales {text!r}: write numbers, such as 1.1,1.05") from error
    if text is None and args.crops == "ten_crop":
        scales = crop_kinds.SCALES
    return Crops(kind=args.crops, size=args.image_size, scales=scales)


def make_encode(tokenizer: Tokenizer) -> tuple[Encode, sharding.Mesh]:
    """Return the encoder on all devices of this process, and their mesh."""
    mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
    encoder, rows = build.make_encoder(tokenizer, mesh), sharding.batch_sharding(mesh)
    return lambda x: encoder({"image": jax.device_put(x, rows), "label": None})["tokens"], mesh


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Extract what the command line asks for, and return the report that is printed."""
    for name in ("batch_size", "num_shards", "num_threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.max_bad_images < 0:
        raise ValueError(f"--max_bad_images {args.max_bad_images} must be at least 0")
    began = time.monotonic()
    crops, source = make_crops(args), open_source(args)
    tokenizer = loading.load_tokenizer(args.tokenizer)
    encode, mesh = make_encode(tokenizer)
    sharding.check_batch_size("--batch_size", args.batch_size, mesh)
    finished = extract(
        describe(args, source, tokenizer, crops),
        source,
        crops,
        encode,
        args.out,
        place=Place(index=jax.process_index(), count=jax.process_count()),
        max_bad_images=args.max_bad_images,
        num_threads=args.num_threads,
        synchronise=lambda: multihost_utils.sync_global_devices("extraction"),
    )
    return {
        "out": str(args.out),
        "images": finished.count,
        "skipped": sum(len(shard.skipped) for shard in finished.shards),
        "crops": len(finished.crops),
        "grid": finished.grid,
        "dtype": finished.layout.dtype,
        "seconds": round(time.monotonic() - began, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Extract; return the exit status, 1 after a refusal with its reason on stderr."""
    args = build_parser().parse_args(arguments)
    numbers = (args.num_processes, args.process_id)
    try:
        sharding.split_cpu(args.batch_size)
        if not (args.distributed or args.coordinator) and numbers != (None, None):
            raise ValueError("--num_processes and --process_id need --coordinator")
        if args.distributed or args.coordinator:
            jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
        report = run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Place(index=jax.process_index()).say(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
