"""Tiles: where they lie, how they blend, and what a tokenizer that uses them answers."""

import dataclasses
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maskgil_jax
from maskgil_jax import sharding
from maskgil_jax.build.data import make_encoder
from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.evals.images import psnr
from maskgil_jax.pictures import to_float, to_uint8
from maskgil_jax.tokenizers.base import Tokenizer, TokenizerSpec
from maskgil_jax.tokenizers.tiling import Tiling, blending_weights, lay_out, map_tiles
from maskgil_jax.tokenizers.vqgan import upsample_nearest

# Methods of `Blur` and the shapes of their inputs, as they were traced.
TRACED = []
NUMBERS = itertools.count()
SPEC = TokenizerSpec(family="blur", codebook_size=64, downsample_factor=2, embed_dim=1)
# Side, tile and overlap: one tile, tiles that fit, tiles that do not, and overlaps beyond a half.
LAYOUTS = [
    (side, tile, overlap)
    for side, tile in itertools.product((1, 2, 5, 6, 7, 12, 19, 40), (2, 5, 6, 9))
    for overlap in range(tile)
]


class Blur(nn.Module):
    """Nets that see one token beyond their own: three-tap blurs before and after 64 grey levels."""

    number: int  # another module for each test, so that it is traced again

    def encode_latents(self, images):
        TRACED.append(("encode_latents", images.shape))
        batch, height, width, channels = images.shape
        squares = images.reshape(batch, height // 2, 2, width // 2, 2, channels)
        return self._blur(squares.mean((2, 4, 5))[..., None])

    def quantize_latents(self, latents):
        TRACED.append(("quantize_latents", latents.shape))
        return jnp.round((latents[..., 0] + 1) * 31.5).astype(jnp.int32)

    def encode(self, images):
        return self.quantize_latents(self.encode_latents(images))

    def decode(self, tokens):
        TRACED.append(("decode", tokens.shape))
        grey = self._blur((tokens / 31.5 - 1)[..., None])
        return jnp.broadcast_to(upsample_nearest(grey), (*self._pixels(tokens.shape), 3))

    def _pixels(self, shape):
        return shape[0], 2 * shape[1], 2 * shape[2]

    def _blur(self, x):
        kernel = self.get_variable("params", "kernel")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlurConfig:
    module: Blur
    spec: TokenizerSpec = SPEC
    family = "blur"
    lookup_free = False

    @classmethod
    def from_dict(cls, fields):
        return cls(**fields)

    def to_dict(self):
        return {}

    def make_module(self):
        return self.module


@pytest.fixture
def tokenizer():
    TRACED.clear()
    kernel = np.array([1, 2, 1], np.float32)
    kernel = np.outer(kernel, kernel)[..., None, None] / 16
    return Tokenizer(config=BlurConfig(module=Blur(next(NUMBERS))), params={"kernel": kernel})


def tiled(tokenizer, tile_size, overlap=None):
    return dataclasses.replace(tokenizer, tiling=Tiling(tile_size=tile_size, overlap=overlap))


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(0, 1, (3, 50, 86, 3)).astype(np.float32)


def test_tiles_are_whole_overlap_enough_and_are_as_few_as_can_be():
    for side, tile, overlap in LAYOUTS:
        starts = lay_out(side, tile, overlap)
        assert starts[0] == 0
        if side <= tile:
            assert len(starts) == 1
            continue
        assert starts[-1] + tile == side
        strides = np.diff(starts)
        assert 1 <= strides.min() <= strides.max() <= tile - overlap
        assert strides.max() - strides.min() <= 1
        # One tile less would not reach the end.
        assert tile + (len(starts) - 2) * (tile - overlap) < side


@pytest.mark.parametrize("scale", [1, 3])
def test_weights_are_positive_and_sum_to_one_everywhere(scale):
    for side, tile, overlap in LAYOUTS:
        starts, length = lay_out(side, tile, overlap), min(side, tile)
        weights = blending_weights(starts, length, scale)
        assert weights.shape == (len(starts), length * scale)
        assert weights.min() >= 0
        total = np.zeros(side * scale)
        for start, weight in zip(starts, weights, strict=True):
            total[start * scale : (start + length) * scale] += weight
        np.testing.assert_allclose(total, 1, atol=1e-6)


def test_one_tile_fades_into_the_next_over_the_middle_half_of_the_overlap():
    ramp = [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]
    first, last = blending_weights([0, 2], 10)
    np.testing.assert_allclose(last, [*ramp, 1, 1], atol=1e-6)
    np.testing.assert_allclose(first, [1, 1, *(1 - np.array(ramp))], atol=1e-6)
    # Tiles that only touch: each keeps what is its own.
    np.testing.assert_array_equal(blending_weights([0, 4], 4), np.ones((2, 4)))


@pytest.mark.parametrize("grid", [(4, 4), (9, 4), (3, 17), (14, 23), (5, 6)])
@pytest.mark.parametrize("overlap", [0, 1, 3, 4])
def test_a_function_of_each_place_alone_is_the_same_in_tiles(grid, overlap):
    inputs = np.random.default_rng(0).normal(size=(2, *grid, 3)).astype(np.float32)
    enlarge = lambda x: x.repeat(2, 1).repeat(2, 2)  # noqa: E731
    shrink = lambda x: x[:, ::2, ::2]  # noqa: E731
    options = dict(tile=5, overlap=overlap)
    larger = map_tiles(enlarge, inputs, in_scale=1, out_scale=2, **options)
    np.testing.assert_allclose(larger, enlarge(inputs), atol=1e-6)
    smaller = map_tiles(shrink, enlarge(inputs), in_scale=2, out_scale=1, **options)
    np.testing.assert_allclose(smaller, inputs, atol=1e-6)


def test_images_no_larger_than_a_tile_are_taken_whole(tokenizer, images):
    expected = tokenizer.encode(images)
    decoded = tokenizer.decode(expected)
    TRACED.clear()
    for tile_size in (86, 100):
        large = tiled(tokenizer, tile_size)
        tokens = large.encode(images)
        assert isinstance(tokens, jax.Array)
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_array_equal(large.decode(tokens), decoded)
    # The very program that runs without tiles.
    assert TRACED == []


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize(("tile_size", "overlap"), [(24, 8), (32, None), (60, 16), (26, 20)])
def test_nets_that_see_less_than_a_quarter_of_the_overlap_are_exact(
    tokenizer, images, tile_size, overlap, batch_size
):
    whole = np.asarray(tokenizer.encode(images))
    pixels = np.asarray(tokenizer.decode(whole))
    in_tiles = tiled(tokenizer, tile_size, overlap)
    tokens = in_tiles.encode(images, batch_size=batch_size)
    assert (tokens.shape, tokens.dtype) == ((3, 25, 43), np.int32)
    np.testing.assert_array_equal(tokens, whole)
    decoded = in_tiles.decode(jnp.asarray(tokens), batch_size=batch_size)
    assert (decoded.shape, decoded.dtype) == ((3, 50, 86, 3), np.float32)
    np.testing.assert_allclose(decoded, pixels, atol=1e-5)


def test_tiles_that_only_touch_see_zeros_beyond_their_edge(tokenizer, images):
    images = images[:, :48, :72]
    whole = np.asarray(tokenizer.encode(images))
    apart = tiled(tokenizer, 24, 0)
    assert (apart.encode(images) != whole).any()
    wrong = np.abs(apart.decode(whole) - tokenizer.decode(whole)).max((0, 3)) > 1e-5
    # On both sides of the seams, one token wide, and nowhere else.
    seams = [np.isin(np.arange(side) // 2 % 12, (0, 11)) for side in wrong.shape]
    seams = [
        seam & (np.arange(len(seam)) >= 2) & (np.arange(len(seam))[::-1] >= 2) for seam in seams
    ]
    np.testing.assert_array_equal(wrong, np.logical_or.outer(*seams))


def test_all_tiles_share_one_program_of_their_size(tokenizer, images):
    in_tiles = tiled(tokenizer, 24, 8)
    tokens = in_tiles.encode(images, batch_size=2)
    in_tiles.decode(tokens, batch_size=2)
    # The quantiser takes positions wherever they lie, in blocks of that size too.
    assert TRACED == [
        ("encode_latents", (2, 24, 24, 3)),
        ("quantize_latents", (2, 12, 12, 1)),
        ("decode", (2, 12, 12)),
    ]
    # Another size needs no other program, unless a side is shorter than a tile.
    in_tiles.decode(tokens[:, :20, :31], batch_size=2)
    assert len(TRACED) == 3
    in_tiles.decode(tokens[:, :9], batch_size=2)
    assert TRACED[3:] == [("decode", (2, 9, 12))]


def test_no_images_are_no_tokens(tokenizer, images):
    in_tiles = tiled(tokenizer, 24)
    assert in_tiles.encode(images[:0], batch_size=2).shape == (0, 25, 43)
    assert in_tiles.decode(np.zeros((0, 25, 43), np.int32), batch_size=2).shape == (0, 50, 86, 3)


@pytest.mark.usefixtures("quick_compilation")
def test_a_trained_tokenizer_is_near_in_tiles():
    """Its norms and attention see a tile in place of the image: near, and not the same."""
    digits = digits_arrays("test")[0][:6].reshape(2, 3, 32, 32, 3).swapaxes(1, 2)
    image = digits.reshape(1, 64, 96, 3)
    whole = maskgil_jax.load_tokenizer("asset:digits_tokenizer")
    in_tiles = maskgil_jax.load_tokenizer("asset:digits_tokenizer", tile_size=64)
    assert in_tiles.tiling == Tiling(tile_size=64)
    assert in_tiles.fingerprint == whole.fingerprint
    tokens, near = whole.encode(to_float(image)), in_tiles.encode(to_float(image))
    assert 0.8 < np.mean(near == np.asarray(tokens)) < 1
    rebuilt = to_uint8(np.asarray(whole.decode(tokens)))
    assert 26 < psnr(rebuilt, to_uint8(in_tiles.decode(tokens)))[0] < np.inf


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(tile_size=0), "tile_size is 0"),
        (dict(tile_size=7), "tile_size is 7.*multiple.*factor 2.*at least 4, for example 8"),
        (dict(tile_size=2), "tile_size is 2.*at least 4, for example 4"),
        (dict(tile_size=8, overlap=8), "overlap is 8.*below tile_size 8"),
        (dict(tile_size=8, overlap=-2), "overlap is -2"),
        (dict(tile_size=8, overlap=3), "overlap is 3.*factor 2, for example 2"),
    ],
)
def test_tiles_that_do_not_suit_are_refused(tokenizer, fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tokenizer, tiling=Tiling(**fields))


