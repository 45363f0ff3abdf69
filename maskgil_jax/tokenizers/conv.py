"""What the shapes of all convolutional tokenizers have in common.

A family's configuration adds its own fields, its module and the width of its codes.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn

from maskgil_jax.tokenizers.base import TokenizerSpec, check_fields
from maskgil_jax.tokenizers.vqgan import NORM_GROUPS

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvTokenizerConfig(abc.ABC):
    """Levels, widths and computation of a convolutional tokenizer.

    codebook_size: number of codes.
    channels: width of the nets at full resolution, a multiple of 32.
    channel_multipliers: width of each level over `channels`; every level but the last halves the
        resolution.
    num_res_blocks: residual blocks per level.
    image_channels: channels of the images.
    dtype: "float32" or "bfloat16", of the convolutions; parameters, norms and the quantiser stay
        in float32.

    Raises:
        ValueError: a value that is not allowed.
    """

    codebook_size: int
    channels: int = 128
    channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4)
    num_res_blocks: int
    image_channels: int = 3
    dtype: str = "float32"

    family: ClassVar[str]
    lookup_free: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        self._check_counts(("codebook_size", "channels", "num_res_blocks", "image_channels"))
        if self.channels % NORM_GROUPS:
            raise ValueError(
                f"channels is {self.channels}; it must be a multiple of {NORM_GROUPS}, the number "
                "of groups of the group norms"
            )
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(
                f"channel_multipliers is {self.channel_multipliers}; give at least one level, each "
                "multiplier at least 1, such as (1, 1, 2)"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")

    def _check_counts(self, names: Iterable[str]) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    @abc.abstractmethod
    def code_width(self) -> int:
        """Width of a code."""

    @property
    def downsample_factor(self) -> int:
        """Image pixels per token, along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def spec(self) -> TokenizerSpec:
        """What models and datasets must know of this tokenizer."""
        return TokenizerSpec(
            family=self.family,
            codebook_size=self.codebook_size,
            downsample_factor=self.downsample_factor,
            embed_dim=self.code_width,
            image_channels=self.image_channels,
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ConvTokenizerConfig":
        """Build a configuration from a dict such as `to_dict` gives; a field left out is a default.

        Raises:
            ValueError: a field that does not exist, or a value that is not allowed.
        """
        check_fields(cls, fields)
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that survives JSON."""
        fields = dataclasses.asdict(self)
        return fields | {"channel_multipliers": list(self.channel_multipliers)}

    @abc.abstractmethod
    def make_module(self) -> nn.Module:
        """Return the Flax module of these sizes."""
