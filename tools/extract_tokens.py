"""Encode a data set of images once, into sharded records of tokens to train from.

    python tools/extract_tokens.py --tokenizer DIR --data folder --path imagenet --split train \
        --image_size 256 --crops ten_crop --out imagenet_tokens

Train from the folder with `--config.data.name=tokens --config.data.path=imagenet_tokens
--config.data.flip=False`. Images with texts, in buckets of one area and many shapes:

    python tools/extract_tokens.py --tokenizer DIR --data captions --format webdataset \
        --path laion --captions --image_size 256 --buckets area --out laion_tokens

With the features of a text encoder, which training then need not compute (docs/text.md):

    python tools/extract_tokens.py … --captions --text_encoder gemma-2b --text_length 120

Started again after a kill with the same command, it keeps the shards
that are whole. All devices encode; several processes share the shards: give each
`--coordinator HOST:PORT --num_processes N --process_id I` and the same folder.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from extraction.features import TextReader
from extraction.processes import extract
from extraction.shards import Encode, Place
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from maskgil_jax import cli, loading, sharding
from maskgil_jax import config as schema
from maskgil_jax.build import captions
from maskgil_jax.build import data as build
from maskgil_jax.build.sizes import bucket_sizes
from maskgil_jax.checkpoints import write_text_atomically
from maskgil_jax.data import crops as crop_kinds
from maskgil_jax.data.buckets import Size, describe_buckets, format_size, split_by_bucket
from maskgil_jax.data.crops import Crops
from maskgil_jax.data.errors import DatasetError, ImageReadError
from maskgil_jax.data.folder import ImageFolderSource
from maskgil_jax.data.pipeline import Source
from maskgil_jax.data.token_buckets import BUCKETS_FILE, describe_token_buckets
from maskgil_jax.data.token_dataset import (
    FEATURE_TYPES,
    TextOrigin,
    TokenDataset,
    TokenizerOrigin,
)
from maskgil_jax.models.maskgil_text import MaskGILTextConfig
from maskgil_jax.text.base import TextEncoder
from maskgil_jax.tokenizers.base import Tokenizer

IMAGE_SETS = tuple(name for name in build.DATASETS if name != "tokens")
# Of --text_encoder, with what they are if they are left out.
TEXT_SETTINGS = {"hidden_layer": -1, "text_length": 120, "text_dtype": "bfloat16"}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="directory, hf:// address or asset:NAME")
    add("--out", required=True, type=pathlib.Path, help="folder to write")
    add("--data", required=True, choices=IMAGE_SETS, help="kind of data set")
    add("--path", default="", help="as data.path: root of <split>/<class>/<image>, data_dir, …")
    add("--format", default="", help=f"of captions: {', '.join(captions.FORMATS)}")
    add("--caption_key", help="of captions in a TFDS data set: feature (default: captions/text)")
    add(
        "--allow_incomplete",
        action="store_true",
        help="captions: leave out and count what lacks an image or a text",
    )
    add("--tfds_name", help="name of a prepared TFDS data set (default: imagenet2012)")
    add("--split", default="train")
    add("--image_size", required=True, type=int, help="side of the encoded squares in pixels")
    shapes = "none, area: other shapes of the same area, too; or listed: those of --bucket_sizes"
    add("--buckets", default="none", help=shapes)
    add("--bucket_sizes", help="heights x widths, such as 64x64,64x96; --image_size among them")
    add("--bucket_multiple", type=int, help="unit of the sides of buckets in pixels (default: 32)")
    add("--bucket_max_ratio", type=float, help="longer over shorter side at most (default: 4)")
    add("--crops", default="center", choices=crop_kinds.KINDS, help="what is encoded of an image")
    add("--crop_scales", help="of ten_crop: sides of the larger squares (default: 1.1,1.05)")
    add("--captions", action="store_true", help="keep the texts of the images")
    add("--text_encoder", help="directory or hf:// address; keep its features of the texts, too")
    add("--hidden_layer", type=int, help="as text.hidden_layer (default: -1, the last)")
    add("--text_length", type=int, help="tokens at which texts are cut (default: 120)")
    add("--text_dtype", choices=tuple(FEATURE_TYPES), help="computed and kept (default: bfloat16)")
    size = "crops at a time, and texts, on all devices together"
    add("--batch_size", type=int, default=64, help=size)
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
    return build.make_source(make_config(args))


def make_config(args: argparse.Namespace) -> ConfigDict:
    """Return the configuration of the data set of images that the command line names.

    Raises:
        ValueError: flags that do not go together.
    """
    config = schema.preset()
    data = config.data
    data.name, data.path, data.split = args.data, args.path, args.split
    data.image_size = (args.image_size, args.image_size)
    for name in ("format", "allow_incomplete", "buckets"):
        data[name] = getattr(args, name)
    for name in ("tfds_name", "caption_key", "bucket_multiple", "bucket_max_ratio"):
        if getattr(args, name) is not None:
            data[name] = getattr(args, name)
    if args.bucket_sizes is not None:
        sizes = args.bucket_sizes.split(",")
        data.bucket_sizes = tuple(cli.parse_size(size, "--bucket_sizes") for size in sizes)
    # None is replaced by another: that would store an image twice.
    data.max_bad_images = 0
    if args.data == "captions":
        # What the tokens are for; how its captions are read is not decided yet.
        config.model.family, config.model.text = MaskGILTextConfig.family, "bytes"
        config.data.flip = False
    captions.check_settings(config)
    return config


def read_first(source: Source, max_bad_images: int) -> Mapping[str, Any] | None:
    """Return the first record that can be read; `None` if too many before it cannot."""
    for index in range(min(len(source), max_bad_images + 1)):
        with contextlib.suppress(ImageReadError):
            return source[index]
    return None  # the extraction counts them, and says so


def check_captions(args: argparse.Namespace, source: Source, crops: Crops) -> None:
    """Refuse captions that are not there, that would be lost, or that would be of mirror images.

    Raises:
        ValueError: saying which.
    """
    if not args.captions:
        if args.data == "captions":
            raise ValueError("--data captions without --captions would lose the texts; add it")
        return
    fields = read_first(source, args.max_bad_images)
    if fields is not None and "caption" not in fields:
        raise DatasetError(
            f"--captions is given, but records of {source.name} have only {sorted(fields)}"
        )
    if any("flip" in name for name in crops.names):
        raise ValueError(
            f"--crops {args.crops} has mirror images, of which captions say left for right and "
            "right for left; use --crops center"
        )


def check_text_flags(args: argparse.Namespace) -> None:
    """Refuse settings of a text encoder that is not there, or that would have nothing to read.

    Raises:
        ValueError: saying which.
    """
    given = [f"--{name}" for name in TEXT_SETTINGS if getattr(args, name) is not None]
    if given and args.text_encoder is None:
        raise ValueError(f"{', '.join(given)} without --text_encoder; name it, or leave them out")
    if args.text_encoder is not None and not args.captions:
        raise ValueError(
            f"--text_encoder {args.text_encoder} without --captions has no texts to read; add it"
        )


def get_text_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the text encoder."""
    given = {name: getattr(args, name) for name in TEXT_SETTINGS}
    return TEXT_SETTINGS | {name: value for name, value in given.items() if value is not None}


