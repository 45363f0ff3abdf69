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
from jaxtyping import Array, Float, Int

from maskgil_jax import masking
from maskgil_jax.decoding import categorical, filters, guidance, orders, remasking

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
        guidance_start: step i of T is guided only from i/T ≥ this share on.
        guidance_stop: and only while i/T < this share.
        temperature: divides the logits, at least 1e-4; or 0: take the most probable code.
        temperature_annealing: step i of T has temperature + this · (1 - (i+1)/T).
        top_k: draw among the k most likely codes; 0 for all.
        top_p: draw among the fewest codes whose probabilities sum to p, in (0, 1]; 1 for all.
        order: which tokens are revealed first, one of `orders.ORDERS`.
        gumbel_temperature: of the order `confidence`, weight of the Gumbel noise in the first step;
            it falls linearly to 0 in the last. Large values approach a random order.
        halton_roll: of the order `halton`, whether each image has its own random shift of it.
        remasking: whether decoded tokens are taken back, one of `remasking.REMASKING`.
        remasking_strength: η in [0, 1], the share that is taken back in a step.
        remasking_choice: which ones, one of `remasking.CHOICES`.
    """

    num_steps: int = 8
    schedule: str = "arccos"
    schedule_form: str = "increments"
    rescale: bool = True
    guidance_scale: float = 2.0
    guidance_schedule: str = "linear"
    guidance_power: float = 1.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    temperature: float = 1.0
    temperature_annealing: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    order: str = "confidence"
    gumbel_temperature: float = 4.5
    halton_roll: bool = False
    remasking: str = "none"
    remasking_strength: float = 0.05
    remasking_choice: str = "random"

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps {self.num_steps} is out of range; allowed: 1 or more")
        masking.check_choice("schedule", self.schedule, masking.SCHEDULES)
        masking.check_choice("schedule_form", self.schedule_form, masking.FORMS)
        masking.check_choice("order", self.order, orders.ORDERS)
        masking.check_choice("remasking", self.remasking, remasking.REMASKING)
        masking.check_choice("remasking_choice", self.remasking_choice, remasking.CHOICES)
        self.guidance_scales()
        for name in ("temperature", "temperature_annealing", "gumbel_temperature"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(
                    f"{name} {getattr(self, name)} is out of range; allowed: 0 or more, finite"
                )
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(
                f"top_k {self.top_k} is out of range; allowed: 0 (all codes) or more, whole"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is out of range; allowed: more than 0, up to 1")
        if not 0 <= self.remasking_strength <= 1:
            raise ValueError(
                f"remasking_strength {self.remasking_strength} is out of range; allowed: 0 to 1"
            )
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature {self.temperature} is too small to divide by; allowed: 0 (the most "
                f"probable code) or at least {MIN_TEMPERATURE}"
            )
        drawing = {"temperature_annealing": 0, "top_k": 0, "top_p": 1}
        for name, unset in drawing.items():
            if self.temperature == 0 and getattr(self, name) != unset:
                raise ValueError(
                    f"{name} {getattr(self, name)} has no meaning at temperature 0, where no code "
                    f"is drawn; leave it at {unset}"
                )

    def guidance_scales(self) -> np.ndarray:
        """Return the guidance scale of every step, float32 [num_steps]."""
        return guidance.guidance_scales(
            self.guidance_schedule,
            self.guidance_scale,
            self.num_steps,
            self.guidance_power,
            (self.guidance_start, self.guidance_stop),
        )

    def temperatures(self) -> np.ndarray:
        """Return what divides the logits in every step, float32 [num_steps]."""
        progress = np.arange(1, self.num_steps + 1) / self.num_steps
        temperatures = self.temperature + self.temperature_annealing * (1 - progress)
        return temperatures.astype(np.float32)

    def reveal_counts(self, unknown: Int[Array, " b"], seq_len: int) -> Int[Array, "b t"]:
        """Return how many tokens each step reveals, given the numbers unknown at the start."""
        table = masking.reveal_table(self.schedule, self.num_steps, seq_len, self.schedule_form)
        if self.rescale:
            return jnp.asarray(table)[unknown]
        revealed = jnp.minimum(np.cumsum(table[seq_len])[None], unknown[:, None])
        revealed = revealed.at[:, -1].set(unknown)
        return jnp.diff(revealed, axis=1, prepend=0)


@dataclasses.dataclass(frozen=True)
class State:
    """What one step hands to the next.

    Attributes:
        tokens: int32 [b, l]; the mask token where still unknown.
        log_prob: float32 [b, l], of each decoded token when it was drawn; else 0.
    """

    tokens: Any
    log_prob: Any


def start_state(tokens: Int[Array, "b l"]) -> State:
    """Return the state before the first step."""
    return State(tokens, jnp.zeros(tokens.shape, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Trace:
    """What happened in every step.

    Attributes:
        tokens: int32 [t, b, l] after each step; still masked ones hold the mask token.
        scales: float32 [t] guidance scale used.
    """

    tokens: Any
    scales: Any


jax.tree_util.register_dataclass(State, ["tokens", "log_prob"], [])
jax.tree_util.register_dataclass(Trace, ["tokens", "scales"], [])


def image_keys(seed: int | Array, image_indices: Any) -> jax.Array:
    """Return one key per image, `fold_in(seed, image_index)`, whatever the batch it is drawn in.

    Under `jax.jit` the seed cannot be read, and its range is the caller's to check.

    Raises:
        ValueError: if the seed is not in 0…2³² - 1.
    """
    if not isinstance(seed, jax.core.Tracer) and not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is out of range; allowed: 0 to {2**32 - 1}")
    root = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(root, index))(jnp.asarray(image_indices))


def make_step(
    logits_fn: guidance.LogitsFn,
    tokens: Int[Array, "b l"],
    condition: Any,
    null_condition: Any,
    rngs: jax.Array,
    counts: Int[Array, "b t"],
    config: SamplerConfig,
    *,
    mask_token_id: int,
    grid_size: tuple[int, int] | None = None,
) -> Callable[[Any, State], State]:
    """Return `step(i, state) → state`, one step of the decoder.

    The step depends on nothing but its arguments, so any loop may drive it. They are `decode`'s,
    and `counts`, how many tokens every step reveals.
    """
    known = tokens != mask_token_id
    left = jnp.sum(counts, axis=1, keepdims=True) - jnp.cumsum(counts, axis=1)
    draw = make_draw(config)
    make_scores = _make_scores(config, rngs, grid_size, tokens.shape[1])
    scales = jnp.asarray(config.guidance_scales())
    unguided = bool(np.all(config.guidance_scales() == 1))

    def step(i, state):
        masked = state.tokens == mask_token_id
        if unguided:
            logits = logits_fn(state.tokens, condition)
        else:
            logits = guidance.guide(logits_fn, state.tokens, condition, null_condition, scales[i])
        token_rngs, noise_rngs = _step_keys(rngs, i)
        # Logits end before the mask token: it can never be drawn.
        codes, log_prob = draw(i, logits[..., :mask_token_id], token_rngs)
        # What is drawn from logits that are no numbers is no code: it stays masked, for all to see.
        drawn = ~jnp.isnan(log_prob)
        codes = jnp.where(drawn, codes, mask_token_id)
        log_prob = jnp.where(drawn, log_prob, 0.0)
        scores = jnp.where(masked & drawn, make_scores(i, log_prob, noise_rngs), -jnp.inf)
        count, taken_back = counts[:, i], jnp.zeros_like(known)
        if config.remasking != "none":
            taken_back = remasking.draw_remasked(
                jax.vmap(jax.random.fold_in, (0, None))(rngs, i),
                ~(known | masked),
                state.log_prob,
                left[:, i],
                kind=config.remasking,
                strength=config.remasking_strength,
                choice=config.remasking_choice,
            )
            count = count + jnp.sum(taken_back, axis=1)
        revealed = masking.select_top_k(scores, count) & masked
        tokens = jnp.where(taken_back, mask_token_id, jnp.where(revealed, codes, state.tokens))
        kept = jnp.where(taken_back, 0.0, jnp.where(revealed, log_prob, state.log_prob))
        return State(tokens, kept)

    return step


def make_draw(config: SamplerConfig) -> Callable[..., tuple[Array, Array]]:
    """Return `draw(i, logits [b l k], rngs [b]) → (codes [b l], log-probabilities [b l])`.

    The probabilities are those of the distribution drawn from: tempered, then filtered.
    """
    temperatures = jnp.asarray(config.temperatures())

    def draw(i, logits, rngs):
        if config.temperature == 0:
            return categorical.argmax_code(logits)
        logits = logits / temperatures[i]
        if config.top_k:
            logits = filters.keep_top_k(logits, config.top_k)
        if config.top_p < 1:
            logits = filters.keep_top_p(logits, config.top_p)
        return categorical.draw_categorical(
            logits, categorical.uniforms_per_image(rngs, logits.shape[1])
        )

    return draw


def _make_scores(
    config: SamplerConfig, rngs: jax.Array, grid_size: tuple[int, int] | None, length: int
) -> Callable[..., Float[Array, "b l"]]:
    if config.order == "halton":
        if grid_size is None or grid_size[0] * grid_size[1] != length:
            raise ValueError(
                f"order 'halton' needs the grid of the {length} tokens; grid_size is {grid_size}"
            )
        along = orders.halton_scores(grid_size, rngs, config.halton_roll)
        return lambda i, log_prob, noise_rngs: along
    fades = np.linspace(1.0, 0.0, config.num_steps) if config.num_steps > 1 else np.zeros(1)
    noise = jnp.asarray(config.gumbel_temperature * fades, jnp.float32)

    def scores(i, log_prob, noise_rngs):
        gumbel = jax.vmap(lambda rng: jax.random.gumbel(rng, log_prob.shape[1:]))(noise_rngs)
        return gumbel if config.order == "random" else log_prob + noise[i] * gumbel

    return scores


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
    grid_size: tuple[int, int] | None = None,
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
        grid_size: (gh, gw) with gh·gw = l; only the order `halton` needs it.
        return_trace: whether to keep the tokens after every step.

    Returns:
        int32 codes [b, l], and the trace or `None`. None of the codes is masked, unless the logits
        of its position were NaN.

    Raises:
        ValueError: if there are more steps than tokens, or the grid is missing.
    """
    unknown = jnp.sum(tokens == mask_token_id, axis=1)
    step = make_step(
        logits_fn,
        tokens,
        condition,
        null_condition,
        rngs,
        config.reveal_counts(unknown, tokens.shape[1]),
        config,
        mask_token_id=mask_token_id,
        grid_size=grid_size,
    )
    state = start_state(tokens)
    if not return_trace:
        return jax.lax.fori_loop(0, config.num_steps, step, state).tokens, None

    def traced(i, carry):
        state, history = carry
        state = step(i, state)
        return state, history.at[i].set(state.tokens)

    history = jnp.zeros((config.num_steps, *tokens.shape), tokens.dtype)
    state, history = jax.lax.fori_loop(0, config.num_steps, traced, (state, history))
    return state.tokens, Trace(history, jnp.asarray(config.guidance_scales()))
