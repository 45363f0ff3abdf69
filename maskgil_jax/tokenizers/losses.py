"""Losses that train a vector-quantised tokenizer, and the health of its codebook.

Pure functions of a forward pass (`maskgil_jax.tokenizers.base.VQOutputs`) and the images. The
perceptual distance is given as a function (`lpips.py`); the adversarial term, which has a net and
an optimiser of its own, is added by the update step.

Reference: van den Oord et al. 2017, equation 3 (codebook and commitment terms); Chang et al. 2022
and Yu et al. 2024 for the entropy term; `tokenizer/tokenizer_image/vq_model.py` of
FoundationVision/LlamaGen for how they are averaged, and `modules/vqvae/lookup_free_quantize.py` of
TencentARC/SEED-Voken where no codebook is stored.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maskgil_jax.tokenizers.base import VQOutputs
from maskgil_jax.tokenizers.quantizers import squared_distances

RECONSTRUCTIONS = ("l2", "l1")
# Keeps the logarithm of a code that is never used finite.
_TINY_PROBABILITY = 1e-5
TERMS = ("reconstruction", "perceptual", "codebook", "commitment", "entropy")

# (images, reconstruction) -> a distance per image, 0 where they are equal.
PerceptualFn = Callable[[Float[Array, "b H W c"], Float[Array, "b H W c"]], Float[Array, "b"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerLossWeights:
    """Weights of the terms; the defaults are those that LlamaGen-VQ was trained with.

    reconstruction_kind: "l2" (squared error) or "l1" (absolute error), per pixel and channel.
    reconstruction, commitment: weights, at least 0.
    perceptual: weight of the LPIPS distance, at least 0; at 0 the term costs nothing.
    codebook: weight, at least 0; must be 0 where a lookup-free quantiser stores no codebook.
    entropy: weight, at least 0; at 0 the term costs nothing.
    entropy_temperature: of the soft assignment of latents to codes, above 0.

    Raises:
        ValueError: a value that is not allowed.
    """

    reconstruction_kind: str = "l2"
    reconstruction: float = 1.0
    perceptual: float = 0.0
    codebook: float = 1.0
    commitment: float = 0.25
    entropy: float = 0.0
    entropy_temperature: float = 0.01

    def __post_init__(self) -> None:
        if self.reconstruction_kind not in RECONSTRUCTIONS:
            raise ValueError(
                f"reconstruction_kind is {self.reconstruction_kind!r}; it must be one of "
                f"{', '.join(RECONSTRUCTIONS)}"
            )
        for name in TERMS:
            if not getattr(self, name) >= 0:
                raise ValueError(f"weight {name} is {getattr(self, name)}; it must be at least 0")
        if not self.entropy_temperature > 0:
            raise ValueError(
                f"entropy_temperature is {self.entropy_temperature}; it must be above 0"
            )


def check_lookup_free(weights: TokenizerLossWeights) -> None:
    """Raise a `ValueError` if the weights ask for a term that needs a stored codebook."""
    if weights.codebook:
        raise ValueError(
            f"weight codebook is {weights.codebook}, but a lookup-free quantiser stores no "
            "codebook to pull to the latents; set it to 0 (commitment and entropy remain)"
        )


def metric_names(weights: TokenizerLossWeights, *, lookup_free: bool = False) -> tuple[str, ...]:
    """Return the names of the metrics that `tokenizer_loss` gives with these weights."""
    optional = tuple(name for name in ("entropy", "perceptual") if getattr(weights, name))
    codebook = () if lookup_free else ("codebook",)
    return ("loss", "reconstruction", *codebook, "commitment", "perplexity", "usage", *optional)


def tokenizer_loss(
    outputs: VQOutputs,
    images: Float[Array, "b H W c"],
    weights: TokenizerLossWeights,
    perceptual: PerceptualFn | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Compute the training loss of a tokenizer and its unweighted terms.

    The metrics are those of `metric_names`; `perplexity` and `usage` are over the codes of this
    batch.

    Raises:
        ValueError: a perceptual weight without the function, or a codebook weight without one.
    """
    terms = {
        "reconstruction": reconstruction_loss(
            outputs.reconstruction, images, weights.reconstruction_kind
        ),
        "commitment": commitment_loss(outputs.latents, outputs.quantized),
    }
    if weights.perceptual:
        if perceptual is None:
            raise ValueError(f"weight perceptual is {weights.perceptual}; give the function too")
        terms["perceptual"] = jnp.mean(perceptual(images, outputs.reconstruction))
    if outputs.codebook is None:
        check_lookup_free(weights)
        codebook_size = 2 ** outputs.latents.shape[-1]
        if weights.entropy:
            terms["entropy"] = lookup_free_entropy_loss(
                outputs.latents, weights.entropy_temperature
            )
    else:
        codebook_size = outputs.codebook.shape[0]
        terms["codebook"] = codebook_loss(outputs.latents, outputs.quantized)
        if weights.entropy:
            terms["entropy"] = entropy_loss(
                outputs.latents, outputs.codebook, weights.entropy_temperature
            )
    # In the order of `TERMS`, so that the sum of floats does not depend on the branches above.
    loss = sum(getattr(weights, name) * terms[name] for name in TERMS if name in terms)
    counts = count_codes(outputs.tokens, codebook_size)
    health = {"perplexity": perplexity(counts), "usage": usage_of_counts(counts)}
    return loss, {"loss": loss, **terms, **health}


