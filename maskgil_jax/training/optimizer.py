"""AdamW with warm-up, clipping and an explicit rule for what decays.

Reference: MaskGIL section 4.3 (AdamW 1e-4, betas 0.9 and 0.96, weight decay 1e-5); clipping at 1.0
is its released trainer's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from maskgil_jax import masking

RATE_SCHEDULES = ("constant", "cosine")
DECAYS = ("all", "matrices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of the optimiser.

    Attributes:
        learning_rate: peak rate, more than 0.
        rate_schedule: `constant` or `cosine` (to 0 at the last step) after the warm-up.
        warmup_steps: updates over which the rate rises linearly from 0.
        betas: decay rates of the two moments, in [0, 1).
        epsilon: added to the root of the second moment, more than 0.
        weight_decay: decoupled decay, 0 or more.
        decay: whether `all` parameters decay, or only `matrices` (not norms and biases).
        clip_norm: global gradient norm at which gradients are scaled down; 0 switches it off.
    """

    learning_rate: float = 1e-4
    rate_schedule: str = "constant"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.96)
    epsilon: float = 1e-8
    weight_decay: float = 1e-5
    decay: str = "all"
    clip_norm: float = 1.0

    def __post_init__(self):
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
    parts.append(
        optax.adamw(
            (lambda count: rate(count + first_step)) if first_step else rate,
            b1=config.betas[0],
            b2=config.betas[1],
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed if config.decay == "matrices" else None,
        )
    )
    return optax.chain(*parts)
