"""LPIPS: how different two images look, as the weighted difference of VGG16 features.

The perceptual term of tokenizer training. Its weights are published (torchvision's VGG16 and five
learnt rows of weights) and are imported by `tools/convert_checkpoint.py`, never trained here.

Reference: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", equation 1 (variant "lin"); Simonyan and Zisserman 2015, configuration D.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from maskgil_jax.tokenizers.base import check_fields

# Convolutions by their place in torchvision's `features`, level by level; a ReLU follows each, and
# the last of every level is a tap.
LEVELS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# ImageNet's channel statistics, for images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10
MIN_SIDE = 2 ** (len(LEVELS) - 1)  # of images; below, the last level has no pixel left


@dataclasses.dataclass(frozen=True, kw_only=True)
class LPIPSConfig:
    """Shape of the feature net; the defaults are VGG16.

    widths: channels of the five levels.

    Raises:
        ValueError: not five positive numbers.
    """

    widths: Sequence[int] = (64, 128, 256, 512, 512)

    family: ClassVar[str] = "lpips"

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if len(self.widths) != len(LEVELS) or min(self.widths) < 1:
            raise ValueError(f"widths is {self.widths}; give {len(LEVELS)} numbers, at least 1")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LPIPSConfig":
        """Build a configuration from a dict such as `to_dict` gives.

        Raises:
            ValueError: a field that does not exist, or a value that is not allowed.
        """
        check_fields(cls, fields)
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that survives JSON."""
        return {"widths": list(self.widths)}

    def make_module(self) -> "LPIPS":
        """Return the Flax module of these sizes."""
        return LPIPS(self)


class LPIPS(nn.Module):
    """Measure the distance of images, in float32; parameters `vgg/conv_N` and `heads/lin_N`."""

    config: LPIPSConfig

    def setup(self) -> None:
        """Create the feature net and the heads."""
        self.vgg = VGGFeatures(tuple(self.config.widths))
        self.heads = Heads()

    def __call__(
        self, images: Float[Array, "b H W 3"], others: Float[Array, "b H W 3"]
    ) -> Float[Array, "b"]:
        """Return the distance of each pair of images in [-1, 1]; 0 for equal ones, never below.

        Sides are at least `MIN_SIDE` = 16 pixels.

        Raises:
            ValueError: the images are smaller.
        """
        if min(images.shape[1:3]) < MIN_SIDE:
            raise ValueError(f"images of {images.shape[1:3]} pixels: LPIPS needs at least 16 × 16")
        # Level by level over both at once: half as many, larger convolutions.
        both = jnp.concatenate([images, others])
        shift, scale = jnp.array(_SHIFT), jnp.array(_SCALE)
        taps = self.vgg((both - shift[None, None, None]) / scale[None, None, None])
        return self.heads([_difference(*jnp.split(_normalize(tap), 2)) for tap in taps])


class VGGFeatures(nn.Module):
    """The convolutions of VGG16; the activations after the last ReLU of each level."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "b H W 3"]) -> list[Array]:
        """Return five arrays [b h w c], each level at half the resolution of the one before."""
        taps = []
        for level, (places, width) in enumerate(zip(LEVELS, self.widths, strict=True)):
            if level:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for place in places:
                x = nn.relu(nn.Conv(width, (3, 3), padding=1, name=f"conv_{place}")(x))
            taps.append(x)
        return taps


class Heads(nn.Module):
    """Weigh the squared differences of each level's channels, and average over positions."""

    @nn.compact
    def __call__(self, differences: list[Array]) -> Float[Array, "b"]:
        """Return the sum over levels, one number per image."""
        total = jnp.zeros(len(differences[0]))
        for level, difference in enumerate(differences):
            weighted = nn.Conv(1, (1, 1), use_bias=False, name=f"lin_{level}")(difference)
            total += jnp.mean(weighted, axis=(1, 2, 3))
        return total


def _normalize(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Scale the channels of each position to unit length; none active is zero, gradient too."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    active = squared > 0
    # Where nothing is active, the gradient of the root is infinite and must never be formed.
    length = jnp.sqrt(jnp.where(active, squared, 1.0))
    return x * jnp.where(active, 1.0 / (length + _EPSILON), 0.0)


def _difference(one: Array, other: Array) -> Array:
    return jnp.square(one - other)
