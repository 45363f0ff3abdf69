r"""Make the reference of a protocol: statistics of the features of real images, in an `.npz`.

    python tools/make_fid_stats.py --protocol val --images imagenet/val --image_size 256 \
        --convert_to_rgb --inception pt_inception-2015-12-05-6726825d.pth --out val256.npz
    python tools/make_fid_stats.py --protocol train --tfds imagenet2012 --split train \
        --data_dir tfds --image_size 256 --features 10000 --inception … --out train256.npz

The file has `mu`, `sigma`, `mu_s`, `sigma_s` as the ADM evaluator and pytorch-fid read them, the
count, and a record of protocol, net, crop and images, by which `python -m maskgil_jax.evaluate`
refuses it where it does not belong. `--features N` adds the pooled features of N images, evenly
spaced, for precision, recall, density, coverage and KID.

Memory does not grow with the images. Started again after a kill, the same command goes on after the
last 4,096 images that were finished, and its file is the same to the last byte.
"""

import argparse
import json
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from maskgil_jax import bulk, workdir
from maskgil_jax.checkpoints import write_text_atomically
from maskgil_jax.evals.features import BLOCK_ROWS
from maskgil_jax.evals.frechet import Statistics, load_array, load_statistics, save_statistics
from maskgil_jax.evaluation.extraction import add_statistics, stream
from maskgil_jax.evaluation.image_sets import ImageSet, SourceImages, open_images
from maskgil_jax.evaluation.nets import FeatureNet, open_net
from maskgil_jax.evaluation.protocols import find_protocol
from maskgil_jax.evaluation.references import FEATURES, make_record
from maskgil_jax.masking import check_choice

PROTOCOLS = ("val", "train")
_SETTINGS, _STATE = "settings.json", "state.npz"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--protocol", required=True, help=f"one of {', '.join(PROTOCOLS)}")
    add("--images", help="folder of pictures, those below it too, or FILE.npz with arr_0")
    add("--tfds", help="prepared TFDS dataset instead, such as imagenet2012")
    add("--split", help="of the TFDS dataset; default: the one the protocol is named for")
    add("--data_dir", help="folder that the TFDS dataset was prepared in")
    add("--image_size", type=int, help="side to which images are cropped; default: not at all")
    add("--convert_to_rgb", action="store_true", help="take grey, CMYK and transparent files")
    add("--num_images", type=int, help="how many there must be; any number if not given")
    add("--features", type=int, default=0, help="images whose features are stored as well")
    add("--inception", help="weights: pt_inception-2015-12-05-6726825d.pth, or a model directory")
    add("--batch_size", type=int, default=64, help="images at a time")
    add("--out", required=True, type=pathlib.Path, help="FILE.npz")
    return parser


def open_source(args: argparse.Namespace) -> ImageSet:
    """Open the images that the command line names.

    Raises:
        ValueError: if there are none, they are named twice, or their number is not the one asked.
    """
    if (args.images is None) == (args.tfds is None):
        raise ValueError("give the images: one of --images and --tfds")
    if args.image_size is not None and args.image_size < 1:
        raise ValueError(f"--image_size {args.image_size} must be at least 1")
    images: ImageSet
    if args.images is not None:
        if args.data_dir is not None:
            raise ValueError("--data_dir is for --tfds, and --images names a folder itself")
        if args.split is not None:
            raise ValueError("--split is for --tfds; --images are taken all")
        images = open_images(args.images, image_size=args.image_size, convert=args.convert_to_rgb)
    else:
        if args.data_dir is None:
            raise ValueError("--tfds needs --data_dir, the folder it was prepared in")
        # array_record, which it reads with, has no wheels outside Linux.
        from maskgil_jax.data.tfds import TFDSSource

        source = TFDSSource(args.tfds, find_split(args.protocol, args.split), args.data_dir)
        images = SourceImages(source, image_size=args.image_size)
    if args.num_images not in (None, len(images)):
        raise ValueError(f"--num_images {args.num_images}, but there are {len(images)} images")
    return images


def find_split(protocol: str, split: str | None) -> str:
    """Return the split of a protocol, or the one given if it is part of that.

    Raises:
        ValueError: if it belongs to the other protocol.
    """
    usual = {"val": "validation", "train": "train"}
    if split is None:
        return usual[protocol]
    others = {name: other for other, name in usual.items() if other != protocol}
    if (base := split.split("[")[0]) in others:
        raise ValueError(
            f"--split {split} is that of --protocol {others[base]}; statistics of --protocol "
            f"{protocol} are of {usual[protocol]!r}, or of a split named otherwise"
        )
    return split


