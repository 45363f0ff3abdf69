"""Vector quantisation: latents to the index of their nearest code, and back.

Sits between the encoder and the decoder of a tokenizer. Codes and latents may be l2-normalised, in
which case both the search and the look-up happen on the unit sphere.

Reference: van den Oord et al. 2017, "Neural Discrete Representation Learning"; Yu et al. 2021,
"Vector-quantized Image Modeling with Improved VQGAN", section 3.2 (factorised, normalised codes);
`tokenizer/tokenizer_image/vq_model.py` of FoundationVision/LlamaGen.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Codes compared at a time. The widest temporary array is [positions, CODE_BLOCK], whatever the size
# of the codebook.
CODE_BLOCK = 4096
_TINY = 1e-12


class Quantized(NamedTuple):
    """What a quantiser made of a grid of latents.

    straight_through: value of `codes`, gradient of `latents`; the decoder's input.
    tokens: int32 index of the nearest code.
    latents: the latents as the search saw them (unit length when l2-normalised).
    codes: the nearest codes, differentiable in the codebook.
    codebook: all codes as the search saw them.
    """

    straight_through: Float[Array, "b gh gw z"]
    tokens: Int[Array, "b gh gw"]
    latents: Float[Array, "b gh gw z"]
    codes: Float[Array, "b gh gw z"]
    codebook: Float[Array, "k z"]


def normalize(x: Float[Array, "*n z"]) -> Float[Array, "*n z"]:
    """Scale the last axis to unit length; a zero vector stays zero, with a finite gradient."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, _TINY**2))


def squared_distances(
    latents: Float[Array, "*n z"], codebook: Float[Array, "k z"]
) -> Float[Array, "*n k"]:
    """Compute squared Euclidean distances of every latent to every code."""
    products = jnp.einsum("...z,kz->...k", latents, codebook, precision="highest")
    latent_norms = jnp.sum(jnp.square(latents), axis=-1, keepdims=True)
    code_norms = jnp.sum(jnp.square(codebook), axis=-1)
    return latent_norms + _along_codes(code_norms, latents) - 2.0 * products


def _along_codes(per_code: Float[Array, "k"], latents: Float[Array, "*n z"]) -> Array:
    """Give a value per code the leading axes of the latents, all of length one."""
    return jnp.expand_dims(per_code, tuple(range(latents.ndim - 1)))


def nearest_codes(
    latents: Float[Array, "*n z"], codebook: Float[Array, "k z"], block: int = CODE_BLOCK
) -> Int[Array, "*n"]:
    """Find the index of the nearest code of every latent; of equally near codes, the lowest.

    Codes are compared in blocks of `block` with a running minimum, so memory grows with
    positions x block and not with positions x codebook size. The latents keep their leading axes,
    so a batch sharded over devices stays sharded.
    """
    codebook_size, width = codebook.shape
    if codebook_size <= block:
        return jnp.argmin(squared_distances(latents, codebook), axis=-1).astype(jnp.int32)
    padding = -codebook_size % block
    # A padded code is infinitely far away: never chosen.
    blocks = jnp.pad(codebook, ((0, padding), (0, 0))).reshape(-1, block, width)
    penalties = jnp.pad(jnp.zeros(codebook_size), (0, padding), constant_values=jnp.inf)

    def step(best, inputs):
        distance, index = best
        offset, codes, penalty = inputs
        distances = squared_distances(latents, codes) + _along_codes(penalty, latents)
        nearest = jnp.argmin(distances, axis=-1).astype(jnp.int32)
        candidate = jnp.min(distances, axis=-1)
        # Strictly nearer: a tie keeps the code with the lower index, as one argmin would.
        closer = candidate < distance
        index = jnp.where(closer, offset + nearest, index)
        return (jnp.where(closer, candidate, distance), index), None

    shape = latents.shape[:-1]
    start = (jnp.full(shape, jnp.inf, latents.dtype), jnp.zeros(shape, jnp.int32))
    offsets = jnp.arange(blocks.shape[0], dtype=jnp.int32) * block
    (_, tokens), _ = jax.lax.scan(step, start, (offsets, blocks, penalties.reshape(-1, block)))
    return tokens


def init_codebook(rng: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    """Draw codes uniformly in +-1 / codebook size."""
    return jax.random.uniform(rng, shape, dtype, -1.0 / shape[0], 1.0 / shape[0])


def init_unit_codebook(rng: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    """Draw codes uniformly in +-1 / codebook size, then scale each to unit length."""
    return normalize(init_codebook(rng, shape, dtype))


class VectorQuantizer(nn.Module):
    """Replace latents by their nearest codes, in float32."""

    codebook_size: int
    embed_dim: int
    l2_normalize: bool = True

    def setup(self) -> None:
        """Create the codebook."""
        init = init_unit_codebook if self.l2_normalize else init_codebook
        shape = (self.codebook_size, self.embed_dim)
        self.codebook = self.param("codebook", init, shape, jnp.float32)

    def __call__(self, latents: Float[Array, "b gh gw z"]) -> Quantized:
        """Quantise latents; gradients pass straight through to them.

        Reference: van den Oord et al. 2017, section 3.2.
        """
        latents, codebook = self._project(latents), self._project(self.codebook)
        tokens = nearest_codes(jax.lax.stop_gradient(latents), jax.lax.stop_gradient(codebook))
        codes = codebook[tokens]
        straight_through = latents + jax.lax.stop_gradient(codes - latents)
        return Quantized(straight_through, tokens, latents, codes, codebook)

    def encode(self, latents: Float[Array, "b gh gw z"]) -> Int[Array, "b gh gw"]:
        """Return the index of the nearest code of every latent, in [0, codebook_size)."""
        return nearest_codes(self._project(latents), self._project(self.codebook))

    def look_up(self, tokens: Int[Array, "b gh gw"]) -> Float[Array, "b gh gw z"]:
        """Return the codes of tokens in [0, codebook_size)."""
        return self._project(self.codebook[tokens])

    def _project(self, x: Float[Array, "*n z"]) -> Float[Array, "*n z"]:
        """Put latents or codes where distances are measured: on the unit sphere, or as they are."""
        x = x.astype(jnp.float32)
        return normalize(x) if self.l2_normalize else x
