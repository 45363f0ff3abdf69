"""The iterative decoder: predict all masked tokens, keep the most confident, repeat.

It knows a function from tokens to logits and no module. One call of `decode` is one
`lax.fori_loop`, so under `jax.jit` the whole generation is a single program.

Reference: MaskGIT (Chang et al., 2022) section 3.2; MaskGIL section 3.2.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from maskgil_jax import masking
from maskgil_jax.decoding import categorical, guidance

# Logits divided by less than this could overflow float32.
MIN_TEMPERATURE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Everything that shapes a generation, besides the model, the condition and the seed.

    Attributes:
        num_steps: decoding steps T, from 1 to the number of tokens.
        schedule: curve of the masked share, one of `masking.SCHEDULES`.
        schedule_form: how the curve is used, one of `masking.FORMS`.
        rescale: whether the schedule is scaled to the tokens unknown at the start; if not, counts
            are those of a fully masked image and the last step takes what is left.
        guidance_scale: s ≥ 0; 1 means no guidance.
        guidance_schedule: one of `guidance.GUIDANCE_SCHEDULES`.
        guidance_power: exponent of `power_cosine`, more than 0.
        temperature: divides the logits, at least 1e-4; or 0: take the most probable code.
        gumbel_temperature: weight of the Gumbel noise on the confidence in the first step; it falls
            linearly to 0 in the last. Large values approach a random order.
    """

    num_steps: int = 8
    schedule: str = "arccos"
    schedule_form: str = "increments"
    rescale: bool = True
    guidance_scale: float = 2.0
    guidance_schedule: str = "linear"
    guidance_power: float = 1.0
    temperature: float = 1.0
    gumbel_temperature: float = 4.5

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps {self.num_steps} is out of range; allowed: 1 or more")
        masking.check_choice("schedule", self.schedule, masking.SCHEDULES)
        masking.check_choice("schedule_form", self.schedule_form, masking.FORMS)
        self.guidance_scales()
        for name in ("temperature", "gumbel_temperature"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(
                    f"{name} {getattr(self, name)} is out of range; allowed: 0 or more, finite"
                )
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature {self.temperature} is too small to divide by; allowed: 0 (the most "
                f"probable code) or at least {MIN_TEMPERATURE}"
            )

    def guidance_scales(self) -> np.ndarray:
        """Return the guidance scale of every step, float32 [num_steps]."""
        return guidance.guidance_scales(
            self.guidance_schedule, self.guidance_scale, self.num_steps, self.guidance_power
        )

    def reveal_counts(self, unknown: Int[Array, " b"], seq_len: int) -> Int[Array, "b t"]:
        """Return how many tokens each step reveals, given the numbers unknown at the start."""
        table = masking.reveal_table(self.schedule, self.num_steps, seq_len, self.schedule_form)
        if self.rescale:
            return jnp.asarray(table)[unknown]
        revealed = jnp.minimum(np.cumsum(table[seq_len])[None], unknown[:, None])
        revealed = revealed.at[:, -1].set(unknown)
        return jnp.diff(revealed, axis=1, prepend=0)


@dataclasses.dataclass(frozen=True)
class Trace:
    """What happened in every step.

    Attributes:
        tokens: int32 [t, b, l] after each step; still masked ones hold the mask token.
        scales: float32 [t] guidance scale used.
    """

    tokens: Any
    scales: Any


jax.tree_util.register_dataclass(Trace, ["tokens", "scales"], [])


def image_keys(seed: int, image_indices: Any) -> jax.Array:
    """Return one key per image, `fold_in(seed, image_index)`, whatever the batch it is drawn in.

    Raises:
        ValueError: if the seed is not in 0…2³² - 1.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is out of range; allowed: 0 to {2**32 - 1}")
    root = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(root, index))(jnp.asarray(image_indices))


def make_step(
    logits_fn: guidance.LogitsFn,
    condition: Any,
    null_condition: Any,
    rngs: jax.Array,
    counts: Int[Array, "b t"],
    config: SamplerConfig,
    mask_token_id: int,
) -> Callable[[Any, Int[Array, "b l"]], Int[Array, "b l"]]:
    """Return `step(i, tokens) → tokens`, one step of the decoder.

    The step depends on nothing but its arguments, so any loop may drive it.
    """
    scales = jnp.asarray(config.guidance_scales())
    unguided = bool(np.all(config.guidance_scales() == 1))
    fades = np.linspace(1.0, 0.0, config.num_steps) if config.num_steps > 1 else np.zeros(1)
    noise = jnp.asarray(config.gumbel_temperature * fades, jnp.float32)

    def draw(logits, step_rngs):
        if config.temperature == 0:
            return categorical.argmax_code(logits)
        uniforms = categorical.uniforms_per_image(step_rngs, logits.shape[1])
        return categorical.draw_categorical(logits / config.temperature, uniforms)

    def step(i, tokens):
        unknown = tokens == mask_token_id
        if unguided:
            logits = logits_fn(tokens, condition)
        else:
            logits = guidance.guide(logits_fn, tokens, condition, null_condition, scales[i])
        token_rngs, noise_rngs = _step_keys(rngs, i)
        # Logits end before the mask token: it can never be drawn.
        codes, log_prob = draw(logits[..., :mask_token_id], token_rngs)
        gumbel = jax.vmap(lambda rng: jax.random.gumbel(rng, tokens.shape[1:]))(noise_rngs)
        confidence = jnp.where(unknown, log_prob + noise[i] * gumbel, -jnp.inf)
        reveal = masking.select_top_k(confidence, counts[:, i])
        return jnp.where(reveal & unknown, codes, tokens)

    return step


def _step_keys(rngs: jax.Array, i: Any) -> tuple[jax.Array, jax.Array]:
    keys = jax.vmap(lambda rng: jax.random.split(jax.random.fold_in(rng, i)))(rngs)
    return keys[:, 0], keys[:, 1]


def decode(
    logits_fn: guidance.LogitsFn,
    tokens: Int[Array, "b l"],
    condition: Any,
    null_condition: Any,
    rngs: jax.Array,
    config: SamplerConfig,
    *,
    mask_token_id: int,
    return_trace: bool = False,
) -> tuple[Int[Array, "b l"], Trace | None]:
    """Fill in the masked tokens of a batch.

    Args:
        logits_fn: maps tokens [b, l] and a condition to logits [b, l, v], v ≥ `mask_token_id`.
        tokens: codes, or `mask_token_id` where unknown; known tokens are kept.
        condition: pytree with a leading batch axis.
        null_condition: the same pytree, meaning "no condition"; read only where the guidance scale
            is not 1, and may then be `None`.
        rngs: one key per image, see `image_keys`.
        config: the sampler's settings.
        mask_token_id: id of the mask token, equal to the number of codes.
        return_trace: whether to keep the tokens after every step.

    Returns:
        int32 codes [b, l], none of them masked, and the trace or `None`.

    Raises:
        ValueError: if there are more steps than tokens.
    """
    unknown = jnp.sum(tokens == mask_token_id, axis=1)
    counts = config.reveal_counts(unknown, tokens.shape[1])
    step = make_step(logits_fn, condition, null_condition, rngs, counts, config, mask_token_id)
    if not return_trace:
        return jax.lax.fori_loop(0, config.num_steps, step, tokens), None

    def traced(i, carry):
        tokens, history = carry
        tokens = step(i, tokens)
        return tokens, history.at[i].set(tokens)

    history = jnp.zeros((config.num_steps, *tokens.shape), tokens.dtype)
    tokens, history = jax.lax.fori_loop(0, config.num_steps, traced, (tokens, history))
    return tokens, Trace(history, jnp.asarray(config.guidance_scales()))