def gather(
    images: ImageSet, net: FeatureNet, work: pathlib.Path, chosen: np.ndarray, batch_size: int
) -> tuple[Statistics, Statistics | None, np.ndarray]:
    """Return statistics of pooled and spatial features, and pooled ones of the chosen images.

    What was gathered is stored after every block, and taken up from there.

    Args:
        images: the images.
        net: what they are features of.
        work: folder of what was gathered.
        chosen: numbers of the images whose features are returned.
        batch_size: images at a time.
    """
    names = [name for name in ("pool", "spatial") if name in net.widths]
    found, kept = _load_state(work, {name: net.widths[name] for name in names}, chosen, len(images))
    done = found["pool"].count or 0 if found else 0
    progress = bulk.Progress(len(images) - done)
    for start in range(done, len(images), BLOCK_ROWS):
        block = range(start, min(start + BLOCK_ROWS, len(images)))
        parts = []
        for features in stream(images, net, names, block, chunk_size=batch_size):
            parts.append(features)
            progress.add(len(features["pool"]))
        rows = {name: np.concatenate([part[name] for part in parts]) for name in names}
        for name in names:
            add_statistics(found, name, rows[name])
        kept.append(rows["pool"][chosen[(chosen >= start) & (chosen < block.stop)] - start])
        save_statistics(
            work / _STATE, found["pool"], found.get("spatial"), features=np.concatenate(kept)
        )
    return found["pool"], found.get("spatial"), np.concatenate(kept)


def _load_state(
    work: pathlib.Path, widths: Mapping[str, int], chosen: np.ndarray, count: int
) -> tuple[dict[str, Statistics], list[np.ndarray]]:
    """Return statistics and features that were gathered, or nothing.

    Raises:
        ValueError: if they are damaged, or not what this tool stores.
    """
    file = work / _STATE
    if not file.exists():
        return {}, []
    try:
        pool, spatial = load_statistics(file)
        found = {"pool": pool} | ({} if spatial is None else {"spatial": spatial})
        done = pool.count or 0
        if done != count and (done == 0 or done > count or done % BLOCK_ROWS):
            raise ValueError(f"it is of {done} images")
        if {name: part.width for name, part in found.items()} != dict(widths):
            raise ValueError("it is of other features")
        kept = load_array(file, FEATURES)
        shape = (np.count_nonzero(chosen < done), pool.width)
        if kept is None or kept.shape != shape:
            raise ValueError("single features are missing")
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); remove {work} to begin anew") from error
    return found, [kept]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make the file that the command line asks for, and return what is printed."""
    check_choice("--protocol", args.protocol, PROTOCOLS)
    if args.out.suffix.lower() != ".npz" or args.out.is_dir():
        raise ValueError(f"--out {args.out} is no FILE.npz")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size} must be at least 1")
    images = open_source(args)
    if len(images) < 2:
        raise ValueError(f"{len(images)} image: a covariance needs at least 2")
    if not 0 <= args.features <= len(images):
        raise ValueError(f"--features {args.features}: allowed are 0 to {len(images)}, all images")
    net = open_net(find_protocol(args.protocol).net, args.inception)
    net.check_shape("images", images.image_shape)
    chosen = np.linspace(0, len(images) - 1, args.features).round().astype(int)
    record = make_record(args.protocol, net, images) | {"features": args.features}
    settings = record | {
        "batch_size": args.batch_size,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
    }
    work = args.out.with_name(f".{args.out.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    with workdir.lock(work, "--out"):
        file = work / _SETTINGS
        if file.exists():
            bulk.check_same(work, bulk.read_settings(file), settings, "a part of statistics made")
        write_text_atomically(file, json.dumps(settings, indent=1) + "\n")
        try:
            pool, spatial, kept = gather(images, net, work, chosen, args.batch_size)
            save_statistics(
                args.out, pool, spatial, record=record, features=kept if args.features else None
            )
            (work / _STATE).unlink()
        finally:
            if not (work / _STATE).exists():
                shutil.rmtree(work)
    return {
        "out": str(args.out),
        "protocol": args.protocol,
        "images": len(images),
        "size": list(images.image_shape[:2]),
        "net": net.name,
        "fingerprint": net.fingerprint,
        "notes": list(net.notes),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the file; return the exit status, 1 after a refusal with its reason on stderr."""
    args = build_parser().parse_args(arguments)
    try:
        made = run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(made, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