def test_tiles_are_refused_where_they_cannot_be(tokenizer, images):
    in_tiles = tiled(tokenizer, 24)
    tokens = jnp.zeros((1, 25, 43), jnp.int32)
    with pytest.raises(ValueError, match=r"25×43 tokens needs tiles.*outside jax\.jit"):
        jax.jit(in_tiles.decode)(tokens)
    small = jax.jit(in_tiles.decode)(tokens[:, :12, :12])
    np.testing.assert_array_equal(small, tokenizer.decode(tokens[:, :12, :12]))
    with pytest.raises(ValueError, match="tiles of 24 pixels; training data is encoded whole"):
        make_encoder(in_tiles, sharding.make_mesh({"data": -1}))


class Greedy(Blur):
    """Wants more memory than a process can have, but for tiles of two tokens."""

    def decode(self, tokens):
        if tokens.shape[1] > 2:
            # Sorted, or the compiler would not store it.
            many = jnp.sort(jnp.broadcast_to(tokens[..., None], (*tokens.shape, 2**44)), axis=-1)
            tokens = many[..., 0]
        return super().decode(tokens)


class Broken(Blur):
    """Fails while it runs."""

    def decode(self, tokens):
        return super().decode(jax.pure_callback(self._fail, tokens, tokens))

    def _fail(self, tokens):
        raise OverflowError("something else")


