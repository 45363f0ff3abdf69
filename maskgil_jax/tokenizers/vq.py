"""The VQGAN tokenizers: two convolutional nets around a vector quantiser, at any width.

LlamaGen-VQ, MaskGIT-VQ and Chameleon-VQ are these nets with other sizes, with or without attention
at the lowest resolution and an l2-normalised codebook; each has a file that says which.

Reference: Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis".
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maskgil_jax.tokenizers.base import VQOutputs
from maskgil_jax.tokenizers.conv import ConvTokenizerConfig
from maskgil_jax.tokenizers.quantizers import VectorQuantizer
from maskgil_jax.tokenizers.vqgan import Decoder, Encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQConfig(ConvTokenizerConfig):
    """Shape of a VQGAN tokenizer; a family is a subclass with its published values.

    num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
    embed_dim: width of a code.
    latent_channels: width between the nets and the 1x1 convolutions around the quantiser.
    dropout: rate inside residual blocks, in training only.
    l2_normalize: search and look up codes on the unit sphere.
    level_attention: attend after every residual block of the lowest resolution, and not only in
        the middle of the nets.

    Raises:
        ValueError: a value that is not allowed.
    """

    codebook_size: int = 16384
    num_res_blocks: int = 2
    embed_dim: int = 8
    latent_channels: int = 256
    dropout: float = 0.0
    l2_normalize: bool = True
    level_attention: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts(("embed_dim", "latent_channels"))
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")

    @property
    def code_width(self) -> int:
        """Width of a code."""
        return self.embed_dim

    def make_module(self) -> "VQModel":
        """Return the Flax module of these sizes."""
        return VQModel(self)


class VQModel(nn.Module):
    """The tokenizer's nets and quantiser; images are floats in [-1, 1], NHWC."""

    config: VQConfig

    def setup(self) -> None:
        """Create the nets, the quantiser and the 1x1 convolutions around it."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        nets: dict[str, Any] = dict(
            channels=config.channels,
            channel_multipliers=config.channel_multipliers,
            num_res_blocks=config.num_res_blocks,
            level_attention=config.level_attention,
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

    def quantize_latents(self, latents: Float[Array, "b gh gw z"]) -> Int[Array, "b gh gw"]:
        """Turn what `encode_latents` returns into int32 tokens."""
        return self.quantizer.encode(latents)

    def encode(self, images: Float[Array, "b H W c"]) -> Int[Array, "b gh gw"]:
        """Turn images into int32 tokens."""
        return self.quantize_latents(self.encode_latents(images))

    def decode(self, tokens: Int[Array, "b gh gw"]) -> Float[Array, "b H W c"]:
        """Turn tokens into float32 images, not clipped."""
        return self._decode_codes(self.quantizer.look_up(tokens))

    def _decode_codes(
        self, codes: Float[Array, "b gh gw z"], train: bool = False
    ) -> Float[Array, "b H W c"]:
        return self.decoder(self.post_quant_conv(codes), train).astype(jnp.float32)
