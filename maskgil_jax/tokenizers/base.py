"""The tokenizer contract: what every image tokenizer offers, and the checks at its door.

`Tokenizer` binds the parameters of a module to two functions, `encode` (images to tokens, the
start of the training path) and `decode` (tokens to images, the end of the generation path).
"""

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Room for rounding in data scaled to [-1, 1]; anything further out is scaled differently.
_RANGE_SLACK = 1e-3
# Fields that change how codes are computed, but not what they mean.
_COMPUTATION = ("dtype", "dropout")
_SCALING = "scale uint8 images with images.astype('float32') / 127.5 - 1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """What a model or a dataset must know of a tokenizer.

    family: name of the tokenizer's kind.
    codebook_size: number of codes; tokens are in [0, codebook_size).
    downsample_factor: image pixels per token, along each side.
    embed_dim: width of a code.
    image_channels: channels of the images.
    """

    family: str
    codebook_size: int
    downsample_factor: int
    embed_dim: int
    image_channels: int = 3

    def __post_init__(self) -> None:
        if not self.family:
            raise ValueError("family is empty; give the name of the tokenizer's kind")
        for name in ("codebook_size", "downsample_factor", "embed_dim", "image_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the token grid (rows, columns) of an image of height x width pixels.

        Raises:
            ValueError: a side is not a positive multiple of `downsample_factor`.
        """
        factor = self.downsample_factor
        for name, side in (("height", height), ("width", width)):
            if side < factor or side % factor:
                near = max(factor, round(side / factor) * factor)
                raise ValueError(
                    f"image {name} {side} is not a multiple of the tokenizer's downsample factor "
                    f"{factor}; resize or crop it, for example to {near}"
                )
        return height // factor, width // factor


class VQOutputs(NamedTuple):
    """What training a tokenizer needs of one forward pass.

    reconstruction: float32 images, not clipped.
    tokens: int32 codes of the images.
    latents: the encoder's latents as the quantiser compared them, with the encoder's gradient.
    quantized: the nearest codes, with the codebook's gradient only; signs if lookup-free.
    codebook: all codes as the quantiser compared them, with the codebook's gradient; None if
        lookup-free.
    """

    reconstruction: Float[Array, "b H W c"]
    tokens: Int[Array, "b gh gw"]
    latents: Float[Array, "b gh gw z"]
    quantized: Float[Array, "b gh gw z"]
    codebook: Float[Array, "k z"] | None


@runtime_checkable
class TokenizerConfig(Protocol):
    """What the configuration of every family offers.

    family: its name.
    lookup_free: whether the bits of a code are signs of the latent, and no codebook is stored.
    """

    family: ClassVar[str]
    lookup_free: ClassVar[bool]

    def __hash__(self) -> int:
        """Tell equal configurations by equal numbers: programs are kept by configuration."""
        ...

    @property
    def spec(self) -> TokenizerSpec:
        """What models and datasets must know of this tokenizer."""
        ...

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TokenizerConfig":
        """Build a configuration from a dict such as `to_dict` gives."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that survives JSON."""
        ...

    def make_module(self) -> nn.Module:
        """Return the Flax module: `images → VQOutputs`, methods `encode` and `decode`."""
        ...


def check_fields(config_type: type, fields: Iterable[str]) -> None:
    """Raise a `ValueError` that names the nearest field for the first that does not exist."""
    known = [field.name for field in dataclasses.fields(config_type)]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{config_type.__name__} has no field {name!r}; did you mean {near!r}? "
                f"Fields: {', '.join(known)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer ready to use: its configuration and its parameters.

    Both functions also run inside `jax.jit`, where values cannot be read: there the range checks
    are left to the caller.
    """

    config: TokenizerConfig
    params: Mapping[str, Any] = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        # Once here, or every call would copy them to the device again.
        object.__setattr__(self, "params", jax.tree.map(jnp.asarray, self.params))

    @property
    def spec(self) -> TokenizerSpec:
        """What models and datasets must know of this tokenizer."""
        return self.config.spec

    @functools.cached_property
    def module(self) -> nn.Module:
        """The Flax module that `params` belong to."""
        return self.config.make_module()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of family, sizes and parameters: what the codes mean, however it is stored."""
        # Defaults are left out: a field that is added one day must not change what is recorded.
        usual = type(self.config)().to_dict()
        fields = {
            name: value
            for name, value in self.config.to_dict().items()
            if name not in _COMPUTATION and value != usual[name]
        }
        digest = hashlib.sha256(json.dumps([self.spec.family, fields], sort_keys=True).encode())
        update_digest(digest, self.params)
        return digest.hexdigest()

    def encode(
        self, images: Array | np.ndarray, *, batch_size: int | None = None
    ) -> Int[Array | np.ndarray, "b gh gw"]:
        """Turn float images [b H W c] in [-1, 1] into int32 tokens [b gh gw].

        `batch_size` bounds the memory: that many images are encoded at a time, and the result is
        a NumPy array.

        Raises:
            ValueError: shape, dtype or range of the images does not fit the tokenizer.
        """
        check_images(images, self.spec)
        function = functools.partial(_encode, self.module, self.params)
        return _in_batches(function, images, jnp.float32, batch_size)

    def decode(
        self, tokens: Array | np.ndarray, *, batch_size: int | None = None
    ) -> Float[Array | np.ndarray, "b H W c"]:
        """Turn tokens [b gh gw] into float32 images [b H W c], near [-1, 1] but not clipped.

        `batch_size` bounds the memory: that many images are decoded at a time, and the result is
        a NumPy array.

        Raises:
            ValueError: shape, dtype or range of the tokens does not fit the tokenizer.
        """
        check_tokens(tokens, self.spec)
        function = functools.partial(_decode, self.module, self.params)
        return _in_batches(function, tokens, jnp.int32, batch_size)


