"""From a validated configuration to what the loop needs, whatever is trained."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maskgil_jax import sharding
from maskgil_jax.training import optimizer as optimizers
from maskgil_jax.training import steps


@flax.struct.dataclass
class Task:
    """What the loop needs to train one kind of model.

    Attributes:
        step: jitted `(state, metrics, batch) → (state, metrics)`.
        init: jitted `() → state` in its shardings.
        abstract: shapes, types and shardings of the state.
        metric_names: names of the scalars that the step averages.
    """

    step: Any = flax.struct.field(pytree_node=False)
    init: Any = flax.struct.field(pytree_node=False)
    abstract: Any = flax.struct.field(pytree_node=False)
    metric_names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def empty_metrics(self) -> Any:
        """Return metrics that average nothing yet."""
        return steps.metrics_class(self.metric_names).empty()


def optimizer_config(config: ConfigDict) -> optimizers.OptimizerConfig:
    """Return the optimiser section, validated."""
    return optimizers.OptimizerConfig(**config.optimizer.to_dict())


def rate_schedule(config: ConfigDict) -> optax.Schedule:
    """Return the learning rate as a function of the step."""
    return optimizers.make_rate(optimizer_config(config), config.training.num_steps)


def make_optimizer(config: ConfigDict, first_step: int = 0) -> optax.GradientTransformation:
    """Return the gradient transformation that begins after `first_step` updates of the run."""
    return optimizers.make_optimizer(
        optimizer_config(config), config.training.num_steps, first_step=first_step
    )


def make_task(
    config: ConfigDict,
    mesh: Mesh,
    init_params: Callable[[Any], Any],
    loss_fn: Callable[..., steps.Summed],
    prepare: Callable[[Any, Any], Any],
    metric_names: tuple[str, ...],
    frozen: Any,
) -> Task:
    """Return the task of lowering `loss_fn(params, batch, rng, frozen)`."""
    training, optimizer = config.training, make_optimizer(config)

    def create():
        params = init_params(jax.random.key(config.seed))
        return steps.create_state(params, optimizer, ema=training.ema_decay > 0)

    def make_step(frozen):
        return steps.make_train_step(
            lambda params, batch, rng: loss_fn(params, batch, rng, frozen),
            prepare,
            optimizer,
            seed=config.seed,
            ema_decay=training.ema_decay,
            accumulation_steps=training.accumulation_steps,
        )

    return jit_task(mesh, create, {0: make_step}, metric_names, frozen)


def jit_task(
    mesh: Mesh,
    create: Callable[[], Any],
    phases: Mapping[int, Callable[[Any], Any]],
    metric_names: tuple[str, ...],
    frozen: Any,
) -> Task:
    """Return the task of a state and of the steps `make_step(frozen)`, on the devices of a mesh.

    `phases` maps the number of updates done to the `make_step` that is used from then on. `frozen`
    holds parameters that the steps use and do not change. They are an argument of the compiled
    programs, which would otherwise hold them as constants.
    """
    boxed = jax.eval_shape(create)
    shardings = sharding.state_shardings(boxed, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings
    )
    everywhere = sharding.replicated(mesh)

    def jit_step(make_step):
        def sharded_step(state, metrics, batch, frozen):
            with nn.logical_axis_rules(sharding.RULES):
                return make_step(frozen)(state, metrics, batch)

        return jax.jit(
            sharded_step,
            in_shardings=(shardings, everywhere, sharding.batch_sharding(mesh), everywhere),
            out_shardings=(shardings, everywhere),
            donate_argnums=(0, 1),
        )

    jitted = {first: jit_step(make_step) for first, make_step in phases.items()}
    return Task(
        step=_PhasedStep(jitted, jax.device_put(frozen, everywhere)),
        init=jax.jit(lambda: nn.unbox(create()), out_shardings=shardings),
        abstract=abstract,
        metric_names=metric_names,
    )


class _PhasedStep:
    """Jitted steps with their last argument given; the number of updates done says which is used.

    That number is read from the device for a state that this object did not return itself, and
    counted otherwise, so that the host need not wait for every update.
    """

    def __init__(self, jitted: Mapping[int, Any], frozen: Any):
        self._jitted, self._frozen = dict(sorted(jitted.items())), frozen
        self._done, self._last = 0, None

    def __call__(self, state: Any, metrics: Any, batch: Any) -> Any:
        if len(self._jitted) > 1 and state.step is not self._last:
            self._done = int(state.step)
        state, metrics = self._find(self._done)(state, metrics, batch, self._frozen)
        self._done, self._last = self._done + 1, state.step
        return state, metrics

    def lower(self, state: Any, metrics: Any, batch: Any) -> Any:
        """Lower the step that is used in the end."""
        return self._find(max(self._jitted)).lower(state, metrics, batch, self._frozen)

    def _find(self, done: int) -> Any:
        return self._jitted[max(first for first in self._jitted if first <= done)]
