"""Tiles of images that are too large for memory: where they lie, and how they become one image.

Tiles overlap, all have the same size, and each is encoded or decoded alone; the whole is put
together on the host. Nets that normalise or attend over all they see answer a tile otherwise than a
whole image, so neighbours differ even in their middle: over the overlap one fades into the next. At
its very edge a tile sees zeros in place of the image, so the outer quarters of an overlap are left
to the neighbour that has them further inside.

Reference: the tiled encoding and decoding of `AutoencoderKL` in huggingface/diffusers, which fades
over the whole overlap.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Float32

# Share of an overlap, at either end, in which a tile is context only.
CONTEXT_SHARE = 0.25
_TINY = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """The tiles in which larger images are encoded and decoded.

    tile_size: side of a tile in pixels, a multiple of the tokenizer's factor, two tokens or more.
    overlap: pixels that neighbours share, or more so that all tiles are whole: a multiple of the
        factor below `tile_size`; a quarter of a tile, rounded up to tokens, if `None`.

    Raises:
        ValueError: a value that is not allowed.
    """

    tile_size: int
    overlap: int | None = None

    def __post_init__(self) -> None:
        if self.tile_size < 1:
            raise ValueError(f"tile_size is {self.tile_size}; it must be at least 1 pixel")
        if self.overlap is not None and not 0 <= self.overlap < self.tile_size:
            raise ValueError(
                f"overlap is {self.overlap}; it must be 0 or more and below tile_size "
                f"{self.tile_size}"
            )

    def in_tokens(self, factor: int) -> tuple[int, int]:
        """Return the side of a tile and the overlap in tokens of `factor` pixels.

        Raises:
            ValueError: they are no multiples of the factor, or a tile is less than two tokens.
        """
        tile, rest = divmod(self.tile_size, factor)
        if rest or tile < 2:
            raise ValueError(
                f"tile_size is {self.tile_size}; it must be a multiple of the tokenizer's "
                f"downsample factor {factor}, and at least {2 * factor}, for example "
                f"{max(2, round(self.tile_size / factor)) * factor}"
            )
        if self.overlap is None:
            return tile, -(-tile // 4)
        if self.overlap % factor:
            raise ValueError(
                f"overlap is {self.overlap}; it must be a multiple of the tokenizer's downsample "
                f"factor {factor}, for example {self.overlap // factor * factor}"
            )
        return tile, self.overlap // factor


def lay_out(side: int, tile: int, overlap: int) -> list[int]:
    """Return where the tiles along one side begin: the fewest that overlap enough, evenly spaced.

    The first begins at 0 and the last ends at `side`; where `side` is at most a tile there is one.
    """
    if side <= tile:
        return [0]
    gaps = -(-(side - tile) // (tile - overlap))
    return [index * (side - tile) // gaps for index in range(gaps + 1)]


def blending_weights(
    starts: Sequence[int], tile: int, scale: int = 1
) -> Float32[np.ndarray, "tiles positions"]:
    """Return the weight of every position of every tile along one side.

    Over the middle half of an overlap the weight of one tile falls linearly and that of the next
    rises; the weights of all tiles at a position sum to 1.

    Args:
        starts: of the tiles, as `lay_out` gives them.
        tile: their length, in the same unit.
        scale: positions per unit.
    """
    places = np.add.outer(np.asarray(starts), (np.arange(tile * scale) + 0.5) / scale)
    shares = np.stack(
        [_taken_from(index, starts, tile, places) for index in range(len(starts) + 1)]
    )
    tiles = np.arange(len(starts))
    return (shares[tiles, tiles] - shares[tiles + 1, tiles]).astype(np.float32)


def _taken_from(
    index: int, starts: Sequence[int], tile: int, places: Float[np.ndarray, "tiles positions"]
) -> Float[np.ndarray, "tiles positions"]:
    """Return the share that tile `index` and all behind it have at some places.

    A tile's weight is its share less that of the next, so whatever the overlaps, weights are
    positive (the next one rises later) and sum to 1 (the first is 1 everywhere).
    """
    if index == 0:
        return np.ones_like(places)
    if index == len(starts):
        return np.zeros_like(places)
    first, last = starts[index], starts[index - 1] + tile
    context = CONTEXT_SHARE * (last - first)
    # Tiles that only touch have nothing to fade over.
    return np.clip((places - first - context) / max(last - first - 2 * context, _TINY), 0, 1)


def map_tiles(
    function: Callable[[np.ndarray], np.ndarray],
    inputs: np.ndarray,
    *,
    tile: int,
    overlap: int,
    in_scale: int,
    out_scale: int,
) -> Float32[np.ndarray, "b rows columns c"]:
    """Apply a function to one tile after the other and blend what it returns.

    Args:
        function: of a tile of all images, [b rows columns …], to floats [b rows columns c].
        inputs: [b rows columns …].
        tile: side of a tile in tokens; along a shorter side of the inputs it is that side.
        overlap: tokens that neighbouring tiles share at least.
        in_scale: positions of the inputs per token.
        out_scale: positions of the result per token.
    """
    grid = [side // in_scale for side in inputs.shape[1:3]]
    sides = [min(tile, tokens) for tokens in grid]
    starts = [lay_out(tokens, tile, overlap) for tokens in grid]
    weights = [
        blending_weights(begin, side, out_scale) for begin, side in zip(starts, sides, strict=True)
    ]
    result = np.zeros(0, np.float32)
    for row, column in itertools.product(*map(range, map(len, starts))):
        corner = (starts[0][row], starts[1][column])
        part = np.asarray(function(inputs[_window(corner, sides, in_scale)]))
        if not result.size:
            shape = (len(inputs), grid[0] * out_scale, grid[1] * out_scale, part.shape[-1])
            result = np.zeros(shape, np.float32)
        weight = weights[0][row][:, None, None] * weights[1][column][:, None]
        result[_window(corner, sides, out_scale)] += part * weight
    return result


def _window(corner: Sequence[int], sides: Sequence[int], scale: int) -> tuple[slice, ...]:
    spans = zip(corner, sides, strict=True)
    return (slice(None), *(slice(at * scale, (at + side) * scale) for at, side in spans))
