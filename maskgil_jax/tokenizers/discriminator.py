"""PatchGAN: a net that judges patches of images as real or reconstructed, and the losses of both.

Used only while a tokenizer is trained; `training/adversarial.py` updates it beside the tokenizer.

Reference: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks",
section 3.2.2; Esser et al. 2021, equation 6;
`tokenizer/tokenizer_image/discriminator_patchgan.py` and `vq_loss.py` of FoundationVision/LlamaGen.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_SLOPE = 0.2
_NORM_EPSILON = 1e-5
_MAX_WIDENING = 8
_init_kernel = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Shape of a PatchGAN; the defaults are the published ones.

    layers: convolutions that halve the resolution, at least 1; two more follow.
    channels: width of the first; each further one doubles it, up to eightfold.

    Raises:
        ValueError: a value that is not allowed.
    """

    layers: int = 3
    channels: int = 64

    def __post_init__(self) -> None:
        for name in ("layers", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"discriminator {name} is {getattr(self, name)}; it must be at least 1"
                )

    @property
    def receptive_field(self) -> int:
        """Side of the patch that one logit judges, in pixels; 70 with 3 layers."""
        field = 7
        for _ in range(self.layers):
            field = 2 * field + 2
        return field

    def check_images(self, height: int, width: int) -> None:
        """Raise a `ValueError` unless images of this size leave at least one patch to judge."""
        for name, side in (("height", height), ("width", width)):
            if side // 2**self.layers < 3:
                most = int(math.log2(side / 3)) if side >= 6 else 0
                remedy = f"use at most {most}" if most else "use images of at least 6 pixels"
                raise ValueError(
                    f"discriminator layers is {self.layers}: an image {name} of {side} pixels is "
                    f"too small to be halved so often; {remedy}"
                )


class PatchGAN(nn.Module):
    """Give one logit per patch: above 0 it is judged real, below 0 reconstructed."""

    config: DiscriminatorConfig

    @nn.compact
    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w"]:
        """Judge images in [-1, 1]."""
        layers, channels = self.config.layers, self.config.channels
        x = nn.leaky_relu(_conv(images, channels, 2, "conv_0"), _SLOPE)
        for layer in range(1, layers + 1):
            width = channels * min(2**layer, _MAX_WIDENING)
            stride = 2 if layer < layers else 1
            x = _conv(x, width, stride, f"conv_{layer}", use_bias=False)
            x = nn.leaky_relu(BatchNorm(name=f"norm_{layer}")(x), _SLOPE)
        return _conv(x, 1, 1, f"conv_{layers + 1}")[..., 0]


class BatchNorm(nn.Module):
    """Normalise each channel by mean and variance of the whole batch, over all devices.

    There are no running statistics: the net is only ever used in training.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalise, then scale and shift."""
        shape = (x.shape[-1],)
        scale = self.param("scale", _init_scale, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        mean = jnp.mean(x, axis=(0, 1, 2), keepdims=True)
        variance = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2), keepdims=True)
        factor = jax.lax.rsqrt(variance + _NORM_EPSILON) * scale[None, None, None]
        return (x - mean) * factor + bias[None, None, None]


def _init_scale(rng: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return 1.0 + 0.02 * jax.random.normal(rng, shape, dtype)


def _conv(x: Array, features: int, stride: int, name: str, *, use_bias: bool = True) -> Array:
    bound = 1 / math.sqrt(16 * x.shape[-1])

    def init_bias(rng, shape, dtype=jnp.float32):
        # As PyTorch leaves it: the published initialisation touches kernels and norms only.
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return nn.Conv(
        features,
        (4, 4),
        (stride, stride),
        ((1, 1), (1, 1)),
        use_bias=use_bias,
        kernel_init=_init_kernel,
        bias_init=init_bias,
        name=name,
    )(x)


def hinge_discriminator_loss(
    real: Float[Array, "b h w"], fake: Float[Array, "b h w"]
) -> Float[Array, ""]:
    """Ask for logits of at least 1 on real patches and at most -1 on reconstructed ones."""
    return 0.5 * (jnp.mean(nn.relu(1.0 - real)) + jnp.mean(nn.relu(1.0 + fake)))


def vanilla_discriminator_loss(
    real: Float[Array, "b h w"], fake: Float[Array, "b h w"]
) -> Float[Array, ""]:
    """Average the cross-entropies of judging real patches real and reconstructed ones not."""
    return 0.5 * (jnp.mean(nn.softplus(-real)) + jnp.mean(nn.softplus(fake)))


def generator_loss(fake: Float[Array, "b h w"]) -> Float[Array, ""]:
    """Ask for high logits on reconstructed patches."""
    return -jnp.mean(fake)


DISCRIMINATOR_LOSSES: dict[str, Callable[[Array, Array], Array]] = {
    "hinge": hinge_discriminator_loss,
    "vanilla": vanilla_discriminator_loss,
}


def find_discriminator_loss(kind: str) -> Callable[[Array, Array], Array]:
    """Return the loss `(real logits, fake logits) -> scalar` of a name.

    Raises:
        ValueError: if there is no such loss.
    """
    if kind not in DISCRIMINATOR_LOSSES:
        near = difflib.get_close_matches(kind, DISCRIMINATOR_LOSSES, n=1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        allowed = ", ".join(DISCRIMINATOR_LOSSES)
        raise ValueError(f"discriminator_loss {kind!r} is unknown; allowed: {allowed}{hint}")
    return DISCRIMINATOR_LOSSES[kind]
