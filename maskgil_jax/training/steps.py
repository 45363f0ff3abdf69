"""One update: draw the randomness, compute the loss, accumulate gradients, apply them.

A step is a pure function `(state, metrics, batch) → (state, metrics)`. All randomness derives from
`fold_in(key(seed), step)`, so a resumed run repeats what an uninterrupted one does.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from jaxtyping import Array, Float, Int, PRNGKeyArray

from maskgil_jax import masking
from maskgil_jax.training.losses import smoothed_cross_entropy

LOSS_TOKENS = ("masked", "all")


@flax.struct.dataclass
class TrainState:
    """What training carries from update to update.

    Attributes:
        step: number of updates done, int32 scalar.
        params: tree of float32 parameters.
        opt_state: the optimiser's state.
        ema: exponential moving average of the parameters, or `None`.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLossConfig:
    """What a masked-token model is asked to predict.

    Attributes:
        mask_token_id: id of the mask token.
        loss_tokens: `masked` (the paper) or `all` (its released trainer).
        label_smoothing: ε in [0, 1).
        condition_dropout: share of examples that are shown without their condition, in [0, 1].
        mask_schedule: curve of the masked share, one of `masking.SCHEDULES`.
        mask_draw: one of `masking.DRAWS`.
    """

    mask_token_id: int
    loss_tokens: str = "masked"
    label_smoothing: float = 0.1
    condition_dropout: float = 0.1
    mask_schedule: str = "arccos"
    mask_draw: str = "exact"

    def __post_init__(self):
        masking.check_choice("loss_tokens", self.loss_tokens, LOSS_TOKENS)
        masking.check_choice("mask_schedule", self.mask_schedule, masking.SCHEDULES)
        masking.check_choice("mask_draw", self.mask_draw, masking.DRAWS)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing {self.label_smoothing} is not in [0, 1)")
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"condition_dropout {self.condition_dropout} is not in [0, 1]")


@flax.struct.dataclass
class Summed:
    """Sums over examples of one batch or part of it.

    Attributes:
        loss: summed loss, differentiated.
        weight: what the loss is divided by after summing over all parts, where it is not 0.
        sums: further sums to be divided by `weight`.
        means: values that are averaged over the parts.
    """

    loss: Any
    weight: Any
    sums: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    means: Mapping[str, Any] = flax.struct.field(default_factory=dict)


MASKED_METRICS = ("loss", "accuracy", "output_norm", "grad_norm", "param_norm")

# (params, batch, rng) → Summed; rng seeds dropout only.
LossFn = Callable[[Any, Any, PRNGKeyArray], Summed]
# (batch, rng) → batch; draws everything that depends on the whole batch.
PrepareFn = Callable[[Any, PRNGKeyArray], Any]


def corrupt_batch(
    tokens: Int[Array, "b gh gw"],
    condition: Any,
    rng: PRNGKeyArray,
    config: MaskedLossConfig,
    drop_condition: Callable[[Any, Any], Any],
) -> dict[str, Any]:
    """Mask tokens and drop conditions.

    Args:
        tokens: codes.
        condition: pytree with the batch in front.
        rng: key of this step.
        config: rates and schedule.
        drop_condition: `(condition, dropped [b]) → condition`, with "no condition" where dropped.

    Returns:
        `inputs` (masked tokens), `targets`, `mask` and `condition`.
    """
    mask_rng, drop_rng = jax.random.split(rng)
    b, gh, gw = tokens.shape
    mask = masking.draw_mask(
        mask_rng, b, gh * gw, schedule=config.mask_schedule, draw=config.mask_draw
    ).reshape(tokens.shape)
    dropped = jax.random.uniform(drop_rng, (b,)) < config.condition_dropout
    return {
        "inputs": jnp.where(mask, config.mask_token_id, tokens),
        "targets": tokens,
        "mask": mask,
        "condition": drop_condition(condition, dropped),
    }


def expose_batch(
    tokens: Int[Array, "b gh gw"],
    condition: Any,
    rng: PRNGKeyArray,
    config: MaskedLossConfig,
    drop_condition: Callable[[Any, Any], Any],
) -> dict[str, Any]:
    """Drop conditions and mask nothing: a causal model sees all tokens and predicts each.

    The arguments and the result are those of `corrupt_batch`; the mask says what is predicted.
    """
    dropped = jax.random.uniform(rng, tokens.shape[:1]) < config.condition_dropout
    return {
        "inputs": tokens,
        "targets": tokens,
        "mask": jnp.ones(tokens.shape, bool),
        "condition": drop_condition(condition, dropped),
    }


