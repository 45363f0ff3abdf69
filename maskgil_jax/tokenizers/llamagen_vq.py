"""LlamaGen-VQ: a convolutional tokenizer with an l2-normalised codebook, at any width.

The published f16 tokenizer is the default configuration; f8 has the multipliers (1, 2, 2, 4).

Reference: Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image
Generation", section 2.1; `tokenizer/tokenizer_image/vq_model.py` of FoundationVision/LlamaGen.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maskgil_jax.tokenizers.base import Tokenizer, TokenizerSpec
from maskgil_jax.tokenizers.quantizers import VectorQuantizer
from maskgil_jax.tokenizers.vqgan import NORM_GROUPS, Decoder, Encoder

FAMILY = "llamagen-vq"
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaGenVQConfig:
    """Shape of a LlamaGen-VQ tokenizer; the defaults are the published f16 one.

    codebook_size: number of codes.
    embed_dim: width of a code.
    channels: width of the nets at full resolution, a multiple of 32.
    channel_multipliers: width of each level over `channels`; every level but the last halves the
        resolution.
    num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
    latent_channels: width between the nets and the 1x1 convolutions around the quantiser.
    image_channels: channels of the images.
    dropout: rate inside residual blocks, in training only.
    l2_normalize: search and look up codes on the unit sphere.
    dtype: "float32" or "bfloat16", of the convolutions; parameters, norms and the quantiser stay
        in float32.
    """

    codebook_size: int = 16384
    embed_dim: int = 8
    channels: int = 128
    channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    latent_channels: int = 256
    image_channels: int = 3
    dropout: float = 0.0
    l2_normalize: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        counts = ("codebook_size", "embed_dim", "channels", "num_res_blocks", "latent_channels")
        for name in (*counts, "image_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
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
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")

    @property
    def downsample_factor(self) -> int:
        """Image pixels per token, along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def spec(self) -> TokenizerSpec:
        """What models and datasets must know of this tokenizer."""
        return TokenizerSpec(
            family=FAMILY,
            codebook_size=self.codebook_size,
            downsample_factor=self.downsample_factor,
            embed_dim=self.embed_dim,
            image_channels=self.image_channels,
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LlamaGenVQConfig":
        """Build a configuration from a dict such as `to_dict` gives; a field left out is a default.

        Raises:
            ValueError: a field that does not exist, or a value that is not allowed.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"unknown LlamaGen-VQ field {name!r}; did you mean {near!r}? "
                    f"Fields: {', '.join(known)}"
                )
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that survives JSON."""
        fields = dataclasses.asdict(self)
        return fields | {"channel_multipliers": list(self.channel_multipliers)}


class VQOutputs(NamedTuple):
    """What training a tokenizer needs of one forward pass.

    reconstruction: float32 images, not clipped.
    tokens: int32 codes of the images.
    latents: the encoder's latents as the quantiser compared them, with the encoder's gradient.
    quantized: the nearest codes, with the codebook's gradient only.
    codebook: all codes as the quantiser compared them, with the codebook's gradient.
    """

    reconstruction: Float[Array, "b H W c"]
    tokens: Int[Array, "b gh gw"]
    latents: Float[Array, "b gh gw z"]
    quantized: Float[Array, "b gh gw z"]
    codebook: Float[Array, "k z"]


class LlamaGenVQ(nn.Module):
    """The tokenizer's nets and quantiser; images are floats in [-1, 1], NHWC."""

    config: LlamaGenVQConfig

    def setup(self) -> None:
        """Create the nets, the quantiser and the 1x1 convolutions around it."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        nets: dict[str, Any] = dict(
            channels=config.channels,
            channel_multipliers=config.channel_multipliers,
            num_res_blocks=config.num_res_blocks,
            dropout=config.dropout,
            dtype=dtype,
        )
        self.encoder = Encoder(latent_channels=config.latent_channels, **nets)
        self.decoder = Decoder(image_channels=config.image_channels, **nets)
        self.quantizer = VectorQuantizer(
            config.codebook_size, config.embed_dim, config.l2_normalize
        )
        self.quant_conv = nn.Conv(config.embed_dim, (1, 1), dtype=dtype)
        self.post_quant_conv = nn.Conv(config.latent_channels, (1, 1), dtype=dtype)

    def __call__(self, images: Float[Array, "b H W c"], train: bool = False) -> VQOutputs:
        """Reconstruct images and return what the losses need.

        With `train` and a dropout rate, the rng stream "dropout" must be given.
        """
        quantized = self.quantizer(self.encode_latents(images, train))
        return VQOutputs(
            reconstruction=self._decode_codes(quantized.straight_through, train),
            tokens=quantized.tokens,
            latents=quantized.latents,
            quantized=quantized.codes,
            codebook=quantized.codebook,
        )

    def encode_latents(
        self, images: Float[Array, "b H W c"], train: bool = False
    ) -> Float[Array, "b gh gw z"]:
        """Return the float32 latents in front of the quantiser, before any normalisation."""
        return self.quant_conv(self.encoder(images, train)).astype(jnp.float32)

    def encode(self, images: Float[Array, "b H W c"]) -> Int[Array, "b gh gw"]:
        """Turn images into int32 tokens."""
        return self.quantizer.encode(self.encode_latents(images))

    def decode(self, tokens: Int[Array, "b gh gw"]) -> Float[Array, "b H W c"]:
        """Turn tokens into float32 images, not clipped."""
        return self._decode_codes(self.quantizer.look_up(tokens))

    def _decode_codes(
        self, codes: Float[Array, "b gh gw z"], train: bool = False
    ) -> Float[Array, "b H W c"]:
        return self.decoder(self.post_quant_conv(codes), train).astype(jnp.float32)


def create_tokenizer(config: LlamaGenVQConfig, params: Mapping[str, Any]) -> Tokenizer:
    """Bind parameters to the tokenizer that a configuration describes."""
    return Tokenizer(spec=config.spec, module=LlamaGenVQ(config), params=params)
