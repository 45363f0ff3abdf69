"""InceptionV3 as FID, sFID and the inception score use it: the graph of 2015-12-05 in float32.

It is not the InceptionV3 that classifies ImageNet elsewhere: 1,008 classes, average pools that do
not count their padding, a max pool in the last block, and other weights. Parameters are named as in
`pt_inception-2015-12-05-6726825d.pth`, a port of that graph's weights; none is trained here.

What is computed is the same, but cheaper: the 1×1 convolutions of one input are one, and average
pools come behind the 1×1 convolution that they precede there, with which they commute.

Reference: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision"; Heusel
et al. 2017 (TTUR, fid.py); mseitzer/pytorch-fid, inception.py; toshas/torch-fidelity,
feature_extractor_inceptionv3.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

INPUT_SIDE = 299
FEATURES = ("64", "192", "768", "spatial", "pool", "logits", "biased_logits")
PUBLISHED_SHA256 = "6726825d"  # how that of the published file begins
_SPATIAL_CHANNELS = 7
_EPSILON = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """Shape of the net; the defaults are the published one.

    channels: of the first convolution; all others are in proportion to it.
    num_logits: classes.

    Raises:
        ValueError: channels that are no positive even number, or no classes.
    """

    channels: int = 32
    num_logits: int = 1008

    family: ClassVar[str] = "inception-fid"

    def __post_init__(self) -> None:
        if self.channels < 2 or self.channels % 2:
            raise ValueError(f"channels {self.channels} must be even and at least 2")
        if self.num_logits < 1:
            raise ValueError(f"num_logits {self.num_logits} must be at least 1")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "InceptionConfig":
        """Build a configuration from a dict such as `to_dict` gives.

        Raises:
            ValueError: a field that does not exist, or a value that is not allowed.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in fields if name not in known]:
            raise ValueError(
                f"InceptionConfig has no field {unknown[0]!r}; fields: {', '.join(known)}"
            )
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that survives JSON."""
        return dataclasses.asdict(self)

    def make_module(self) -> "InceptionV3":
        """Return the Flax module of these sizes."""
        return InceptionV3(channels=self.channels, num_logits=self.num_logits)

    def widths(self) -> dict[str, int]:
        """Return the number of values of each feature."""
        pooled = {name: int(name) * self.channels // 32 for name in ("64", "192", "768")}
        return pooled | {
            "spatial": 17 * 17 * _SPATIAL_CHANNELS,
            "pool": 64 * self.channels,
            "logits": self.num_logits,
            "biased_logits": self.num_logits,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inception:
    """The net with its weights.

    Attributes:
        config: its shape.
        params: nested dict of float32 arrays.
        sha256: of the file that the weights came from.
        fingerprint: SHA-256 of the parameters, the same whatever file they came in.
    """

    config: InceptionConfig
    params: Any = dataclasses.field(repr=False)
    sha256: str
    fingerprint: str

    @property
    def is_published(self) -> bool:
        """Whether the weights came from the published file, with which figures are comparable."""
        return self.sha256.startswith(PUBLISHED_SHA256)


def resize_images(
    images: UInt8[Array, "b H W 3"], side: int = INPUT_SIDE
) -> Float[Array, "b {side} {side} 3"]:
    """Bring images to what the net takes: squares of `side` pixels in [-1, 1), (x - 128) / 128.

    Bilinear as TensorFlow 1 did it: output pixel i lies at i · (old / new) of the input, the edge
    is repeated, and nothing is averaged on the way down.
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        low, high, share = _interpolation(images.shape[axis], side)
        left, right = (jnp.take(x, index, axis=axis, mode="clip") for index in (low, high))
        x = left + (right - left) * _along(share, axis)
    return (x - 128) / 128


