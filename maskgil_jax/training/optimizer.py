"""AdamW or Muon with warm-up, clipping and an explicit rule for what decays.

Reference: MaskGIL section 4.3 (AdamW 1e-4, betas 0.9 and 0.96, weight decay 1e-5); clipping at 1.0
is its released trainer's. Muon: Jordan, 2024; scaled as Liu et al., 2025, "Muon is Scalable for LLM
Training".
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

from maskgil_jax import masking

NAMES = ("adamw", "muon")
RATE_SCHEDULES = ("constant", "cosine")
DECAYS = ("all", "matrices")

# Of Muon: decay of its momentum, and the root mean square of an update of a matrix at rate 1, which
# is what AdamW's is in practice, so that one learning rate serves both.
_MOMENTUM, _UPDATE_RMS = 0.95, 0.2
# The axes over which the kernel of a projection sums, and those of its result, by its name and the
# number of its axes without the layers'. The axis left over counts matrices: query, key and value;
# gate and up.
_KERNELS = {
    ("qkv", 4): ((0,), (2, 3)),
    ("gate_up", 3): ((0,), (2,)),
    ("out", 3): ((0, 1), (2,)),
    ("out", 2): ((0,), (1,)),
    ("up", 2): ((0,), (1,)),
    ("down", 2): ((0,), (1,)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of the optimiser.

    Attributes:
        name: `adamw`; or `muon`, which makes the update of every matrix inside of a transformer
            orthogonal, and leaves all else (embeddings, head, norms) to AdamW. It finds sooner what
            few tokens tell, as words of a caption.
        learning_rate: peak rate, more than 0.
        rate_schedule: `constant` or `cosine` (to 0 at the last step) after the warm-up.
        warmup_steps: updates over which the rate rises linearly from 0.
        betas: decay rates of AdamW's two moments, in [0, 1).
        epsilon: of AdamW, added to the root of the second moment, more than 0.
        weight_decay: decoupled decay, 0 or more.
        decay: whether `all` parameters decay, or only `matrices` (not norms and biases).
        clip_norm: global gradient norm at which gradients are scaled down; 0 switches it off.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    rate_schedule: str = "constant"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.96)
    epsilon: float = 1e-8
    weight_decay: float = 1e-5
    decay: str = "all"
    clip_norm: float = 1.0

    def __post_init__(self):
        masking.check_choice("optimizer.name", self.name, NAMES)
        masking.check_choice("rate_schedule", self.rate_schedule, RATE_SCHEDULES)
        masking.check_choice("decay", self.decay, DECAYS)
        for name in ("learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be more than 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must be two numbers in [0, 1)")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} must be 0 or more")


def make_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step, over `num_steps` updates.

    Raises:
        ValueError: if the warm-up is longer than a cosine run.
    """
    if config.rate_schedule == "constant":
        rest = optax.constant_schedule(config.learning_rate)
    elif config.warmup_steps >= num_steps:
        raise ValueError(
            f"warmup_steps {config.warmup_steps} must be less than num_steps {num_steps}: shorten "
            "config.optimizer.warmup_steps or lengthen config.training.num_steps"
        )
    else:
        rest = optax.cosine_decay_schedule(config.learning_rate, num_steps - config.warmup_steps)
    if not config.warmup_steps:
        return rest
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, rest], [config.warmup_steps])


def find_matrices(params: Any) -> Any:
    """Mark the parameters that multiply activations: those not named scale or bias.

    The parameters may still be in flax's partitioning boxes.
    """

    def is_matrix(path, _):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return names[-1] not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def find_kernels(params: Any) -> Any:
    """Return Muon's axes of every matrix inside of a transformer, `None` for all other parameters.

    Raises:
        ValueError: if the parameters are not those of a transformer.
    """

    def axes(path, value):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if names[-1] != "kernel" or names[-2] == "head":
            return None
        first = int("layers" in names)
        found = _KERNELS.get((names[-2], value.ndim - first))
        if found is None:
            raise ValueError(
                f"optimizer.name 'muon' cannot train {'/'.join(names)} {value.shape}, which is no "
                "matrix of a transformer; use 'adamw'"
            )
        sums, results = (tuple(first + axis for axis in group) for group in found)
        return contrib.MuonDimensionNumbers(sums, results)

    return jax.tree_util.tree_map_with_path(axes, params)


def make_optimizer(
    config: OptimizerConfig,
    num_steps: int,
    decayed: Callable[[Any], Any] = find_matrices,
    first_step: int = 0,
) -> optax.GradientTransformation:
    """Return the gradient transformation of a run over `num_steps` updates.

    Args:
        config: settings.
        num_steps: length of the run, which a cosine rate needs.
        decayed: function from parameters to a tree of booleans, true where they decay when
            `config.decay` is `matrices`.
        first_step: updates of the run before this transformation's first, so that its learning
            rate is that of the run.
    """
    rate = make_rate(config, num_steps)
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if first_step:
        rate = _shift(rate, first_step)
    adamw = optax.adamw(
        rate,
        b1=config.betas[0],
        b2=config.betas[1],
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed if config.decay == "matrices" else None,
    )
    if config.name == "adamw":
        return optax.chain(*parts, adamw)
    muon = optax.chain(
        contrib.scale_by_muon(beta=_MOMENTUM, weight_dimension_numbers=find_kernels),
        optax.stateless(_scale_by_shape),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    return optax.chain(*parts, optax.partition({"adamw": adamw, "muon": muon}, _choose))


def _shift(rate: optax.Schedule, steps: int) -> optax.Schedule:
    return lambda count: rate(count + steps)


def _is_axes(node: Any) -> bool:
    return node is None or isinstance(node, contrib.MuonDimensionNumbers)


def _choose(params: Any) -> Any:
    """Return which of the two optimisers each parameter has."""
    return jax.tree.map(
        lambda axes: "adamw" if axes is None else "muon", find_kernels(params), is_leaf=_is_axes
    )


def _scale_by_shape(updates: Any, params: Any) -> Any:
    """Give orthogonal updates of all shapes the same root mean square."""
    del params

    def scale(axes, update):
        sides = [
            math.prod(update.shape[axis] for axis in group)
            for group in (axes.reduction_axis, axes.output_axis)
        ]
        return update * (_UPDATE_RMS * max(sides) ** 0.5)

    return jax.tree.map(scale, find_kernels(updates), updates, is_leaf=_is_axes)