def describe(
    args: argparse.Namespace,
    source: Source,
    tokenizer: Tokenizer,
    crops: Crops,
    encoder: TextEncoder | None,
) -> TokenDataset:
    """Return what the command line asks for, of one size of images.

    Raises:
        ValueError: the image size does not suit the tokenizer, or the number of shards is out of
            range.
    """
    spec = tokenizer.spec
    height, width = (crops.size,) * 2 if isinstance(crops.size, int) else crops.size
    spec.grid_size(height, width)
    if spec.image_channels != 3:
        raise ValueError(f"the tokenizer takes {spec.image_channels} channels; images have 3 (RGB)")
    text = None
    if encoder is not None:
        settings = get_text_settings(args)
        text = TextOrigin(
            name=encoder.name,
            path=args.text_encoder,
            fingerprint=encoder.fingerprint,
            hidden_layer=settings["hidden_layer"],
            width=encoder.width,
            dtype=settings["text_dtype"],
            length=encoder.max_length,
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
        image_size=(height, width),
        crops=crops.names,
        batch_size=args.batch_size,
        # The images of a bucket may be fewer than the shards.
        num_shards=min(args.num_shards, len(source)) if args.buckets != "none" else args.num_shards,
        text=text,
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


def load_text_encoder(args: argparse.Namespace) -> TextEncoder | None:
    """Return the text encoder that the command line names; `None` if it names none."""
    if args.text_encoder is None:
        return None
    settings = get_text_settings(args)
    return loading.load_text_encoder(
        args.text_encoder,
        max_length=settings["text_length"],
        hidden_layer=settings["hidden_layer"],
        dtype=settings["text_dtype"],
    )


def make_text_reader(
    args: argparse.Namespace, encoder: TextEncoder, mesh: sharding.Mesh
) -> TextReader:
    """Return what reads texts, by the program that training computes their features with."""
    dtype = FEATURE_TYPES[get_text_settings(args)["text_dtype"]]
    if not encoder.jittable:
        return TextReader(encoder.tokenize, encoder.encode, batch_size=args.batch_size, dtype=dtype)
    compute, rows = captions.make_encoder(encoder, mesh), sharding.batch_sharding(mesh)

    def encode(ids, lengths):
        batch = jax.device_put({"caption": ids, "caption_length": lengths}, rows)
        with jax.set_mesh(mesh):
            return compute(batch)["caption"]

    return TextReader(encoder.tokenize, encode, batch_size=args.batch_size, dtype=dtype)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Extract what the command line asks for, and return the report that is printed."""
    for name in ("batch_size", "num_shards", "num_threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.max_bad_images < 0:
        raise ValueError(f"--max_bad_images {args.max_bad_images} must be at least 0")
    check_text_flags(args)
    began = time.monotonic()
    crops, source = make_crops(args), open_source(args)
    check_captions(args, source, crops)
    tokenizer = loading.load_tokenizer(args.tokenizer)
    encode, mesh = make_encode(tokenizer)
    sharding.check_batch_size("--batch_size", args.batch_size, mesh)
    text_encoder = load_text_encoder(args)
    reader = None if text_encoder is None else make_text_reader(args, text_encoder, mesh)
    place = Place(index=jax.process_index(), count=jax.process_count())

    def extract_one(
        wanted: TokenDataset, source: Source, crops: Crops, out: pathlib.Path, skipped: int
    ) -> TokenDataset:
        return extract(
            wanted,
            source,
            crops,
            encode,
            out,
            place=place,
            max_bad_images=args.max_bad_images,
            skipped_before=skipped,
            num_threads=args.num_threads,
            text_reader=reader,
            may_be_empty=args.buckets != "none",
            synchronise=lambda: multihost_utils.sync_global_devices("extraction"),
        )

    if args.buckets == "none":
        wanted = describe(args, source, tokenizer, crops, text_encoder)
        finished = [extract_one(wanted, source, crops, args.out, 0)]
        grids: dict[str, Any] = {"grid": finished[0].grid}
    else:
        buckets = bucket_sizes(make_config(args))
        sources = split_by_bucket(
            source, buckets, num_threads=args.num_threads, keep_unreadable=True
        )
        place.say(describe_buckets(sources, 1))
        jobs = {
            size: (describe(args, part, tokenizer, shaped, text_encoder), part, shaped)
            for size, part in sources.items()
            for shaped in [dataclasses.replace(crops, size=size)]
        }
        finished = extract_buckets(jobs, args.out, place, extract_one)
        grids = {"buckets": {format_size(d.image_size): d.count for d in finished if d.count}}
    if reader is not None and reader.cut:
        place.say(
            f"{reader.cut:,} of the {reader.count:,} texts that were read here and now have more "
            f"than --text_length {get_text_settings(args)['text_length']} tokens and are cut"
        )
    report: dict[str, Any] = {
        "out": str(args.out),
        "images": sum(dataset.count for dataset in finished),
        "skipped": sum(map(count_skipped, finished)),
        "crops": len(finished[0].crops),
        **grids,
        "dtype": finished[0].layout.dtype,
    }
    if text_encoder is not None:
        report["features"] = text_encoder.fingerprint[:12]
    return report | {"seconds": round(time.monotonic() - began, 1)}


def count_skipped(dataset: TokenDataset) -> int:
    """Return the number of images that were left out."""
    return sum(len(shard.skipped) for shard in dataset.shards)


def extract_buckets(
    jobs: Mapping[Size, tuple[TokenDataset, Source, Crops]],
    out: pathlib.Path,
    place: Place,
    extract_one: Callable[[TokenDataset, Source, Crops, pathlib.Path, int], TokenDataset],
) -> list[TokenDataset]:
    """Extract one bucket after the other, and list them when all are whole.

    Raises:
        DatasetError: the folder holds something else, a bucket cannot be extracted, or no image of
            any is readable.
    """
    names = {format_size(size) for size in jobs} | {BUCKETS_FILE}
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    if others := sorted(there - names):
        raise DatasetError(
            f"{out} holds {', '.join(others[:3])}, which these buckets do not have; give the "
            "settings it was started with, or choose an empty folder"
        )
    finished: dict[Size, TokenDataset] = {}
    for size in sorted(jobs):
        wanted, part, shaped = jobs[size]
        place.say(f"bucket {format_size(size)}: {len(part):,} images")
        skipped = sum(map(count_skipped, finished.values()))
        finished[size] = extract_one(wanted, part, shaped, out / format_size(size), skipped)
    # Of an image that cannot be decoded the header may still be read, alone in its bucket.
    filled = {size: dataset for size, dataset in finished.items() if dataset.count}
    if not filled:
        count = sum(map(count_skipped, finished.values()))
        raise DatasetError(f"all {count} images are unreadable")
    if place.index == 0:
        write_text_atomically(out / BUCKETS_FILE, describe_token_buckets(filled))
    return list(finished.values())


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
