"""The loop that every run shares, and its guards.

The host only dispatches: losses are fetched once per logging interval, and before each checkpoint,
because a state that is not finite must never be written.
"""

import collections
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


class NonFiniteError(RuntimeError):
    """A loss, gradient or parameter became NaN or infinite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long a run is and when it stops to look around.

    Attributes:
        num_steps: updates in all.
        batch_size: examples per update, over all processes.
        log_every, checkpoint_every: updates between, at least 1.
        sample_every, evaluate_every: updates between; 0 for never.
    """

    num_steps: int
    batch_size: int
    log_every: int
    checkpoint_every: int
    sample_every: int
    evaluate_every: int = 0

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("sample_every", "evaluate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must be 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a run does besides updating.

    Attributes:
        log: `(step, scalars)`, at every logging interval.
        save: `(step, state)`, at every checkpoint.
        sample: `(step, state)`, at every sample interval.
        evaluate: `(step, state)`, at every evaluation interval and after the last update; before
            `save`, so that a run resumed from a step has been evaluated up to it.
    """

    log: Callable[[int, Mapping[str, float]], None]
    save: Callable[[int, Any], None]
    sample: Callable[[int, Any], None]
    evaluate: Callable[[int, Any], None]


class DeviceBatches:
    """Batches put on the devices ahead of time, that still know which one was delivered last.

    Its saved position is that after the last delivered batch, not that of the reader ahead of it.
    """

    def __init__(self, source: Any, put: Callable[[Any], Any], ahead: int):
        """Wrap an iterator with `get_state`/`set_state`; `put` maps a host batch to the devices."""
        if ahead < 1:
            raise ValueError(f"prefetch {ahead} must be at least 1")
        self._source, self._put, self._ahead = source, put, ahead
        self._queue: collections.deque = collections.deque()
        self._position = source.get_state()

    def __next__(self) -> Any:
        while len(self._queue) < self._ahead:
            batch = self._put(next(self._source))
            self._queue.append((batch, self._source.get_state()))
        batch, self._position = self._queue.popleft()
        return batch

    def get_state(self) -> bytes:
        """Return the position after the last delivered batch, as JSON."""
        return json.dumps(self._position).encode()

    def set_state(self, state: bytes) -> None:
        """Continue from a position that `get_state` returned."""
        self._queue.clear()
        self._position = json.loads(state)
        self._source.set_state(self._position)


def run_loop(
    step_fn: Callable[[Any, Any, Any], tuple[Any, Any]],
    state: Any,
    empty_metrics: Any,
    batches: DeviceBatches,
    config: LoopConfig,
    hooks: Hooks,
    first_step: int = 0,
) -> Any:
    """Update the state from `first_step` to `config.num_steps` and return it.

    Args:
        step_fn: `(state, metrics, batch) → (state, metrics)`, jitted; may donate both.
        state: state after `first_step` updates.
        empty_metrics: callable that makes an empty clu collection.
        batches: iterator positioned at the next batch.
        config: lengths and intervals.
        hooks: what to do at the intervals.
        first_step: updates already done.

    Raises:
        NonFiniteError: within one logging interval of the first value that is not finite; nothing
            that is not finite has been saved then.
    """
    metrics, window = empty_metrics(), 0
    timer = Timer(config.num_steps - first_step)
    for step in range(first_step + 1, config.num_steps + 1):
        state, metrics = step_fn(state, metrics, next(batches))
        window += 1
        if step == first_step + 1:
            jax.block_until_ready(metrics)
            timer.start()
        last = step == config.num_steps
        save = last or step % config.checkpoint_every == 0
        log = last or step % config.log_every == 0
        every = config.evaluate_every
        evaluate = every > 0 and (last or step % every == 0)
        if save or log or evaluate:
            scalars = {name: float(x) for name, x in jax.device_get(metrics.compute()).items()}
            check_finite(scalars, step - window + 1, step)
        if log:
            scalars |= timer.measure(step - first_step, config.batch_size)
            hooks.log(step, scalars)
            metrics, window = empty_metrics(), 0
        if evaluate:
            with timer.paused():
                hooks.evaluate(step, state)
        if save:
            hooks.save(step, state)
        if config.sample_every and step % config.sample_every == 0 and not last:
            with timer.paused():
                hooks.sample(step, state)
    return state


def check_finite(scalars: Mapping[str, float], first: int, last: int) -> None:
    """Raise a `NonFiniteError` that says what to try if any scalar is NaN or infinite."""
    if all(math.isfinite(value) for value in scalars.values()):
        return
    values = ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
    raise NonFiniteError(
        f"training stopped: not finite in steps {first}–{last} ({values}). The last checkpoint is "
        "from before. Try a lower optimizer.learning_rate or a longer warm-up; for a model, "
        "model.qk_norm and model.post_norm, which keep output_norm from growing, or model.dtype "
        "float32; for a tokenizer, vq.dtype float32 or a smaller vq_loss.adversarial."
    )


class Timer:
    """Rate and remaining time, without compilation and pauses."""

    def __init__(self, total: int):
        self._total = total
        self._start = self._since = time.monotonic()
        self._done = 0

    def start(self) -> None:
        """Begin to measure, one update having been done."""
        self._start = self._since = time.monotonic()
        self._done = 1

    def measure(self, done: int, batch_size: int) -> dict[str, float]:
        """Return images per second since the last call and seconds to the end."""
        now = time.monotonic()
        updates, seconds = done - self._done, max(now - self._since, 1e-9)
        pace = (now - self._start) / max(done - 1, 1)
        self._since, self._done = now, done
        return {
            "images_per_second": updates * batch_size / seconds,
            "eta_seconds": pace * (self._total - done),
        }

    def paused(self):
        """Return a context whose duration does not count."""
        return _Pause(self)

    def shift(self, seconds: float) -> None:
        """Move the starting points later."""
        self._start += seconds
        self._since += seconds


class _Pause:
    def __init__(self, timer: Timer):
        self._timer = timer

    def __enter__(self):
        self._began = time.monotonic()

    def __exit__(self, *_):
        self._timer.shift(time.monotonic() - self._began)


def format_progress(step: int, num_steps: int, scalars: Mapping[str, float]) -> str:
    """Return one line a person can read."""
    hidden = ("images_per_second", "eta_seconds")
    values = "  ".join(f"{k} {v:.4g}" for k, v in scalars.items() if k not in hidden)
    minutes, seconds = divmod(round(scalars["eta_seconds"]), 60)
    hours, minutes = divmod(minutes, 60)
    eta = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    rate = scalars["images_per_second"]
    return f"step {step}/{num_steps}  {values}  {rate:,.1f} images/s  ETA {eta}"