def _interpolation(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each output pixel the two input pixels, and the share of the second."""
    at = np.arange(new, dtype=np.float32) * np.float32(np.float32(old) / np.float32(new))
    low = np.floor(at).astype(np.int32)
    return low, np.minimum(low + 1, old - 1), at - low


def _along(values: np.ndarray, axis: int) -> np.ndarray:
    """Return values with the other three axes of images."""
    return np.expand_dims(values, [i for i in range(4) if i != axis])


class _Unit(NamedTuple):
    """A convolution's kernel [kh kw i o], and the factor and offset [o] of the norm behind it."""

    kernel: Array
    factor: Array
    offset: Array

    def activate(self, x: Array) -> Array:
        return nn.relu(x * self.factor[None, None, None] + self.offset[None, None, None])


class ConvNorm(nn.Module):
    """The parameters of a convolution without bias and of the batch norm behind it."""

    shape: tuple[int, int, int, int]

    @nn.compact
    def __call__(self) -> _Unit:
        """Return them with the norm, whose statistics are frozen, as one factor and offset."""
        width = self.shape[-1:]
        kernel = self.param("kernel", nn.initializers.he_normal(), self.shape)
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        mean = self.param("mean", nn.initializers.zeros, width)
        var = self.param("var", nn.initializers.ones, width)
        factor = scale / jnp.sqrt(var + _EPSILON)
        return _Unit(kernel, factor, bias - mean * factor)


def _convolve(x: Array, kernel: Array, *, stride: int = 1, pad: bool = True) -> Array:
    """Convolve; `pad` keeps the size (of stride 1), without it nothing is padded."""
    height, width = ((x.shape[i + 1] - kernel.shape[i]) // stride + 1 for i in (0, 1))
    # On a CPU, XLA takes a path four times as slow where there is no padding whatever: so there is
    # some, and what it adds is cut off.
    x = lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME" if pad else ((0, 1), (0, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )
    return x if pad else x[:, :height, :width]


class Block(nn.Module):
    """What the parts of the net share: named convolutions, widths in proportion to `channels`."""

    channels: int

    def conv(
        self,
        name: str,
        x: Array,
        width: int,
        kernel_size: tuple[int, int],
        *,
        stride: int = 1,
        pad: bool = True,
    ) -> Array:
        """Convolve, normalise and rectify; `width` is the published one."""
        unit = ConvNorm((*kernel_size, x.shape[-1], width * self.channels // 32), name=name)()
        return unit.activate(_convolve(x, unit.kernel, stride=stride, pad=pad))

    def pointwise(self, x: Array, widths: Mapping[str, int]) -> list[Array]:
        """Apply several 1×1 convolutions to one input; `branch_pool` averages its neighbours."""
        units = [
            ConvNorm((1, 1, x.shape[-1], width * self.channels // 32), name=name)()
            for name, width in widths.items()
        ]
        product = _convolve(x, jnp.concatenate([unit.kernel for unit in units], axis=-1))
        ends = np.cumsum([unit.kernel.shape[-1] for unit in units])
        parts = jnp.split(product, ends[:-1], axis=-1)
        return [
            unit.activate(_average_neighbours(part) if name == "branch_pool" else part)
            for name, unit, part in zip(widths, units, parts, strict=True)
        ]


def _average_neighbours(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Average each position with those around it, of which there are fewer at the edge."""
    counts = np.ones((1, 1, 1, 1), np.float32)
    for axis in (1, 2):
        size = x.shape[axis]
        padding = [(1, 1) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(x, padding)
        x = sum(lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3))  # type: ignore
        ones = np.convolve(np.ones(size, np.float32), np.ones(3, np.float32), "same")
        counts = counts * _along(ones, axis)
    return x / counts


def _max_neighbours(x: Float[Array, "b H W c"]) -> Float[Array, "b h w c"]:
    """Return the largest of every 3 × 3 positions, two steps apart."""
    # Axis by axis and as slices: `nn.max_pool` takes six times as long on a CPU.
    for axis in (1, 2):
        last = x.shape[axis] - 2
        parts = [lax.slice_in_dim(x, i, i + last, 2, axis=axis) for i in range(3)]
        x = jnp.maximum(jnp.maximum(parts[0], parts[1]), parts[2])
    return x


class BlockA(Block):
    """1×1, 5×5 and two 3×3 branches; `Mixed_5b` to `Mixed_5d`."""

    pool: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        """Return the branches side by side."""
        widths = {"branch1x1": 64, "branch5x5_1": 48, "branch3x3dbl_1": 64}
        one, five, three, pool = self.pointwise(x, widths | {"branch_pool": self.pool})
        five = self.conv("branch5x5_2", five, 64, (5, 5))
        three = self.conv("branch3x3dbl_2", three, 96, (3, 3))
        three = self.conv("branch3x3dbl_3", three, 96, (3, 3))
        return jnp.concatenate([one, five, three, pool], axis=-1)


class BlockB(Block):
    """Halve the resolution; `Mixed_6a`."""

    @nn.compact
    def __call__(self, x: Float[Array, "b H W i"]) -> Float[Array, "b h w o"]:
        """Return the branches side by side."""
        halve: dict[str, Any] = {"stride": 2, "pad": False}
        one = self.conv("branch3x3", x, 384, (3, 3), **halve)
        two = self.conv("branch3x3dbl_1", x, 64, (1, 1))
        two = self.conv("branch3x3dbl_2", two, 96, (3, 3))
        two = self.conv("branch3x3dbl_3", two, 96, (3, 3), **halve)
        return jnp.concatenate([one, two, _max_neighbours(x)], axis=-1)


class BlockC(Block):
    """1×1 and 7×7 branches, the latter as rows and columns; `Mixed_6b` to `Mixed_6e`."""

    inner: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"]
    ) -> tuple[Float[Array, "b h w o"], Float[Array, "b h w c"]]:
        """Return the branches side by side, and the first alone."""
        widths = {"branch1x1": 192, "branch7x7_1": self.inner, "branch7x7dbl_1": self.inner}
        one, seven, double, pool = self.pointwise(x, widths | {"branch_pool": 192})
        seven = self.conv("branch7x7_2", seven, self.inner, (1, 7))
        seven = self.conv("branch7x7_3", seven, 192, (7, 1))
        for place in (2, 3, 4):
            kernel_size = (1, 7) if place % 2 else (7, 1)
            double = self.conv(f"branch7x7dbl_{place}", double, self.inner, kernel_size)
        double = self.conv("branch7x7dbl_5", double, 192, (1, 7))
        return jnp.concatenate([one, seven, double, pool], axis=-1), one


class BlockD(Block):
    """Halve the resolution again; `Mixed_7a`."""

    @nn.compact
    def __call__(self, x: Float[Array, "b H W i"]) -> Float[Array, "b h w o"]:
        """Return the branches side by side."""
        halve: dict[str, Any] = {"stride": 2, "pad": False}
        three, seven = self.pointwise(x, {"branch3x3_1": 192, "branch7x7x3_1": 192})
        three = self.conv("branch3x3_2", three, 320, (3, 3), **halve)
        seven = self.conv("branch7x7x3_2", seven, 192, (1, 7))
        seven = self.conv("branch7x7x3_3", seven, 192, (7, 1))
        seven = self.conv("branch7x7x3_4", seven, 192, (3, 3), **halve)
        return jnp.concatenate([three, seven, _max_neighbours(x)], axis=-1)


class BlockE(Block):
    """Branches that end in a row and a column side by side; `Mixed_7b` and `Mixed_7c`.

    max_pool: whether the pool takes the maximum, as the last block of this net alone does.
    """

    max_pool: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        """Return the branches side by side."""
        widths = {"branch1x1": 320, "branch3x3_1": 384, "branch3x3dbl_1": 448}
        if self.max_pool:
            one, three, double = self.pointwise(x, widths)
            pool = self.conv("branch_pool", nn.max_pool(x, (3, 3), (1, 1), "SAME"), 192, (1, 1))
        else:
            one, three, double, pool = self.pointwise(x, widths | {"branch_pool": 192})
        double = self.conv("branch3x3dbl_2", double, 384, (3, 3))
        ends = [
            self.conv(f"{name}{end}", x, 384, kernel_size)
            for name, x in (("branch3x3_2", three), ("branch3x3dbl_3", double))
            for end, kernel_size in (("a", (1, 3)), ("b", (3, 1)))
        ]
        return jnp.concatenate([one, *ends, pool], axis=-1)


class InceptionV3(Block):
    """The net; its inputs come from `resize_images`."""

    num_logits: int

    @nn.compact
    def __call__(self, x: Float[Array, "b H W 3"]) -> dict[str, Float[Array, "b d"]]:
        """Return all `FEATURES` of images of 299 × 299 pixels in [-1, 1).

        - `64`, `192`, `768`: averages over positions, at the depth where there are so many
          channels (behind either of the first max pools, and behind `Mixed_6e`).
        - `pool`: averages of the 2,048 channels at the end: FID, precision and recall.
        - `spatial`: the first 7 channels of the 17 × 17 positions of `Mixed_6d.branch1x1` behind
          its ReLU, row by row, 2,023 in all: sFID. In the graph it is the tensor `mixed_6/conv:0`;
          the graph counts the mixed blocks from 0, hence its 6 is the seventh, `Mixed_6d`.
        - `logits`: of the classes, without the bias: inception score.
        - `biased_logits`: with it.

        Reference: openai/guided-diffusion, evaluations/evaluator.py (`FID_SPATIAL_NAME`,
        `_create_softmax_graph`).
        """
        features = {}
        x = self.conv("Conv2d_1a_3x3", x, 32, (3, 3), stride=2, pad=False)
        x = self.conv("Conv2d_2a_3x3", x, 32, (3, 3), pad=False)
        x = self.conv("Conv2d_2b_3x3", x, 64, (3, 3))
        x = _max_neighbours(x)
        features["64"] = jnp.mean(x, axis=(1, 2))
        x = self.conv("Conv2d_3b_1x1", x, 80, (1, 1))
        x = self.conv("Conv2d_4a_3x3", x, 192, (3, 3), pad=False)
        x = _max_neighbours(x)
        features["192"] = jnp.mean(x, axis=(1, 2))
        for name, pool in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(self.channels, pool, name=name)(x)
        x = BlockB(self.channels, name="Mixed_6a")(x)
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160)):
            x, one = BlockC(self.channels, inner, name=name)(x)
        features["spatial"] = one[..., :_SPATIAL_CHANNELS].reshape(len(one), -1)
        x, _ = BlockC(self.channels, 192, name="Mixed_6e")(x)
        features["768"] = jnp.mean(x, axis=(1, 2))
        x = BlockD(self.channels, name="Mixed_7a")(x)
        x = BlockE(self.channels, max_pool=False, name="Mixed_7b")(x)
        x = BlockE(self.channels, max_pool=True, name="Mixed_7c")(x)
        features["pool"] = jnp.mean(x, axis=(1, 2))
        logits, bias = Classes(self.num_logits, name="fc")(features["pool"])
        return features | {"logits": logits, "biased_logits": logits + bias}


class Classes(nn.Module):
    """The last layer."""

    num_logits: int

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> tuple[Float[Array, "b d"], Float[Array, "1 d"]]:
        """Return the logits without bias, and the bias."""
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (x.shape[-1], self.num_logits))
        bias = self.param("bias", nn.initializers.zeros, (self.num_logits,))
        return jnp.matmul(x, kernel, precision=lax.Precision.HIGHEST), bias[None]
