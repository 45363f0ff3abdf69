"""How the rows measure: contenders take turns in blocks, next to the rate of a plain matmul.

The matmul is measured before, between and after the blocks; if its rate has moved by more than 5 %
from before to after, the machine was not quiet and the result is void.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_DRIFT = 0.05
MATMUL = "matmul"
MATMUL_SIDE = {"cpu": 2048, "gpu": 16384}
COPY_BYTES = {"cpu": 2**28, "gpu": 2**32}
_CEILING_BLOCKS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure.

    Attributes:
        blocks: turns of every contender, at least 5.
        block_seconds: how long a turn lasts at least; one call if that is longer.
    """

    blocks: int = 5
    block_seconds: float = 2.0

    def __post_init__(self):
        if self.blocks < 5:
            raise ValueError(f"blocks {self.blocks} must be at least 5, or the median says little")
        if not self.block_seconds > 0:
            raise ValueError(f"block_seconds {self.block_seconds} must be more than 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """What one measurement found.

    Attributes:
        seconds: contender → seconds per call, one number a block.
        ceilings: matmul rate in FLOP/s, one number a block.
        before: matmul rate before the first block.
        after: matmul rate after the last block.
    """

    seconds: Mapping[str, np.ndarray]
    ceilings: np.ndarray
    before: float
    after: float

    @property
    def drift(self) -> float:
        """Share by which the matmul rate changed from before to after."""
        return abs(self.after / self.before - 1)


class Matmul:
    """A square matrix product of random numbers, whose rate is the ceiling of its type."""

    def __init__(self, dtype: str):
        side = MATMUL_SIDE.get(jax.default_backend(), MATMUL_SIDE["gpu"])
        self.flops = 2 * side**3
        keys = jax.random.split(jax.random.key(0))
        self._operands = [jax.random.normal(key, (side, side), dtype) for key in keys]
        self._product = jax.jit(jnp.matmul)

    def __call__(self) -> None:
        """Multiply once."""
        self._product(*self._operands).block_until_ready()


class Copy:
    """An array that is read and written where it lies: what memory moves at most.

    Attributes:
        bytes: that a call moves, both ways together.
    """

    def __init__(self):
        size = COPY_BYTES.get(jax.default_backend(), COPY_BYTES["gpu"])
        self.bytes = 2 * size
        self._array = jnp.zeros(size // 4, jnp.float32)
        # Into memory of its own it would be another time on a CPU, whose system has to zero it.
        self._negate = jax.jit(jnp.negative, donate_argnums=0)

    def __call__(self) -> None:
        """Move the bytes once."""
        self._array = self._negate(self._array).block_until_ready()


def measure(contenders: Mapping[str, Callable[[], Any]], dtype: str, effort: Effort) -> Times:
    """Time the contenders in turns.

    Args:
        contenders: name → call that returns when its work is done.
        dtype: type of the ceiling's matmul.
        effort: how long to measure.
    """
    matmul = Matmul(dtype)
    calls = dict(contenders) | {MATMUL: matmul}
    repeats = {name: _warm_up(call, effort.block_seconds) for name, call in calls.items()}

    def ceiling() -> float:
        return matmul.flops / _seconds_per_call(matmul, repeats[MATMUL])

    before = statistics.median(ceiling() for _ in range(_CEILING_BLOCKS))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(effort.blocks):
        for name, call in calls.items():
            seconds[name].append(_seconds_per_call(call, repeats[name]))
    after = statistics.median(ceiling() for _ in range(_CEILING_BLOCKS))
    arrays = {name: np.array(values) for name, values in seconds.items()}
    ceilings = matmul.flops / arrays.pop(MATMUL)
    return Times(seconds=arrays, ceilings=ceilings, before=before, after=after)


def _warm_up(call: Callable[[], Any], block_seconds: float) -> int:
    """Call twice, the first time to compile; return how many calls fill a block."""
    call()
    return max(1, math.ceil(block_seconds / _seconds_per_call(call, 1)))


def _seconds_per_call(call: Callable[[], Any], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats
