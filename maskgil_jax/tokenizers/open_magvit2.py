"""Open-MAGVIT2: convolutional nets without attention around a lookup-free quantiser.

Every code is a row of signs, 18 of them in the published tokenizer. The code map also drives the
decoder's norms, level by level.

Reference: Luo et al. 2024, "Open-MAGVIT2: An Open-Source Project Toward Democratizing
Auto-regressive Visual Generation", section 3.1; `modules/diffusionmodules/improved_model.py` of
TencentARC/SEED-Voken, whose weights load into these nets.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maskgil_jax.tokenizers import lookup_free
from maskgil_jax.tokenizers.base import VQOutputs
from maskgil_jax.tokenizers.conv import ConvTokenizerConfig
from maskgil_jax.tokenizers.vqgan import NORM_EPSILON, GroupNorm, ResidualBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenMAGVIT2Config(ConvTokenizerConfig):
    """Shape of an Open-MAGVIT2 tokenizer; the defaults are the published one for 256x256 images.

    codebook_size: number of codes, a power of two; a latent has as many channels as a code bits.
    num_res_blocks: residual blocks per level, and in the middle of each net.

    Raises:
        ValueError: a value that is not allowed.
    """

    codebook_size: int = 2**18
    num_res_blocks: int = 4

    family: ClassVar[str] = "open-magvit2"
    lookup_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        sizes = [2**bits for bits in range(1, lookup_free.MAX_BITS + 1)]
        if self.codebook_size not in sizes:
            raise ValueError(
                f"codebook_size is {self.codebook_size}; codes are rows of bits, so it must be a "
                f"power of two from 2 to 2**{lookup_free.MAX_BITS}, for example 2**18"
            )
        super().__post_init__()

    @property
    def code_width(self) -> int:
        """Bits of a code, which is the width of a latent."""
        return self.codebook_size.bit_length() - 1

    def make_module(self) -> "OpenMAGVIT2":
        """Return the Flax module of these sizes."""
        return OpenMAGVIT2(self)


class AdaptiveGroupNorm(nn.Module):
    """Normalise groups of channels, then scale and shift them by what the code map holds.

    Scales are linear in the standard deviation of each bit over the map, shifts in its mean.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "b H W c"], code_map: Float[Array, "b gh gw z"]
    ) -> Float[Array, "b H W c"]:
        """Return the normalised input in its own dtype; all is computed in float32."""
        channels, positions = x.shape[-1], code_map.shape[1] * code_map.shape[2]
        mean = code_map.mean((1, 2))
        squares = jnp.square(code_map - mean[:, None, None, :]).sum((1, 2))
        # A map of one position varies by nothing; the original divides zero by zero there.
        deviation = jnp.sqrt(squares / max(positions - 1, 1) + NORM_EPSILON)
        scale = nn.Dense(channels, name="gamma")(deviation)[:, None, None, :]
        shift = nn.Dense(channels, name="beta")(mean)[:, None, None, :]
        normed = GroupNorm(affine=False, name="norm")(x.astype(jnp.float32))
        return (scale * normed + shift).astype(x.dtype)


