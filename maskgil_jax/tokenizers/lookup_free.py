"""Lookup-free quantisation: a code is the signs of its latents, so no codebook is stored.

Sits between the encoder and the decoder of a tokenizer. Bit i of a token is 1 where latent i is
above zero; the decoder is given +1 for a set bit and -1 for the others.

Reference: Yu et al. 2024, "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation",
section 3.1; `modules/vqvae/lookup_free_quantize.py` of TencentARC/SEED-Voken.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

# Tokens are int32, whose last bit is the sign.
MAX_BITS = 30


class LookupFreeQuantized(NamedTuple):
    """What a lookup-free quantiser made of a grid of latents.

    straight_through: value of `signs`, gradient of the latents; the decoder's input.
    tokens: int32 codes in [0, 2**z).
    signs: +1 where the latent is above zero, else -1; without a gradient.
    """

    straight_through: Float[Array, "b gh gw z"]
    tokens: Int[Array, "b gh gw"]
    signs: Float[Array, "b gh gw z"]


def quantize(latents: Float[Array, "b gh gw z"]) -> LookupFreeQuantized:
    """Quantise latents of at most 30 bits; gradients pass straight through to them."""
    signs = jnp.where(latents > 0, 1.0, -1.0).astype(latents.dtype)
    # A zero with the latents' gradient: adding the difference to far latents would round signs.
    straight_through = signs + (latents - jax.lax.stop_gradient(latents))
    return LookupFreeQuantized(straight_through, encode_signs(latents), signs)


def encode_signs(latents: Float[Array, "*n z"]) -> Int[Array, "*n"]:
    """Return the token of every latent: the sum of 2**i over those bits i that are above zero."""
    places = jnp.arange(latents.shape[-1], dtype=jnp.int32)
    places = jnp.expand_dims(places, tuple(range(latents.ndim - 1)))
    return jnp.sum(jnp.left_shift((latents > 0).astype(jnp.int32), places), axis=-1)


def decode_signs(tokens: Integer[Array, "*n"], bits: int) -> Float[Array, "*n {bits}"]:
    """Return float32 signs of the tokens' bits, +1 or -1; tokens are in [0, 2**bits)."""
    places = jnp.expand_dims(jnp.arange(bits, dtype=tokens.dtype), tuple(range(tokens.ndim)))
    ones = jnp.right_shift(tokens[..., None], places) & 1
    # Not 2·ones - 1, which is no -1 where tokens are unsigned.
    return jnp.where(ones == 1, 1.0, -1.0).astype(jnp.float32)
