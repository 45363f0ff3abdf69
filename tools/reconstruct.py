"""Encode and decode pictures: what a tokenizer keeps of them, to look at and in numbers.

    python tools/reconstruct.py --tokenizer DIR --images photos/ --image_size 256 --out grid.png

The picture has originals above their reconstructions. The last line printed is JSON: PSNR in dB
and SSIM, both averaged over the images, and the share of the codebook that they use; with `--rfid`
also the Fréchet distance between features of the reconstructions and of the originals.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskgil_jax import generation, loading
from maskgil_jax.checkpoints import write_text_atomically
from maskgil_jax.data.canvases import CanvasSource
from maskgil_jax.data.digits import DigitsSource
from maskgil_jax.data.errors import DatasetError, ImageReadError
from maskgil_jax.data.folder import EXTENSIONS
from maskgil_jax.data.images import decode_rgb
from maskgil_jax.data.pipeline import Source
from maskgil_jax.data.transforms import center_crop, to_float
from maskgil_jax.evals.frechet import Statistics, describe_bias, frechet_distance
from maskgil_jax.evals.images import psnr, ssim
from maskgil_jax.evaluation.nets import FeatureNet, open_net
from maskgil_jax.evaluation.protocols import DIGIT_NET, INCEPTION
from maskgil_jax.pictures import BACKGROUND, make_grid, save_png
from maskgil_jax.tokenizers.base import Tokenizer

# Embedded data sets: their held-out parts.
EMBEDDED: dict[str, Callable[[], Source]] = {
    "digits": lambda: DigitsSource("test"),
    "canvases": lambda: CanvasSource("test"),
}

# Name of an image, and how to read it as uint8 [H W 3].
Entry = tuple[str, Callable[[], np.ndarray]]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="directory, hf:// address or asset:NAME")
    add("--images", required=True, nargs="+", help="folders and files, or digits, or canvases")
    add("--image_size", type=int, help="side of the central square (default: as they are)")
    add("--num_images", type=int, help="how many to measure (default: all)")
    add("--batch_size", type=int, default=16, help="images at a time")
    add("--tile_size", type=int, help="pixels: larger images in tiles (default: all whole)")
    add("--out", required=True, type=Path, help="PNG file to write")
    add("--shown", type=int, default=16, help="images in the picture")
    add(
        "--rfid",
        metavar="NET",
        help=f"weights of FID's InceptionV3, or {DIGIT_NET!r} for 32×32 digits: measure rFID too",
    )
    add("--columns", type=int, default=8, help="images in a row of it")
    add("--json", type=Path, help="file to write, with the figures of every image")
    return parser


def list_images(names: Sequence[str]) -> list[Entry]:
    """Return the images that are named, in folders those below them too, sorted by name.

    Raises:
        DatasetError: a file or folder is missing or holds no images.
    """
    if len(names) == 1 and names[0] in EMBEDDED:
        source = EMBEDDED[names[0]]()
        return [
            (f"{source.name} {i}", functools.partial(_take, source, i)) for i in range(len(source))
        ]
    paths: list[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if _is_image(p)]
            if not found:
                raise DatasetError(f"{path} holds no images ({', '.join(EXTENSIONS)})")
            paths += found
        elif path.is_file():
            paths.append(path)
        else:
            raise DatasetError(
                f"{path} is neither a file nor a folder; embedded images are named alone: "
                f"{' or '.join(EMBEDDED)}"
            )
    return [(str(path), functools.partial(_read, path)) for path in paths]


def _is_image(path: Path) -> bool:
    hidden = path.name.startswith(".")  # such as those that macOS leaves beside images
    return not hidden and path.suffix.lower() in EXTENSIONS and path.is_file()


def _take(source: Source, index: int) -> np.ndarray:
    return source[index]["image"]


def _read(path: Path) -> np.ndarray:
    try:
        return decode_rgb(path)
    except ImageReadError as error:
        raise ImageReadError(f"cannot read image {path}: {error}") from error


def crop_to_multiple(image: np.ndarray, factor: int) -> np.ndarray:
    """Return the largest central part of an image whose sides are multiples of `factor`.

    Raises:
        ValueError: a side is smaller than `factor`.
    """
    height, width = (side // factor * factor for side in image.shape[:2])
    if 0 in (height, width):
        raise ValueError(
            f"image of {image.shape[0]}×{image.shape[1]} pixels is smaller than the tokenizer's "
            f"down-sampling by {factor}; enlarge it with --image_size"
        )
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _prepare(
    entries: Sequence[Entry], image_size: int | None, factor: int, batch_size: int
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield batches of images of one size in the order of the entries; tell what was cut off."""
    names: list[str] = []
    images: list[np.ndarray] = []
    cut = 0
    for name, read in entries:
        whole = read()
        try:
            image = (
                center_crop(whole, image_size) if image_size else crop_to_multiple(whole, factor)
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        cut += not image_size and image.shape != whole.shape
        if images and (image.shape != images[0].shape or len(images) == batch_size):
            yield names, np.stack(images)
            names, images = [], []
        names.append(name)
        images.append(image)
    if images:
        yield names, np.stack(images)
    if cut:
        print(
            f"{cut} of {len(entries)} images were cut to multiples of {factor} pixels", flush=True
        )


def reconstruct(
    tokenizer: Tokenizer,
    entries: Sequence[Entry],
    *,
    image_size: int | None,
    batch_size: int,
    shown: int,
    net: FeatureNet | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]], list[tuple[np.ndarray, np.ndarray]]]:
    """Return the figures of all images, those of each, and the first `shown` pairs.

    With a net, whose features of all images are kept, rFID is among the figures.

    Raises:
        ValueError: an image cannot be read, or its size does not suit.
    """
    spec = tokenizer.spec
    if image_size is not None:
        spec.grid_size(image_size, image_size)
    used = np.zeros(spec.codebook_size, bool)
    rows: list[dict[str, Any]] = []
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    features: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for names, images in _prepare(entries, image_size, spec.downsample_factor, batch_size):
        tokens = np.asarray(tokenizer.encode(to_float(images), batch_size=batch_size))
        rebuilt = generation.decode_images(tokenizer, tokens, batch_size=batch_size)
        used[tokens] = True
        if net is not None:
            net.check_shape(names[0], images.shape[1:])
            for kept, side in zip(features, (images, rebuilt), strict=True):
                kept.append(net.extract(side, ("pool",))["pool"])
        measured = zip(names, psnr(images, rebuilt), ssim(images, rebuilt), strict=True)
        rows += [
            {"image": n, "psnr_db": _finite(p), "ssim": round(float(s), 5)} for n, p, s in measured
        ]
        pairs += list(zip(images, rebuilt, strict=True))[: shown - len(pairs)]
    ratios = [math.inf if row["psnr_db"] is None else row["psnr_db"] for row in rows]
    figures: dict[str, Any] = {
        "images": len(rows),
        "psnr_db": _finite(np.mean(ratios)),
        "ssim": round(float(np.mean([row["ssim"] for row in rows])), 4),
        "usage": float(used.mean()),
        "codes_used": int(used.sum()),
        "codebook_size": spec.codebook_size,
    }
    if net is not None:
        originals, others = (Statistics.of_features(np.concatenate(kept)) for kept in features)
        figures["rfid"] = round(frechet_distance(originals, others), 4)
        figures["rfid_net"] = {"name": net.name, "fingerprint": net.fingerprint}
        figures["notes"] = [*net.notes, *describe_bias({"images": originals})]
    return figures, rows, pairs