def depth_to_space(x: Float[Array, "b H W c"]) -> Float[Array, "b H2 W2 c4"]:
    """Double height and width: each quarter of the channels becomes one pixel of every 2x2 tile.

    The first quarter is the top left pixel, the second the top right one.
    """
    batch, height, width, channels = x.shape
    tiles = x.reshape(batch, height, width, 2, 2, channels // 4)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, channels // 4)


class LookupFreeEncoder(nn.Module):
    """Map images to a grid of latents, one channel per bit, `2**(levels - 1)` times smaller."""

    config: OpenMAGVIT2Config

    @nn.compact
    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b gh gw z"]:
        """Encode images in [-1, 1]."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)

        def residual(name: str, features: int, x: Array) -> Array:
            return ResidualBlock(features, dtype=dtype, use_bias=False, name=name)(x)

        last = len(config.channel_multipliers) - 1
        x = nn.Conv(config.channels, (3, 3), use_bias=False, dtype=dtype, name="conv_in")(images)
        for level, multiplier in enumerate(config.channel_multipliers):
            width = config.channels * multiplier
            for block in range(config.num_res_blocks):
                x = residual(f"down_{level}_res_{block}", width, x)
            if level != last:
                # On all sides, unlike the other families.
                padding = ((1, 1), (1, 1))
                name = f"down_{level}_downsample"
                x = nn.Conv(width, (3, 3), (2, 2), padding, dtype=dtype, name=name)(x)
        for block in range(config.num_res_blocks):
            x = residual(f"mid_res_{block}", x.shape[-1], x)
        x = nn.swish(GroupNorm(name="norm_out")(x))
        return nn.Conv(config.code_width, (1, 1), dtype=dtype, name="conv_out")(x)


class LookupFreeDecoder(nn.Module):
    """Map a grid of signs to images, with as many blocks per level as the encoder.

    `up_0` is the lowest resolution. The output is not clipped.
    """

    config: OpenMAGVIT2Config

    @nn.compact
    def __call__(self, code_map: Float[Array, "b gh gw z"]) -> Float[Array, "b H W c"]:
        """Decode signs, +1 or -1, to images, not clipped."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)

        def residual(name: str, features: int, x: Array) -> Array:
            return ResidualBlock(features, dtype=dtype, use_bias=False, name=name)(x)

        widths = [config.channels * m for m in reversed(config.channel_multipliers)]
        x = nn.Conv(widths[0], (3, 3), dtype=dtype, name="conv_in")(code_map)
        for block in range(config.num_res_blocks):
            x = residual(f"mid_res_{block}", widths[0], x)
        for level, width in enumerate(widths):
            x = AdaptiveGroupNorm(name=f"up_{level}_norm")(x, code_map)
            for block in range(config.num_res_blocks):
                x = residual(f"up_{level}_res_{block}", width, x)
            if level != len(widths) - 1:
                x = nn.Conv(4 * width, (3, 3), dtype=dtype, name=f"up_{level}_upsample")(x)
                x = depth_to_space(x)
        x = nn.swish(GroupNorm(name="norm_out")(x))
        return nn.Conv(config.image_channels, (3, 3), dtype=dtype, name="conv_out")(x)


class OpenMAGVIT2(nn.Module):
    """The tokenizer's nets around its quantiser; images are floats in [-1, 1], NHWC.

    The nets have no dropout: `train` is there for the contract and changes nothing.
    """

    config: OpenMAGVIT2Config

    def setup(self) -> None:
        """Create the nets."""
        self.encoder = LookupFreeEncoder(self.config)
        self.decoder = LookupFreeDecoder(self.config)

    def __call__(self, images: Float[Array, "b H W c"], train: bool = False) -> VQOutputs:
        """Reconstruct images and return what the losses need."""
        latents = self.encode_latents(images, train)
        quantized = lookup_free.quantize(latents)
        return VQOutputs(
            reconstruction=self._decode_signs(quantized.straight_through),
            tokens=quantized.tokens,
            latents=latents,
            quantized=quantized.signs,
            codebook=None,
        )

    def encode_latents(
        self, images: Float[Array, "b H W c"], train: bool = False
    ) -> Float[Array, "b gh gw z"]:
        """Return the float32 latents, whose signs are the codes."""
        return self.encoder(images).astype(jnp.float32)

    def quantize_latents(self, latents: Float[Array, "b gh gw z"]) -> Int[Array, "b gh gw"]:
        """Turn what `encode_latents` returns into int32 tokens."""
        return lookup_free.encode_signs(latents)

    def encode(self, images: Float[Array, "b H W c"]) -> Int[Array, "b gh gw"]:
        """Turn images into int32 tokens."""
        return self.quantize_latents(self.encode_latents(images))

    def decode(self, tokens: Int[Array, "b gh gw"]) -> Float[Array, "b H W c"]:
        """Turn tokens into float32 images, not clipped."""
        return self._decode_signs(lookup_free.decode_signs(tokens, self.config.code_width))

    def _decode_signs(self, signs: Float[Array, "b gh gw z"]) -> Float[Array, "b H W c"]:
        return self.decoder(signs).astype(jnp.float32)
