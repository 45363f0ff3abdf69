"""The tokenizer contract: what every image tokenizer offers, and the checks at its door.

`Tokenizer` binds the parameters of a module to two functions, `encode` (images to tokens, the
start of the training path) and `decode` (tokens to images, the end of the generation path).
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maskgil_jax.tokenizers.tiling import Tiling, map_tiles

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
        """Return the Flax module: `images → VQOutputs`, methods `encode` and `decode`.

        `encode` is `encode_latents`, then `quantize_latents`, which takes each position alone.
        """
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

    With a `tiling`, images larger than one tile are encoded and decoded tile by tile, and the
    result is a NumPy array: memory on the device is that of a tile, whatever the image, and codes
    and pixels are near those of the whole image, but not the same. Smaller images are not affected.

    Raises:
        ValueError: the tiles do not suit the downsample factor.
    """

    config: TokenizerConfig
    params: Mapping[str, Any] = dataclasses.field(repr=False)
    tiling: Tiling | None = None

    def __post_init__(self) -> None:
        if self.tiling is not None:
            self.tiling.in_tokens(self.spec.downsample_factor)
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
            ValueError: shape, dtype or range of the images does not fit the tokenizer; or they
                need tiles and are inside `jax.jit`.
            MemoryError: the device's memory does not suffice.
        """
        check_images(images, self.spec)
        grid = self.spec.grid_size(*images.shape[1:3])
        with self.explain_exhaustion("encode", len(images), grid, batch_size):
            if self._goes_in_tiles(grid, images):
                latents = self._map_tiles("encode_latents", images, jnp.float32, batch_size)
                return self._quantize(latents, batch_size)
            return self._apply("encode", images, jnp.float32, batch_size)

    def decode(
        self, tokens: Array | np.ndarray, *, batch_size: int | None = None
    ) -> Float[Array | np.ndarray, "b H W c"]:
        """Turn tokens [b gh gw] into float32 images [b H W c], near [-1, 1] but not clipped.

        `batch_size` bounds the memory: that many images are decoded at a time, and the result is
        a NumPy array.

        Raises:
            ValueError: shape, dtype or range of the tokens does not fit the tokenizer; or they
                need tiles and are inside `jax.jit`.
            MemoryError: the device's memory does not suffice.
        """
        check_tokens(tokens, self.spec)
        grid = tokens.shape[1:]
        with self.explain_exhaustion("decode", len(tokens), grid, batch_size):
            if self._goes_in_tiles(grid, tokens):
                return self._map_tiles("decode", tokens, jnp.int32, batch_size)
            return self._apply("decode", tokens, jnp.int32, batch_size)

    def _apply(
        self, method: str, inputs: Array | np.ndarray, dtype: Any, batch_size: int | None
    ) -> Array | np.ndarray:
        function = functools.partial(_apply_method, self.module, method, self.params)
        # Some devices complain of exhausted memory only when the result is waited for.
        return jax.block_until_ready(_in_batches(function, inputs, dtype, batch_size))

    def needs_tiles(self, grid: tuple[int, ...]) -> bool:
        """Return whether a grid of tokens, (gh, gw), is larger than one tile."""
        if self.tiling is None:
            return False
        return max(grid) > self.tiling.in_tokens(self.spec.downsample_factor)[0]

    def _goes_in_tiles(self, grid: tuple[int, ...], inputs: Array | np.ndarray) -> bool:
        if not self.needs_tiles(grid):
            return False
        if isinstance(inputs, jax.core.Tracer):
            raise ValueError(
                f"a grid of {grid[0]}×{grid[1]} tokens needs tiles, which are put "
                "together on the host; call the tokenizer outside jax.jit, or without a tiling"
            )
        return True

    def _map_tiles(
        self, method: str, inputs: Array | np.ndarray, dtype: Any, batch_size: int | None
    ) -> Float[np.ndarray, "b rows columns c"]:
        assert self.tiling is not None
        factor = self.spec.downsample_factor
        tile, overlap = self.tiling.in_tokens(factor)
        in_scale, out_scale = (1, factor) if method == "decode" else (factor, 1)
        return map_tiles(
            lambda part: np.asarray(self._apply(method, part, dtype, batch_size)),
            np.asarray(inputs),
            tile=tile,
            overlap=overlap,
            in_scale=in_scale,
            out_scale=out_scale,
        )

    def _quantize(
        self, latents: Float[np.ndarray, "b gh gw z"], batch_size: int | None
    ) -> Int[np.ndarray, "b gh gw"]:
        """Quantise blended latents, as many positions at a time as a tile of a batch has.

        Positions do not depend on one another, so they are dealt out without regard to where they
        lie. Memory is several thousand distances per position.
        """
        assert self.tiling is not None
        tile, _ = self.tiling.in_tokens(self.spec.downsample_factor)
        shape, width = latents.shape[:-1], latents.shape[-1]
        sides = [min(tile, side) for side in shape[1:]]
        positions = latents.reshape(-1, width)
        filling = -len(positions) % (sides[0] * sides[1])
        cells = np.pad(positions, ((0, filling), (0, 0))).reshape(-1, *sides, width)
        size = batch_size or max(len(latents), 1)
        tokens = np.asarray(self._apply("quantize_latents", cells, jnp.float32, size))
        return tokens.reshape(-1)[: len(positions)].reshape(shape)

    @contextlib.contextmanager
    def explain_exhaustion(
        self, verb: str, count: int, grid: tuple[int, ...], batch_size: int | None
    ) -> Iterator[None]:
        """Turn the device's complaint that memory is exhausted into a `MemoryError` with a remedy.

        A system that promises more memory than it has may end the process before it complains.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            factor = self.spec.downsample_factor
            at_once = count if batch_size is None else batch_size
            remedies = ["a smaller batch_size"] if at_once > 1 else []
            # Half the longer side, or half a tile, in whole tokens.
            side = max(grid)
            if self.tiling is not None:
                side = min(side, self.tiling.in_tokens(factor)[0])
            if side > 2:
                smaller = max(2, -(-side // 2)) * factor
                remedies.append(f"tile_size={smaller} (--tile_size), which works tile by tile")
            remedy = f"; give {', or '.join(remedies)}" if remedies else ""
            tiles = f" in tiles of {self.tiling.tile_size}" if self.tiling is not None else ""
            raise MemoryError(
                f"the device's memory does not suffice to {verb} {at_once} image(s) of "
                f"{grid[0] * factor}×{grid[1] * factor} pixels at a time{tiles}{remedy}"
            ) from error


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply_method(module: nn.Module, method: str, params: Mapping[str, Any], inputs: Array) -> Any:
    return module.apply({"params": params}, inputs, method=method)


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
