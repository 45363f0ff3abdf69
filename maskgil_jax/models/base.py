"""What the class-conditional models of masked image tokens have in common: their contract.

A model's module is called with `(tokens [b gh gw], labels [b], train=False)` and returns float32
logits [b, gh·gw, K+1]. The decoder calls its two parts: the method `features`, with the same
arguments, gives [b, gh·gw, e], and `logits` maps some of them and their raster positions [b, n] to
[b, n, K+1]. In training it sows the size of its residual stream as
`transformer/output_norm` in the collection `intermediates`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import linen as nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenModelConfig:
    """Vocabulary and grid of a class-conditional model, and the contract of every family.

    Attributes:
        codebook_size: number of image codes K; K itself is the mask token.
        num_classes: number of classes C; label C means "no condition".
        grid_size: (gh, gw), tokens per column and per row.
        head_alignment: the head is computed on its rows padded to a multiple of this number (the
            padding is neither stored nor returned); 1 switches it off.
    """

    family: ClassVar[str]

    codebook_size: int
    num_classes: int
    grid_size: tuple[int, int]
    head_alignment: int = 128

    def __post_init__(self):
        object.__setattr__(self, "grid_size", tuple(self.grid_size))
        for name in ("codebook_size", "num_classes", "head_alignment"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if len(self.grid_size) != 2 or min(self.grid_size) < 1:
            raise ValueError(f"grid_size {self.grid_size} must be two numbers of at least 1")

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token."""
        return self.codebook_size

    @property
    def null_label(self) -> int:
        """Label that means "no condition"."""
        return self.num_classes

    @property
    def seq_len(self) -> int:
        """Number of image tokens."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def head_padding(self) -> int:
        """Rows by which the head is padded while it is computed."""
        return -(self.codebook_size + 1) % self.head_alignment

    @property
    def preset(self) -> str:
        """Name of the preset whose settings such weights were trained for."""
        return "recommended"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON-friendly types."""
        return dataclasses.asdict(self) | {"grid_size": list(self.grid_size)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TokenModelConfig":
        """Build from `to_dict`'s result.

        Raises:
            ValueError: if a field is unknown or missing.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if set(fields) - known or required - set(fields):
            raise ValueError(
                f"{cls.__name__}: unknown fields {sorted(set(fields) - known)}, missing fields "
                f"{sorted(required - set(fields))}; allowed: {', '.join(sorted(known))}"
            )
        return cls(**{**fields, "grid_size": tuple(fields["grid_size"])})

    def make_module(self) -> nn.Module:
        """Return the Flax module."""
        raise NotImplementedError(f"{type(self).__name__} has no module")
