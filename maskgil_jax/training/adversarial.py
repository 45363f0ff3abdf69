"""One update of a tokenizer and of the discriminator that it is trained against.

As `steps.py`, with two nets: the tokenizer lowers its own loss and the adversarial term, the
discriminator learns to tell images from reconstructions. Both see the same forward pass, as in the
published trainer, so the images are encoded and decoded once.

Reference: Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", equations 6
and 7 (adaptive weight); `tokenizer/tokenizer_image/vq_train.py` and `vq_loss.py` of
FoundationVision/LlamaGen.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from maskgil_jax.training import steps

ADVERSARIAL_METRICS = (
    "adversarial",
    "discriminator_loss",
    "logits_real",
    "logits_fake",
    "discriminator_grad_norm",
)
_MAX_ADAPTIVE_WEIGHT = 1e4
_ADAPTIVE_EPSILON = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """When and how strongly the discriminator acts.

    Attributes:
        weight: of the adversarial term in the tokenizer's loss, more than 0.
        start_step: updates done without it, 0 or more; until then nothing of it is computed.
        adaptive: multiply the weight by the ratio of gradient norms, at the decoder's last layer,
            of the reconstruction and perceptual terms to the adversarial term, at most 10,000.

    Raises:
        ValueError: a value that is not allowed.
    """

    weight: float
    start_step: int = 0
    adaptive: bool = False

    def __post_init__(self):
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"adversarial weight {self.weight} must be more than 0")
        if self.start_step < 0:
            raise ValueError(f"discriminator_start {self.start_step} must be 0 or more")


@flax.struct.dataclass
class AdversarialState(steps.TrainState):
    """A training state with a discriminator in it.

    Attributes:
        discriminator: `params` and `opt_state` of the discriminator.
    """

    discriminator: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialFns:
    """What the step computes with; all pure functions.

    Attributes:
        forward: `(params, images, rng) → outputs`, a named tuple that has a `reconstruction`.
        loss: `(outputs, images) → (loss, metrics)`, the tokenizer's loss without the adversarial
            term. It must see the reconstruction only through terms that the adaptive weight
            compares with.
        discriminate: `(discriminator params, images) → logits`.
        discriminator_loss: `(logits of images, logits of reconstructions) → scalar`.
        generator_loss: `logits of reconstructions → scalar`.
        last_layer: the weights of the decoder's last layer out of a tree of parameters.
    """

    forward: Callable[..., Any]
    loss: Callable[..., tuple[Any, Mapping[str, Any]]]
    discriminate: Callable[..., Any]
    discriminator_loss: Callable[..., Any]
    generator_loss: Callable[..., Any]
    last_layer: Callable[[Any], Any]


def metric_names(config: AdversarialConfig) -> tuple[str, ...]:
    """Return the names of the metrics that the discriminator adds."""
    return ADVERSARIAL_METRICS + (("adaptive_weight",) if config.adaptive else ())


def create_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    discriminator_params: Any,
    discriminator_optimizer: optax.GradientTransformation,
    ema: bool,
) -> AdversarialState:
    """Return the state before the first update."""
    plain = steps.create_state(params, optimizer, ema)
    return AdversarialState(
        step=plain.step,
        params=plain.params,
        opt_state=plain.opt_state,
        ema=plain.ema,
        discriminator={
            "params": discriminator_params,
            "opt_state": discriminator_optimizer.init(discriminator_params),
        },
    )


def make_adversarial_step(
    fns: AdversarialFns,
    config: AdversarialConfig,
    optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
    *,
    active: bool,
    seed: int,
    ema_decay: float = 0.0,
) -> Callable[[AdversarialState, Any, Any], tuple[AdversarialState, Any]]:
    """Return `step(state, metrics, batch) → (state, metrics)`, before or after the start.

    Before and after are two programs, chosen by the caller, and not one with a branch: XLA runs
    convolutions inside a branch some 50 times slower on a CPU, and reserves the memory of both.

    The gradient of a batch is that of the whole batch: the discriminator normalises over it, so it
    cannot be accumulated from parts.

    Args:
        fns: nets and losses.
        config: weight and start of the adversarial term.
        optimizer: gradient transformation of the tokenizer.
        discriminator_optimizer: gradient transformation of the discriminator.
        active: whether the discriminator takes part; if not, it stays as it is, its metrics are 0,
            and nothing of it is computed.
        seed: seed of the run.
        ema_decay: decay of the average of the tokenizer's parameters, in (0, 1); 0 if the state
            keeps none.
    """

    def step(state, metrics, batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        # As in `steps.make_train_step`, so that a run with a discriminator begins as one without.
        _, dropout_rng = jax.random.split(rng)
        images = batch["image"]
        outputs, pull = jax.vjp(lambda p: fns.forward(p, images, dropout_rng), state.params)
        # Tokens are integers: their cotangent has no size, but its place in the tree.
        base = jax.value_and_grad(fns.loss, has_aux=True, allow_int=True)
        (loss, values), cotangent = base(outputs, images)
        discriminator = state.discriminator
        measured = {name: jnp.zeros(()) for name in metric_names(config)}
        if active:
            duel = _Duel(fns, config, discriminator_optimizer, cotangent, pull)
            toward, discriminator, measured = duel.fight(
                discriminator, images, outputs.reconstruction
            )
            total = cotangent.reconstruction + config.weight * toward
            cotangent = cotangent._replace(reconstruction=total)
            weight = config.weight * measured.get("adaptive_weight", 1.0)
            loss = loss + weight * measured["adversarial"]
        (grads,) = pull(cotangent)
        state, norms = steps.apply_gradients(state, grads, optimizer, ema_decay)
        state = state.replace(discriminator=discriminator)
        values = {**values, **measured, **norms, "loss": loss}
        return state, metrics.merge(type(metrics).single_from_model_output(**values))

    return step


class _Duel:
    """The part of a step that involves the discriminator."""

    def __init__(self, fns, config, optimizer, cotangent, pull):
        self._fns, self._config, self._optimizer = fns, config, optimizer
        self._cotangent, self._pull = cotangent, pull

    def fight(self, discriminator, images, reconstruction):
        """Return the term's gradient by the reconstruction, the updated discriminator, metrics."""
        fns, params = self._fns, discriminator["params"]
        fake, pull_fake = jax.vjp(fns.discriminate, params, reconstruction)
        real, pull_real = jax.vjp(lambda p: fns.discriminate(p, images), params)
        adversarial, by_fake = jax.value_and_grad(fns.generator_loss)(fake)
        _, toward = pull_fake(by_fake)
        measured = {
            "adversarial": adversarial,
            "logits_real": jnp.mean(real),
            "logits_fake": jnp.mean(fake),
        }
        if self._config.adaptive:
            weight = self._adapt(toward)
            measured["adaptive_weight"] = weight
            toward = weight * toward
        lost, (by_real, by_fake) = jax.value_and_grad(fns.discriminator_loss, (0, 1))(real, fake)
        grads = jax.tree.map(jnp.add, pull_real(by_real)[0], pull_fake(by_fake)[0])
        # The published trainer scales this loss too, which its gradient clipping notices.
        grads = jax.tree.map(lambda g: g * self._config.weight, grads)
        measured["discriminator_loss"] = lost
        measured["discriminator_grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = self._optimizer.update(grads, discriminator["opt_state"], params)
        params = optax.apply_updates(params, updates)
        return toward, {"params": params, "opt_state": opt_state}, measured

    def _adapt(self, toward):
        """Return the ratio of the gradient norms at the last layer, without a gradient."""
        ours = _norm(self._at_last_layer(self._cotangent.reconstruction))
        theirs = _norm(self._at_last_layer(toward))
        return jnp.clip(ours / (theirs + _ADAPTIVE_EPSILON), 0.0, _MAX_ADAPTIVE_WEIGHT)

    def _at_last_layer(self, by_reconstruction):
        """Pull a gradient by the reconstruction back to the last layer; XLA drops the rest."""
        nothing = jax.tree.map(
            lambda x: x if x.dtype == jax.dtypes.float0 else jnp.zeros_like(x), self._cotangent
        )
        (grads,) = self._pull(nothing._replace(reconstruction=by_reconstruction))
        return self._fns.last_layer(grads)


def _norm(x):
    return jnp.sqrt(jnp.sum(jnp.square(x)))