def update_digest(digest: Any, params: Mapping[str, Any]) -> None:
    """Add names, types, shapes and values of all parameters to a `hashlib` digest."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(dict(params))
    for path, leaf in leaves:
        array = np.asarray(leaf)
        name = "/".join(entry.key for entry in path)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())


def check_images(images: Array | np.ndarray, spec: TokenizerSpec) -> None:
    """Refuse images that the tokenizer cannot encode.

    Raises:
        ValueError: not [b H W c] with the spec's channels, not a floating dtype, a side that is
            not a multiple of the downsample factor, or values that are not in [-1, 1].
    """
    if images.ndim != 4:
        raise ValueError(
            f"images have shape {images.shape}; give a batch [b, height, width, channels]"
        )
    if images.shape[-1] != spec.image_channels:
        raise ValueError(
            f"images have {images.shape[-1]} channels (shape {images.shape}); this tokenizer takes "
            f"{spec.image_channels}, on the last axis"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images have dtype {images.dtype}; give floats in [-1, 1]: {_SCALING}")
    spec.grid_size(*images.shape[1:3])
    if isinstance(images, jax.core.Tracer) or images.size == 0:
        return
    low, high = float(images.min()), float(images.max())
    # Written so that NaN, which compares false, is refused too.
    if not (low >= -1 - _RANGE_SLACK and high <= 1 + _RANGE_SLACK):
        raise ValueError(
            f"images range from {low:g} to {high:g}; give finite values in [-1, 1]: {_SCALING}, "
            "and clip what resizing overshot"
        )


def check_tokens(tokens: Array | np.ndarray, spec: TokenizerSpec) -> None:
    """Refuse tokens that the tokenizer cannot decode.

    Raises:
        ValueError: not [b gh gw], not an integer dtype, an empty grid, or a code that is not in
            [0, codebook_size).
    """
    if tokens.ndim != 3 or 0 in tokens.shape[1:]:
        raise ValueError(
            f"tokens have shape {tokens.shape}; give a batch of grids [b, rows, columns]"
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens have dtype {tokens.dtype}; give integers, such as int32")
    if isinstance(tokens, jax.core.Tracer) or tokens.size == 0:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= spec.codebook_size:
        raise ValueError(
            f"tokens hold the code {low if low < 0 else high}; codes of this tokenizer are in "
            f"[0, {spec.codebook_size}). A mask token must be replaced before decoding"
        )


@functools.partial(jax.jit, static_argnums=0)
def _encode(module: nn.Module, params: Mapping[str, Any], images: Array) -> Any:
    return module.apply({"params": params}, images, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def _decode(module: nn.Module, params: Mapping[str, Any], tokens: Array) -> Any:
    return module.apply({"params": params}, tokens, method="decode")


def _in_batches(
    function: Callable[[Array], Array],
    inputs: Array | np.ndarray,
    dtype: Any,
    batch_size: int | None,
) -> Array | np.ndarray:
    """Apply a function to slices of the leading axis, all of one shape so that it compiles once.

    Each result leaves the device before the next batch is computed.
    """
    if batch_size is None:
        return function(jnp.asarray(inputs, dtype))
    if batch_size < 1:
        raise ValueError(
            f"batch_size is {batch_size}; it must be at least 1, or None for one batch"
        )
    outputs = []
    for start in range(0, max(len(inputs), 1), batch_size):
        batch = jnp.asarray(inputs[start : start + batch_size], dtype)
        padding = [(0, batch_size - len(batch))] + [(0, 0)] * (batch.ndim - 1)
        outputs.append(np.asarray(function(jnp.pad(batch, padding)))[: len(batch)])
    return np.concatenate(outputs)
