"""The iterative decoder: predict all masked tokens, keep the most confident, repeat.

It knows functions from tokens to logits and no module. One call of `decode_batch` is one
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
from maskgil_jax.decoding import categorical, filters, guidance, orders, prediction, remasking
from maskgil_jax.decoding.sampler import Plan, Program, SamplerConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What one step hands to the next.

    Attributes:
        tokens: int32 [b, l]; the mask token where still unknown.
        log_prob: float32 [b, l], of each decoded token when it was drawn; else 0.
    """

    tokens: Any
    log_prob: Any


def start_state(tokens: Int[Array | np.ndarray, "b l"]) -> State:
    """Return the state before the first step."""
    return State(jnp.asarray(tokens), jnp.zeros(tokens.shape, jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What happened in every step.

    Attributes:
        tokens: int32 [t, b, l] after each step; still masked ones hold the mask token.
        scales: float32 [t] guidance scale used.
    """

    tokens: Any
    scales: Any


def check_seed(seed: Any) -> None:
    """Raise a `ValueError` unless the seed is a whole number in 0…2³² - 1."""
    if not (np.ndim(seed) == 0 and np.issubdtype(np.asarray(seed).dtype, np.integer)):
        raise ValueError(f"seed {seed!r} is no whole number")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is out of range; allowed: 0 to {2**32 - 1}")


def image_keys(seed: int | Array, image_indices: Any) -> jax.Array:
    """Return one key per image, `fold_in(seed, image_index)`, whatever the batch it is drawn in.

    Under `jax.jit` the seed cannot be read, and its range is the caller's to check.

    Raises:
        ValueError: if the seed is not in 0…2³² - 1.
    """
    if not isinstance(seed, jax.core.Tracer):
        check_seed(seed)
    root = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(root, index))(jnp.asarray(image_indices))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """What a batch is decoded from.

    Attributes:
        tokens: int32 [b, l], codes, or the mask token where unknown; known tokens are kept.
        condition: pytree with a leading batch axis.
        null_condition: the same pytree, meaning "no condition"; read only where the guidance scale
            is not 1, and may then be `None`.
        rngs: one key per image, see `image_keys`.
        plan: the numbers of every step; `None` where there is none.
        shared: images that begin alike, if the first step is to use it.
    """

    tokens: Any
    condition: Any
    null_condition: Any
    rngs: Any
    plan: Any
    shared: prediction.Shared | None = None


def make_step(
    predictor: prediction.Predictor,
    batch: Batch,
    program: Program,
    *,
    mask_token_id: int,
    grid_size: tuple[int, int] | None = None,
    first: bool | None = None,
) -> Callable[[Any, State], State]:
    """Return `step(i, state) → state`, one step of the decoder.

    The step depends on nothing but its arguments, so any loop may drive it.

    Args:
        predictor: the model.
        batch: what it starts from.
        program: settings that shape the computation.
        mask_token_id: id of the mask token, equal to the number of codes.
        grid_size: (gh, gw) with gh·gw = l; only the order `halton` needs it.
        first: true for a step that serves i = 0 only, false for one that serves all others, `None`
            for one that serves all. What a step need not serve is not compiled, and only the first
            can use `batch.shared`.
    """
    plan, known = batch.plan, batch.tokens != mask_token_id
    left = jnp.sum(plan.counts, axis=1, keepdims=True) - jnp.cumsum(plan.counts, axis=1)
    predict = _make_prediction(predictor, batch, program, mask_token_id, first)
    make_scores = _make_scores(program, plan, batch.rngs, grid_size, known.shape[1])

    def step(i, state):
        masked = state.tokens == mask_token_id
        token_rngs, noise_rngs = _step_keys(batch.rngs, i)
        codes, log_prob = predict(i, state.tokens, masked, token_rngs)
        # What is drawn from logits that are no numbers is no code: it stays masked, for all to see.
        drawn = ~jnp.isnan(log_prob)
        codes = jnp.where(drawn, codes, mask_token_id)
        log_prob = jnp.where(drawn, log_prob, 0.0)
        scores = jnp.where(masked & drawn, make_scores(i, log_prob, noise_rngs), -jnp.inf)
        count, taken_back = plan.counts[:, i], jnp.zeros_like(known)
        if program.remasking != "none":
            taken_back = remasking.draw_remasked(
                jax.vmap(jax.random.fold_in, (0, None))(batch.rngs, i),
                ~(known | masked),
                state.log_prob,
                left[:, i],
                kind=program.remasking,
                strength=plan.remasking_strength,
                choice=program.remasking_choice,
            )
            count = count + jnp.sum(taken_back, axis=1)
        revealed = masking.select_top_k(scores, count) & masked
        tokens = jnp.where(taken_back, mask_token_id, jnp.where(revealed, codes, state.tokens))
        kept = jnp.where(taken_back, 0.0, jnp.where(revealed, log_prob, state.log_prob))
        return State(tokens, kept)

    return step


def _make_prediction(
    predictor: prediction.Predictor,
    batch: Batch,
    program: Program,
    mask_token_id: int,
    first: bool | None,
) -> Callable[..., tuple[Array, Array]]:
    """Return `predict(i, tokens, masked, rngs) → (codes [b l], log-probabilities [b l])`."""
    guided = {True: program.guided[:1], False: program.guided[1:], None: program.guided}[first]
    scales, draw = jnp.asarray(batch.plan.guidance_scales), make_draw(program, batch.plan)
    shared = batch.shared if first else None

    def of_kinds(x):
        return x if shared is None else x[shared.rows]

    condition, null_condition = jax.tree.map(of_kinds, (batch.condition, batch.null_condition))

    def predict(i, tokens, masked, rngs):
        uniforms = categorical.uniforms_per_image(rngs, tokens.shape[1])
        tokens = of_kinds(tokens)

        def read(features, positions, with_guidance):
            mine = of_kinds(positions)
            if with_guidance:
                mine = jnp.concatenate([mine, mine])
            # Logits end before the mask token: it can never be drawn.
            logits = predictor.head(prediction.take_positions(features, mine), mine)
            logits = logits[..., :mask_token_id]
            if with_guidance:
                cond, uncond = jnp.split(logits, 2)
                logits = guidance.guide(cond, uncond, scales[i])
            if shared is not None:
                logits = logits[shared.groups]
            return draw(i, logits, jnp.take_along_axis(uniforms, positions[..., None], axis=1))

        def draw_masked(features, with_guidance):
            def draw_at(features, positions):
                return read(features, positions, with_guidance)

            # The first step finds all masked, but for what an edit keeps.
            if first:
                return prediction.at_all(masked, features, draw_at)
            return prediction.at_masked(masked, features, draw_at, (mask_token_id, 0.0))

        def conditional():
            return draw_masked(predictor.features(tokens, condition), False)

        def doubled():
            both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition, null_condition)
            return draw_masked(predictor.features(jnp.concatenate([tokens, tokens]), both), True)

        if all(guided):
            return doubled()
        return jax.lax.cond(scales[i] == 1, conditional, doubled) if any(guided) else conditional()

    return predict


def make_draw(program: Program, plan: Plan) -> Callable[..., tuple[Array, Array]]:
    """Return `draw(i, logits [b n k], uniforms [b n 2]) → (codes [b n], log-probabilities [b n])`.

    The probabilities are those of the distribution drawn from: tempered, then filtered.
    """
    temperatures = jnp.asarray(plan.temperatures)

    def draw(i, logits, uniforms):
        if program.greedy:
            return categorical.argmax_code(logits)
        logits = logits / temperatures[i]
        if program.top_k:
            logits = filters.keep_top_k(logits, program.top_k)
        if program.filtered:
            logits = filters.keep_top_p(logits, plan.top_p)
        return categorical.draw_categorical(logits, uniforms)

    return draw


def _make_scores(
    program: Program,
    plan: Plan,
    rngs: jax.Array,
    grid_size: tuple[int, int] | None,
    length: int,
) -> Callable[..., Float[Array, "b l"]]:
    if program.order == "halton":
        if grid_size is None or grid_size[0] * grid_size[1] != length:
            raise ValueError(
                f"order 'halton' needs the grid of the {length} tokens; grid_size is {grid_size}"
            )
        along = orders.halton_scores(grid_size, rngs, program.halton_roll)
        return lambda i, log_prob, noise_rngs: along
    noise = jnp.asarray(plan.noise)

    def scores(i, log_prob, noise_rngs):
        gumbel = jax.vmap(lambda rng: jax.random.gumbel(rng, log_prob.shape[1:]))(noise_rngs)
        return gumbel if program.order == "random" else log_prob + noise[i] * gumbel

    return scores


def _step_keys(rngs: jax.Array, i: Any) -> tuple[jax.Array, jax.Array]:
    keys = jax.vmap(lambda rng: jax.random.split(jax.random.fold_in(rng, i)))(rngs)
    return keys[:, 0], keys[:, 1]


def decode(
    logits_fn: prediction.LogitsFn,
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
    """Fill in the masked tokens of a batch, with a model in one part and settings as constants.

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
    return decode_batch(
        prediction.whole(logits_fn),
        Batch(
            tokens=tokens,
            condition=condition,
            null_condition=null_condition,
            rngs=rngs,
            plan=config.plan(unknown, tokens.shape[1]),
        ),
        config.program(),
        mask_token_id=mask_token_id,
        grid_size=grid_size,
        return_trace=return_trace,
    )


def begins_apart(batch: Batch, program: Program) -> bool:
    """Return whether the first step is worth a program of its own: it then computes less."""
    differs = len(set(program.guided)) > 1 and program.guided[0] != program.guided[1]
    return program.num_steps > 1 and (differs or batch.shared is not None)


def decode_batch(
    predictor: prediction.Predictor,
    batch: Batch,
    program: Program,
    *,
    mask_token_id: int,
    grid_size: tuple[int, int] | None = None,
    return_trace: bool = False,
) -> tuple[Int[Array, "b l"], Trace | None]:
    """Fill in the masked tokens of a batch, by a program and the numbers of a plan.

    Args:
        predictor: the model.
        batch: what to start from.
        program: settings that shape the computation.
        mask_token_id: id of the mask token, equal to the number of codes.
        grid_size: (gh, gw) with gh·gw = l; only the order `halton` needs it.
        return_trace: whether to keep the tokens after every step.

    Returns:
        int32 codes [b, l], and the trace or `None`; see `decode`.

    Raises:
        ValueError: if the grid is missing.
    """

    def traced(step):
        def run(i, carry):
            state, history = carry
            state = step(i, state)
            if history is not None:
                history = history.at[i].set(state.tokens)
            return state, history

        return run

    def make(first):
        return traced(
            make_step(
                predictor,
                batch,
                program,
                mask_token_id=mask_token_id,
                grid_size=grid_size,
                first=first,
            )
        )

    history = None
    if return_trace:
        history = jnp.zeros((program.num_steps, *batch.tokens.shape), batch.tokens.dtype)
    carry = (start_state(batch.tokens), history)
    if begins_apart(batch, program):
        carry = jax.lax.fori_loop(1, program.num_steps, make(False), make(True)(0, carry))
    else:
        carry = jax.lax.fori_loop(0, program.num_steps, make(None), carry)
    state, history = carry
    if history is None:
        return state.tokens, None
    return state.tokens, Trace(history, jnp.asarray(batch.plan.guidance_scales))
