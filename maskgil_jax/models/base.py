"""What the models of image tokens have in common: their contract.

A model's module is called with `(tokens [b gh gw], condition, train=False)` and returns float32
logits [b, gh·gw, K+1]. The decoder calls its two parts: the method `features`, with the same
arguments, gives [b, gh·gw, e], and `logits` maps some of them and their raster positions [b, n] to
[b, n, K+1]. In training it sows the size of its residual stream as
`transformer/output_norm` in the collection `intermediates`.

A causal model knows no mask token: it returns logits [b, gh·gw, K], those of a token from the
tokens before it in raster order, and is decoded token by token, see `models/cached.py`.

What a condition is, class labels or captions, its configuration knows: a pytree with the batch in
front, one value of which means "no condition".
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool

from maskgil_jax.models.conditioning import check_labels
from maskgil_jax.models.transformer import TransformerConfig, check_choices


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenModelConfig(abc.ABC):
    """Vocabulary and grid of a model, and the contract of every family.

    Attributes:
        codebook_size: number of image codes K; K itself is the mask token, where there is one.
        grid_size: (gh, gw), tokens per column and per row.
        head_alignment: the head is computed on its rows padded to a multiple of this number (the
            padding is neither stored nor returned); 1 switches it off.
    """

    family: ClassVar[str]
    # Whether a token is predicted from those before it, and not from all that are known.
    causal: ClassVar[bool] = False

    codebook_size: int
    grid_size: tuple[int, int]
    head_alignment: int = 128

    def __post_init__(self):
        object.__setattr__(self, "grid_size", tuple(self.grid_size))
        for name in ("codebook_size", "head_alignment"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if len(self.grid_size) != 2 or min(self.grid_size) < 1:
            raise ValueError(f"grid_size {self.grid_size} must be two numbers of at least 1")

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token; of one that is not known yet, while a causal model decodes."""
        return self.codebook_size

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the model knows: the codes and, unless it is causal, the mask."""
        return self.codebook_size + (not self.causal)

    @property
    def seq_len(self) -> int:
        """Number of image tokens."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def head_padding(self) -> int:
        """Rows by which the head is padded while it is computed."""
        return -self.num_tokens % self.head_alignment

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

    @abc.abstractmethod
    def make_module(self) -> nn.Module:
        """Return the Flax module."""

    @abc.abstractmethod
    def check_condition(self, condition: Any) -> Any:
        """Return a condition as NumPy arrays, the batch in front.

        Raises:
            ValueError: if it is none of this model's.
        """

    @abc.abstractmethod
    def read_condition(self, batch: Mapping[str, Any]) -> Any:
        """Return the condition of a batch of records, as datasets name its fields."""

    @abc.abstractmethod
    def null_condition(self, condition: Any) -> Any:
        """Return "no condition" for as many images, in the shapes of the one given."""

    @abc.abstractmethod
    def drop_condition(self, condition: Any, dropped: Bool[Array, " b"]) -> Any:
        """Return the condition with "no condition" for the images that are marked."""

    @abc.abstractmethod
    def example_condition(self) -> Any:
        """Return a condition of one image, for shapes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryModelConfig(TokenModelConfig, TransformerConfig):
    """Shape and options of LLaMA blocks over a grid, whose positions are 2D rotary rows.

    Attributes:
        cond_ropes: what the rows of a condition's tokens may be.
        cond_rope: rows of the condition's tokens: `identity` (cos 1, sin 0), or `zero` (cos = sin =
            0), which LlamaGen's published weights were trained with.
        rope_base: base of the rotary frequencies.
        rope_interpolation: whether another grid than the configured one is spread over its
            positions, instead of reaching beyond them.
        embedding_dropout: dropout rate on the embedded sequence, in [0, 1).
    """

    cond_ropes: ClassVar[tuple[str, ...]] = ("identity", "zero")

    cond_rope: str = "identity"
    rope_base: float = 10000.0
    rope_interpolation: bool = False
    embedding_dropout: float = 0.0

    def __post_init__(self):
        TransformerConfig.__post_init__(self)
        TokenModelConfig.__post_init__(self)
        check_choices(self, {"cond_rope": self.cond_ropes})
        if not self.rope_base > 0:
            raise ValueError(f"rope_base {self.rope_base} must be more than 0")
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(
                f"embedding_dropout {self.embedding_dropout} is out of range; allowed: [0, 1)"
            )
        if self.head_dim % 4:
            raise ValueError(f"2D RoPE needs a head dimension divisible by 4, not {self.head_dim}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassModelConfig(TokenModelConfig):
    """Vocabulary and grid of a class-conditional model; its conditions are labels.

    Attributes:
        num_classes: number of classes C; label C means "no condition".
    """

    num_classes: int

    def __post_init__(self):
        super().__post_init__()
        if self.num_classes < 1:
            raise ValueError(f"num_classes {self.num_classes} must be at least 1")

    @property
    def null_label(self) -> int:
        """Label that means "no condition"."""
        return self.num_classes

    def check_condition(self, condition: Any) -> np.ndarray:
        """Return labels as int32 [b] or, if they are mixtures, float32 [b, C+1]; see the base."""
        return check_labels(condition, self.num_classes)

    def read_condition(self, batch: Mapping[str, Any]) -> Any:
        """Return the labels; see the base."""
        return batch["label"]

    def null_condition(self, condition: Any) -> Any:
        """Return the null label, or the mixture that is it alone, for every image; see the base."""
        if condition.ndim == 2:
            return jnp.zeros_like(condition).at[:, -1].set(1)
        return jnp.full_like(condition, self.null_label)

    def drop_condition(self, condition: Any, dropped: Bool[Array, " b"]) -> Any:
        """Return the labels with the null label where marked; see the base."""
        return jnp.where(dropped, self.null_label, condition)

    def example_condition(self) -> Any:
        """Return one label."""
        return jnp.zeros((1,), jnp.int32)


def count_classes(model: TokenModelConfig) -> int:
    """Return the number of classes of a class-conditional model.

    Raises:
        ValueError: if it is conditioned on something else.
    """
    if not isinstance(model, ClassModelConfig):
        raise ValueError(
            f"a model of family {model.family!r} has no classes: it is conditioned on captions; "
            "give prompts, or a class-conditional model"
        )
    return model.num_classes