def reconstruction_loss(
    reconstruction: Float[Array, "b H W c"], images: Float[Array, "b H W c"], kind: str = "l2"
) -> Float[Array, ""]:
    """Average the squared ("l2") or absolute ("l1") error over all pixels and channels.

    Raises:
        ValueError: an unknown kind.
    """
    difference = reconstruction - images
    if kind == "l2":
        return jnp.mean(jnp.square(difference))
    if kind == "l1":
        return jnp.mean(jnp.abs(difference))
    raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(RECONSTRUCTIONS)}")


def codebook_loss(
    latents: Float[Array, "b gh gw z"], quantized: Float[Array, "b gh gw z"]
) -> Float[Array, ""]:
    """Pull the chosen codes to their latents; no gradient reaches the encoder.

    Reference: van den Oord et al. 2017, equation 3, second term.
    """
    return jnp.mean(jnp.square(quantized - jax.lax.stop_gradient(latents)))


def commitment_loss(
    latents: Float[Array, "b gh gw z"], quantized: Float[Array, "b gh gw z"]
) -> Float[Array, ""]:
    """Pull the latents to their chosen codes; no gradient reaches the codebook.

    Reference: van den Oord et al. 2017, equation 3, third term.
    """
    return jnp.mean(jnp.square(jax.lax.stop_gradient(quantized) - latents))


def entropy_loss(
    latents: Float[Array, "b gh gw z"], codebook: Float[Array, "k z"], temperature: float = 0.01
) -> Float[Array, ""]:
    """Reward sure assignments of each latent and an even use of the codes over the batch.

    Mean entropy of softmax(-squared distance / temperature), minus the entropy of its mean over all
    positions. Memory grows with positions x codebook size.

    Reference: `compute_entropy_loss` of LlamaGen's `vq_model.py`; natural logarithms.
    """
    logits = -squared_distances(latents, codebook).reshape(-1, codebook.shape[0]) / temperature
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    probabilities = jnp.exp(log_probabilities)
    per_position = -jnp.mean(jnp.sum(probabilities * log_probabilities, axis=-1))
    average = jnp.mean(probabilities, axis=0)
    of_average = -jnp.sum(average * jnp.log(average + _TINY_PROBABILITY))
    return per_position - of_average


def lookup_free_entropy_loss(
    latents: Float[Array, "b gh gw z"], temperature: float = 0.01
) -> Float[Array, ""]:
    """Reward sure bits of each latent and an even use of all 2**z codes over the batch.

    As `entropy_loss` with the codes {-1, 1}**z and affinities 2·latent·code, of which there is no
    table: the soft assignment is a product over bits, so the entropy of a position is the sum of
    its bits' entropies, and the assignments of the two halves of the bits, [positions, 2**(z/2)]
    each, give the average over positions as one matrix product [2**(z/2), 2**(z/2)].

    Reference: `entropy_loss` of SEED-Voken's `lookup_free_quantize.py`; natural logarithms.
    """
    z = latents.shape[-1]
    # Between +1 and -1 the affinity 2·latent·code changes by 4·latent.
    logits = 4.0 * latents.reshape(-1, z) / temperature
    ones, zeros = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
    bits = -(ones * jax.nn.log_sigmoid(logits) + zeros * jax.nn.log_sigmoid(-logits))
    per_position = jnp.mean(jnp.sum(bits, axis=-1))

    def assign(start: int, stop: int) -> Float[Array, "n k"]:
        joint = jnp.ones((len(logits), 1), logits.dtype)
        for bit in range(start, stop):
            pair = jnp.stack([zeros[:, bit], ones[:, bit]], axis=-1)
            joint = (pair[:, :, None] * joint[:, None, :]).reshape(len(logits), -1)
        return joint

    low, high = assign(0, z // 2), assign(z // 2, z)
    average = jnp.einsum("nh,nl->hl", high, low, precision="highest") / len(logits)
    of_average = -jnp.sum(average * jnp.log(average + _TINY_PROBABILITY))
    return per_position - of_average


def count_codes(tokens: Int[Array | np.ndarray, "..."], codebook_size: int) -> Int[Array, "k"]:
    """Count how often each code occurs; counts of several batches may be added."""
    return jnp.zeros(codebook_size, jnp.int32).at[tokens.reshape(-1)].add(1)


def perplexity(counts: Int[Array, "k"]) -> Float[Array, ""]:
    """Return the exponential of the entropy of code frequencies: the effective number of codes."""
    frequencies = counts / jnp.maximum(jnp.sum(counts), 1)
    logarithms = jnp.log(jnp.where(counts > 0, frequencies, 1.0))
    return jnp.exp(-jnp.sum(frequencies * logarithms))


def usage_of_counts(counts: Int[Array, "k"]) -> Float[Array, ""]:
    """Return the share of codes that occur at least once, in [0, 1]."""
    return jnp.mean((counts > 0).astype(jnp.float32))


def codebook_usage(tokens: Int[Array | np.ndarray, "..."], codebook_size: int) -> Float[Array, ""]:
    """Return the share of the codebook that occurs among the tokens, in [0, 1]."""
    return usage_of_counts(count_codes(tokens, codebook_size))