def _finite(value: float) -> float | None:
    """Return a number that JSON has; `None` for the infinite ratio of equal images."""
    return round(float(value), 4) if math.isfinite(value) else None


def lay_out(pairs: Sequence[tuple[np.ndarray, np.ndarray]], columns: int) -> np.ndarray:
    """Return a picture of rows of originals, each above the row of their reconstructions."""
    size = tuple(max(pair[0].shape[axis] for pair in pairs) for axis in (0, 1))

    def pad(image: np.ndarray) -> np.ndarray:
        room = [(0, whole - side) for whole, side in zip(size, image.shape, strict=False)]
        return np.pad(image, [*room, (0, 0)], constant_values=BACKGROUND)

    columns = min(columns, len(pairs))
    empty = np.full((*size, 3), BACKGROUND, np.uint8)
    cells: list[np.ndarray] = []
    for start in range(0, len(pairs), columns):
        row = pairs[start : start + columns]
        for side in (0, 1):
            cells += [pad(pair[side]) for pair in row] + [empty] * (columns - len(row))
    return make_grid(np.stack(cells), columns=columns)


def open_rfid_net(weights: str | None) -> FeatureNet | None:
    """Return the net that `--rfid` names; `None` if it is not given."""
    if weights is None:
        return None
    return open_net(DIGIT_NET, None) if weights == DIGIT_NET else open_net(INCEPTION, weights)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Reconstruct what the command line names, and return what is printed."""
    for name in ("image_size", "num_images", "batch_size", "shown", "columns"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out} does not end in .png")
    entries = list_images(args.images)
    if args.num_images is not None:
        if args.num_images > len(entries):
            raise ValueError(f"--num_images {args.num_images}: there are {len(entries)}")
        entries = entries[: args.num_images]
    tokenizer = loading.load_tokenizer(args.tokenizer, tile_size=args.tile_size)
    if tokenizer.spec.image_channels != 3:
        raise ValueError(
            f"the tokenizer takes {tokenizer.spec.image_channels} channels; images have 3 (RGB)"
        )
    figures, rows, pairs = reconstruct(
        tokenizer,
        entries,
        image_size=args.image_size,
        batch_size=args.batch_size,
        shown=args.shown,
        net=open_rfid_net(args.rfid),
    )
    save_png(args.out, lay_out(pairs, args.columns))
    report = {
        "tokenizer": args.tokenizer,
        "tile_size": args.tile_size,
        **figures,
        "out": str(args.out),
    }
    if args.json is not None:
        write_text_atomically(args.json, json.dumps(report | {"each": rows}, indent=1) + "\n")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Reconstruct; return the exit status, 1 after a refusal with its reason on stderr."""
    args = build_parser().parse_args(arguments)
    try:
        report = run(args)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