def make_masked_loss(apply_fn: Callable[..., Any], config: MaskedLossConfig) -> LossFn:
    """Return the loss of a masked-token model on a corrupted batch.

    Args:
        apply_fn: `(params, tokens, condition, dropout_rng) → (logits [b, l, v], output_norm)`.
        config: what is predicted.
    """

    def loss_fn(params, batch, rng):
        logits, output_norm = apply_fn(params, batch["inputs"], batch["condition"], rng)
        b = batch["targets"].shape[0]
        targets, mask = batch["targets"].reshape(b, -1), batch["mask"].reshape(b, -1)
        losses = smoothed_cross_entropy(logits, targets, config.label_smoothing)
        weights = (jnp.ones_like(losses) if config.loss_tokens == "all" else mask).astype(
            losses.dtype
        )
        correct = (jnp.argmax(logits, axis=-1) == targets) & mask
        return Summed(
            loss=jnp.sum(losses * weights),
            weight=jnp.sum(weights),
            sums={"loss": jnp.sum(losses * weights)},
            means={
                "accuracy": jnp.sum(correct) / jnp.maximum(jnp.sum(mask), 1),
                "output_norm": output_norm,
            },
        )

    return loss_fn


def create_state(params: Any, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    """Return the state before the first update."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
    )


def accumulate(
    loss_fn: LossFn, params: Any, batch: Any, rng: PRNGKeyArray, parts: int
) -> tuple[Any, dict[str, Float[Array, ""]]]:
    """Return the gradient and metrics of a batch, computed in `parts` equal parts.

    The sums of all parts are divided by the summed weights, so the result is that of the whole
    batch, whatever the weights of the parts.
    """

    def part_grad(part, part_rng):
        def scalar(p):
            summed = loss_fn(p, part, part_rng)
            return summed.loss, summed

        (_, summed), grads = jax.value_and_grad(scalar, has_aux=True)(params)
        return grads, summed

    if parts == 1:
        grads, summed = part_grad(batch, rng)
    else:
        # Part p takes rows p, p + parts, …, so every device keeps its own share of each part.
        split = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch
        )
        rngs = jax.random.split(rng, parts)
        shapes = jax.eval_shape(part_grad, jax.tree.map(lambda x: x[0], split), rngs[0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def add(total, xs):
            return jax.tree.map(jnp.add, total, part_grad(*xs)), None

        (grads, summed), _ = jax.lax.scan(add, zeros, (split, rngs))
    # A Bernoulli draw may mask nothing in the whole batch; the loss is then 0, not 0/0.
    weight = jnp.where(summed.weight > 0, summed.weight, 1.0)
    grads = jax.tree.map(lambda g: g / weight, grads)
    metrics = {name: value / weight for name, value in summed.sums.items()}
    return grads, metrics | {name: value / parts for name, value in summed.means.items()}


def apply_gradients(
    state: Any, grads: Any, optimizer: optax.GradientTransformation, ema_decay: float
) -> tuple[Any, dict[str, Float[Array, ""]]]:
    """Return the state after an update, and the norms of gradient and parameters.

    Args:
        state: a `TrainState`, or a subclass whose further fields stay as they are.
        grads: gradient of the parameters.
        optimizer: gradient transformation.
        ema_decay: decay of the parameter average; unused if the state keeps none.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(lambda a, p: a * ema_decay + p * (1 - ema_decay), ema, params)
    norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
    return state, norms


def make_train_step(
    loss_fn: LossFn,
    prepare: PrepareFn,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema_decay: float = 0.0,
    accumulation_steps: int = 1,
) -> Callable[[TrainState, clu_metrics.Collection, Any], tuple[TrainState, Any]]:
    """Return `step(state, metrics, batch) → (state, metrics)`.

    Args:
        loss_fn: loss of (part of) a prepared batch.
        prepare: draws masks and the like for the whole batch.
        optimizer: gradient transformation.
        seed: seed of the run.
        ema_decay: decay of the parameter average, in (0, 1); 0 if the state keeps none.
        accumulation_steps: parts in which the gradient of a batch is computed.
    """

    def step(state, metrics, batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        prepare_rng, dropout_rng = jax.random.split(rng)
        prepared = prepare(batch, prepare_rng)
        grads, values = accumulate(loss_fn, state.params, prepared, dropout_rng, accumulation_steps)
        state, norms = apply_gradients(state, grads, optimizer, ema_decay)
        values |= norms
        return state, metrics.merge(type(metrics).single_from_model_output(**values))

    return step


@functools.lru_cache
def metrics_class(names: tuple[str, ...]) -> type[clu_metrics.Collection]:
    """Return the collection that averages the named values over steps."""
    averages: dict[str, Any] = {name: clu_metrics.Average.from_output(name) for name in names}
    return clu_metrics.Collection.create(**averages)
