"""Convolutional encoder and decoder of the VQGAN family, NHWC.

The encoder maps images to a latent grid in front of a quantiser; the decoder maps quantised latents
back to images. Both attend (one head) in their middle and, where the family does, after every block
of their lowest resolution.

Reference: Esser et al. 2021, "Taming Transformers", and `tokenizer/tokenizer_image/vq_model.py` of
FoundationVision/LlamaGen, whose weights load into these nets.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NORM_GROUPS = 32
NORM_EPSILON = 1e-6
# Right and bottom only, as published weights were trained: symmetrical padding would shift every
# feature map by one pixel.
DOWNSAMPLE_PADDING = ((0, 1), (0, 1))


class GroupNorm(nn.Module):
    """Normalise groups of channels over all positions, in float32 whatever the input's dtype.

    Statistics are reduced per channel first and per group afterwards: the pass over the image then
    keeps channels innermost, which on a CPU takes a third of the time at 256 channels.

    Without `affine` there is no scale and bias, hence no parameter.
    """

    num_groups: int = NORM_GROUPS
    epsilon: float = NORM_EPSILON
    affine: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b H W c"]:
        """Return the normalised input in its own dtype."""
        scale = bias = None
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
            bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return _group_norm(x, scale, bias, self.num_groups, self.epsilon)


# Jitted, so that the many norms of a net are traced once for each shape.
@functools.partial(jax.jit, static_argnums=(3, 4))
def _group_norm(
    x: Float[Array, "b H W c"],
    scale: Float[Array, " c"] | None,
    bias: Float[Array, " c"] | None,
    num_groups: int,
    epsilon: float,
) -> Float[Array, "b H W c"]:
    values = x.astype(jnp.float32)
    mean = _mean_of_groups(values.mean((1, 2)), num_groups)
    centred = values - mean[:, None, None, :]
    variance = _mean_of_groups(jnp.square(centred).mean((1, 2)), num_groups)
    factor = jax.lax.rsqrt(variance + epsilon)
    if scale is None or bias is None:
        return (centred * factor[:, None, None, :]).astype(x.dtype)
    factor = factor * scale[None].astype(jnp.float32)
    shift = bias[None, None, None].astype(jnp.float32)
    return (centred * factor[:, None, None, :] + shift).astype(x.dtype)


def _mean_of_groups(per_channel: Float[Array, "b c"], num_groups: int) -> Float[Array, "b c"]:
    batch, channels = per_channel.shape
    grouped = per_channel.reshape(batch, num_groups, channels // num_groups)
    return jnp.repeat(grouped.mean(-1), channels // num_groups, axis=-1)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions around a skip, projected when the channel count changes."""

    features: int
    dropout: float = 0.0
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "b H W c"], train: bool = False
    ) -> Float[Array, "b H W features"]:
        """Return the input, projected if need be, plus the residual branch."""

        def convolve(name: str, side: int, inputs: Array) -> Array:
            return nn.Conv(
                self.features, (side, side), use_bias=self.use_bias, dtype=self.dtype, name=name
            )(inputs)

        y = convolve("conv1", 3, nn.swish(GroupNorm(name="norm1")(x)))
        y = nn.swish(GroupNorm(name="norm2")(y))
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        y = convolve("conv2", 3, y)
        if x.shape[-1] != self.features:
            x = convolve("shortcut", 1, x)
        return x + y


class AttentionBlock(nn.Module):
    """Attend with a single head over all positions of the grid, around a skip."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b gh gw e"]) -> Float[Array, "b gh gw e"]:
        """Return the input plus what its positions attended to."""
        batch, height, width, channels = x.shape
        normed = GroupNorm(name="norm")(x)

        def project(name: str, inputs: Array) -> Array:
            return nn.Conv(channels, (1, 1), dtype=self.dtype, name=name)(inputs)

        q, k, v = (project(name, normed).reshape(batch, height * width, channels) for name in "qkv")
        logits = jnp.einsum("ble,bse->bls", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * channels**-0.5, axis=-1).astype(self.dtype)
        attended = jnp.einsum("bls,bse->ble", weights, v)
        return x + project("out", attended.reshape(x.shape))


def upsample_nearest(x: Float[Array, "b gh gw c"]) -> Float[Array, "b H W c"]:
    """Double height and width by repeating every pixel."""
    batch, height, width, channels = x.shape
    tiled = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return tiled.reshape(batch, 2 * height, 2 * width, channels)


class Encoder(nn.Module):
    """Map images to a latent grid, `2**(levels - 1)` times smaller per side.

    Level i has `channels * channel_multipliers[i]` channels and `num_res_blocks` residual blocks.
    """

    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    latent_channels: int
    level_attention: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b H W c"], train: bool = False
    ) -> Float[Array, "b gh gw latent"]:
        """Encode images in [-1, 1]; `train` turns dropout on."""

        def residual(name: str, features: int, x: Array) -> Array:
            return ResidualBlock(features, self.dropout, self.dtype, name=name)(x, train)

        last = len(self.channel_multipliers) - 1
        x = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv_in")(images)
        for level, multiplier in enumerate(self.channel_multipliers):
            for block in range(self.num_res_blocks):
                x = residual(f"down_{level}_res_{block}", self.channels * multiplier, x)
                if level == last and self.level_attention:
                    x = AttentionBlock(self.dtype, name=f"down_{level}_attn_{block}")(x)
            if level != last:
                x = nn.Conv(
                    x.shape[-1],
                    (3, 3),
                    (2, 2),
                    DOWNSAMPLE_PADDING,
                    dtype=self.dtype,
                    name=f"down_{level}_downsample",
                )(x)
        x = residual("mid_res_0", x.shape[-1], x)
        x = AttentionBlock(self.dtype, name="mid_attn")(x)
        x = residual("mid_res_1", x.shape[-1], x)
        x = nn.swish(GroupNorm(name="norm_out")(x))
        return nn.Conv(self.latent_channels, (3, 3), dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Map a latent grid to images; the mirror of `Encoder` with one more block per level.

    `up_0` is the lowest resolution. The output is not clipped.
    """

    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    image_channels: int
    level_attention: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, latents: Float[Array, "b gh gw latent"], train: bool = False
    ) -> Float[Array, "b H W c"]:
        """Decode latents to images, not clipped; `train` turns dropout on."""

        def residual(name: str, features: int, x: Array) -> Array:
            return ResidualBlock(features, self.dropout, self.dtype, name=name)(x, train)

        widths = [self.channels * m for m in reversed(self.channel_multipliers)]
        x = nn.Conv(widths[0], (3, 3), dtype=self.dtype, name="conv_in")(latents)
        x = residual("mid_res_0", widths[0], x)
        x = AttentionBlock(self.dtype, name="mid_attn")(x)
        x = residual("mid_res_1", widths[0], x)
        for level, width in enumerate(widths):
            for block in range(self.num_res_blocks + 1):
                x = residual(f"up_{level}_res_{block}", width, x)
                if level == 0 and self.level_attention:
                    x = AttentionBlock(self.dtype, name=f"up_{level}_attn_{block}")(x)
            if level != len(widths) - 1:
                x = upsample_nearest(x)
                x = nn.Conv(width, (3, 3), dtype=self.dtype, name=f"up_{level}_upsample")(x)
        x = nn.swish(GroupNorm(name="norm_out")(x))
        return nn.Conv(self.image_channels, (3, 3), dtype=self.dtype, name="conv_out")(x)
