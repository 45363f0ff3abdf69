"""Measure what tiles cost and spare: a large picture encoded and decoded whole and in tiles.

    python tools/measure_tiling.py --tokenizer asset:digits_tokenizer --data digits \
        --size 512 --tile_sizes 64,128,256

The picture is a square mosaic of test images. Prints a Markdown table, one row per tile size below
the first, which takes the picture whole:

    codes           share that equals the whole picture's
    decoded         PSNR in dB of the whole picture's codes, decoded in tiles against decoded whole
    reconstruction  PSNR in dB against the picture itself, encoded and decoded alike
    encode, decode  MiB of temporary arrays of the compiled program, one picture at a time
    seconds         encoding and decoding, compilation not included
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from maskgil_jax import loading
from maskgil_jax.data.canvases import CanvasSource
from maskgil_jax.data.digits import DigitsSource
from maskgil_jax.data.pipeline import Source
from maskgil_jax.evals.images import psnr
from maskgil_jax.pictures import to_float, to_uint8
from maskgil_jax.tokenizers.base import Tokenizer
from maskgil_jax.tokenizers.tiling import Tiling

# Test images of one size, and that size.
DATA: dict[str, tuple[Callable[[], Source], int]] = {
    "digits": (lambda: DigitsSource("test"), 32),
    "canvases": (lambda: CanvasSource("test", size=(64, 64)), 64),
}
COLUMNS = ("tile", "codes", "decoded", "reconstruction", "encode", "decode", "seconds")
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
MEBIBYTE = 2**20


def parse_sizes(text: str) -> list[int]:
    """Read whole numbers separated by commas.

    Raises:
        ValueError: one of them is none.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--tile_sizes {text!r}: write numbers, such as 64,128")
    return [int(part) for part in parts]


def make_mosaic(data: str, size: int) -> np.ndarray:
    """Return a picture uint8 [1 size size 3] of as many test images as it takes.

    Raises:
        ValueError: the size is no multiple of the images', or there are not enough of them.
    """
    open_source, side = DATA[data]
    count, rest = divmod(size, side)
    source = open_source()
    if rest or not 1 <= count**2 <= len(source):
        largest = int(len(source) ** 0.5) * side
        raise ValueError(
            f"--size {size}: a mosaic of {data} needs a multiple of {side}, at most {largest}"
        )
    images = np.stack([source[index]["image"] for index in range(count**2)])
    grid = images.reshape(count, count, side, side, 3).swapaxes(1, 2)
    return grid.reshape(1, size, size, 3)


def count_bytes(tokenizer: Tokenizer, method: str, side: int) -> int:
    """Return the temporary memory of the program for one square picture of `side` pixels.

    Raises:
        ValueError: the backend does not tell.
    """
    grid = tokenizer.spec.grid_size(side, side)
    inputs = jax.ShapeDtypeStruct((1, *grid), jnp.int32)
    if method != "decode":
        shape = (1, side, side, tokenizer.spec.image_channels)
        inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
    module = tokenizer.module

    @jax.jit
    def run(params, x):
        return module.apply({"params": params}, x, method=method)

    analysis = run.lower(tokenizer.params, inputs).compile().memory_analysis()
    if analysis is None:
        raise ValueError(f"JAX does not tell the memory of programs on {jax.default_backend()}")
    return analysis.temp_size_in_bytes


def rebuild(tokenizer: Tokenizer, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return codes and reconstruction of a picture, and the seconds of the second time."""
    for _ in range(2):
        began = time.monotonic()
        tokens = np.asarray(tokenizer.encode(to_float(image), batch_size=1))
        rebuilt = to_uint8(tokenizer.decode(tokens, batch_size=1))
        seconds = time.monotonic() - began
    return tokens, rebuilt, seconds


def measure(tokenizer: Tokenizer, image: np.ndarray, tile_sizes: Sequence[int]) -> list[str]:
    """Return the rows of the table.

    Raises:
        ValueError: the picture or a tile does not suit the tokenizer, or is not smaller.
    """
    side = image.shape[1]
    tokenizer.spec.grid_size(side, side)
    tiled = [
        dataclasses.replace(tokenizer, tiling=Tiling(tile_size=tile_size))
        for tile_size in tile_sizes
    ]
    if tile_sizes and max(tile_sizes) >= side:
        raise ValueError(f"--tile_sizes {max(tile_sizes)}: the picture of {side} is no larger")
    codes, whole, seconds = rebuild(tokenizer, image)

    def row(name: str, used: Tokenizer, encoded: int, *figures: object) -> str:
        memory = [count_bytes(used, m, encoded) / MEBIBYTE for m in ("encode", "decode")]
        cells = [name, *figures[:-1], *(f"{value:,.0f}" for value in memory), figures[-1]]
        return f"| {' | '.join(map(str, cells))} |"

    rows = [row("whole", tokenizer, side, 1, "–", f"{psnr(image, whole)[0]:.2f}", f"{seconds:.1f}")]
    for tile_size, other in zip(tile_sizes, tiled, strict=True):
        near, rebuilt, seconds = rebuild(other, image)
        decoded = to_uint8(other.decode(codes, batch_size=1))
        ratios = [f"{psnr(*pair)[0]:.2f}" for pair in ((whole, decoded), (image, rebuilt))]
        figures = (f"{np.mean(near == codes):.3f}", *ratios, f"{seconds:.1f}")
        rows.append(row(str(tile_size), other, tile_size, *figures))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure; return the exit status, 1 after a refusal with its reason on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="model or run directory, or asset:NAME")
    add("--data", required=True, choices=tuple(DATA), help="images of the mosaic")
    add("--size", required=True, type=int, help="side of the mosaic in pixels")
    add("--tile_sizes", required=True, help="sides of the tiles in pixels, such as 64,128")
    args = parser.parse_args(arguments)
    try:
        tile_sizes = parse_sizes(args.tile_sizes)
        image = make_mosaic(args.data, args.size)
        rows = measure(loading.load_tokenizer(args.tokenizer), image, tile_sizes)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join([HEADER, *rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