def test_exhausted_memory_is_answered_with_the_remedy(tokenizer):
    greedy = dataclasses.replace(tokenizer, config=BlurConfig(module=Greedy(next(NUMBERS))))
    tokens = np.zeros((3, 8, 5), np.int32)
    begin = r"memory does not suffice to decode {} image\(s\) of 16×10 pixels at a time"
    remedy = re.escape("tile_size=8 (--tile_size), which works tile by tile")
    with pytest.raises(MemoryError, match=f"{begin.format(1)}; give {remedy}$"):
        greedy.decode(tokens[:1])
    with pytest.raises(
        MemoryError, match=f"{begin.format(2)}; give a smaller batch.*, or {remedy}"
    ):
        greedy.decode(tokens, batch_size=2)
    with pytest.raises(MemoryError, match=r"in tiles of 12.*tile_size=6 \(--tile_size\)"):
        tiled(greedy, 12).decode(tokens[:1])
    assert tiled(greedy, 4, 2).decode(tokens).shape == (3, 16, 10, 3)


def test_other_failures_stay_what_they_are(tokenizer):
    broken = dataclasses.replace(tokenizer, config=BlurConfig(module=Broken(next(NUMBERS))))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        broken.decode(np.zeros((1, 8, 5), np.int32), batch_size=1)
