"""The autoregressive decoder: draw one token after the other, in raster order.

It knows functions and no module, as the masked decoder does. The whole generation is one program: a
few loops in a row, each of which reads as much of the cache as is filled when it ends.

Reference: LlamaGen `autoregressive/models/generate.py`.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maskgil_jax.decoding import categorical, filters, guidance

# Positions by which the part of the cache that is read grows: each length is a loop to compile.
_LIVE_BLOCK = 64
# Sets the keys of tokens apart from those that the masked decoder makes of the same image's key.
_STREAM = 0x6172
MIN_TEMPERATURE = 1e-4


@dataclasses.dataclass(frozen=True)
class CausalPredictor:
    """A causal model, token by token.

    Attributes:
        prefix_length: number of prefilling tokens.
        start: maps a condition and a number of tokens to the logits [b, v] of the first one, and a
            cache for as many. Every leaf of the cache has the batch in front, and `grow(length)`
            returns it for that many positions, prefilling tokens included.
        step: maps codes [b], their index, a number of positions of the cache and a cache to the
            logits [b, v] of the next token, and the cache with the codes. As many positions are
            read; the cache has no more.
    """

    prefix_length: int
    start: Callable[[Any, int], tuple[Array, Any]]
    step: Callable[[Array, Any, int, Any], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """How tokens are drawn one after the other.

    Attributes:
        guidance_scale: s of uncond + s·(cond - uncond); 1 switches guidance off.
        guided_tokens: tokens from the first on that are guided; 0 for all.
        temperature: divides the logits; 0 takes the most probable code.
        top_k: draw among the k most likely codes; 0 for all.
        top_p: draw among the fewest most likely codes whose probabilities sum to this.
    """

    guidance_scale: float = 2.0
    guided_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        for name in ("guided_tokens", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 0:
                raise ValueError(
                    f"{name} {value!r} is out of range; allowed: 0 (all) or more, whole numbers"
                )
        for name in ("guidance_scale", "temperature"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(
                    f"{name} {getattr(self, name)} is out of range; allowed: 0 or more, finite"
                )
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature {self.temperature} is too small to divide by; allowed: 0 (the most "
                f"probable code) or at least {MIN_TEMPERATURE}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is out of range; allowed: more than 0, up to 1")
        for name, unset in {"top_k": 0, "top_p": 1}.items():
            if self.temperature == 0 and getattr(self, name) != unset:
                raise ValueError(
                    f"{name} {getattr(self, name)} has no meaning at temperature 0, where no code "
                    f"is drawn; leave it at {unset}"
                )

    def describe(self) -> str:
        """Return the settings that matter most, for a line of news."""
        return (
            f"token by token, guidance {self.guidance_scale:g}, temperature {self.temperature:g}, "
            f"top-k {self.top_k}, top-p {self.top_p:g}"
        )

    def program(self) -> "AutoregressiveProgram":
        """Return what shapes the computation."""
        return AutoregressiveProgram(
            guided=self.guidance_scale != 1,
            guided_tokens=self.guided_tokens,
            greedy=self.temperature == 0,
            top_k=self.top_k,
            filtered=self.top_p < 1,
        )

    def plan(self) -> "AutoregressivePlan":
        """Return the numbers that the computation is given."""
        return AutoregressivePlan(
            guidance_scale=np.float32(self.guidance_scale),
            temperature=np.float32(self.temperature),
            top_p=np.float32(self.top_p),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressiveProgram:
    """The settings that shape a compiled decoder; see `AutoregressiveConfig`."""

    guided: bool
    guided_tokens: int
    greedy: bool
    top_k: int
    filtered: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressivePlan:
    """The numbers that a compiled decoder is given, all float32 scalars."""

    guidance_scale: Any
    temperature: Any
    top_p: Any


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens that are decoded alike.

    Attributes:
        first: index of the first of them.
        end: index behind the last.
        live: positions of the cache that are read for each.
        guided: whether there is guidance.
    """

    first: int
    end: int
    live: int
    guided: bool


def make_spans(count: int, prefix_length: int, guided: int) -> list[Span]:
    """Return the spans of all tokens but the first, which the prefilling gives.

    Args:
        count: tokens to decode.
        prefix_length: prefilling tokens in front of them.
        guided: how many of them are guided, from the first on.
    """
    total = prefix_length + count
    # To decode token i, the cache holds the prefix and i tokens.
    ends = {i for i in range(1, count) if (prefix_length + i) % _LIVE_BLOCK == 0}
    starts = sorted({1, *(end + 1 for end in ends), guided} & set(range(1, count)))
    spans = []
    for first, end in itertools.pairwise([*starts, count]) if starts else ():
        live = -(-(prefix_length + end - 1) // _LIVE_BLOCK) * _LIVE_BLOCK
        spans.append(Span(first, end, min(live, total), first < guided))
    return spans


def decode(
    predictor: CausalPredictor,
    condition: Any,
    null_condition: Any,
    rngs: jax.Array,
    program: AutoregressiveProgram,
    plan: AutoregressivePlan,
    *,
    count: int,
    forced: Int[np.ndarray, " n"] | None = None,
) -> Int[Array, "b n"]:
    """Draw the first tokens of a batch of images.

    Args:
        predictor: the model.
        condition: pytree with a leading batch axis.
        null_condition: the same pytree, meaning "no condition"; read only with guidance.
        rngs: one key per image, see `masked.image_keys`.
        program: settings that shape the computation.
        plan: its numbers.
        count: tokens to draw, n; at least 1.
        forced: tokens that are not drawn but given, -1 where one is drawn; all are if `None`. Only
            those that are drawn count as guided.

    Raises:
        ValueError: if `forced` has another length.

    Returns:
        int32 codes [b, n]; -1 from where on the logits were no numbers.
    """
    if forced is None:
        forced = np.full(count, -1, np.int32)
    if len(forced) != count:
        raise ValueError(f"{len(forced)} tokens are forced or drawn; expected: {count}")
    guided = _count_guided(program, forced)
    draw = _make_draw(program, plan, rngs, forced)

    def guide(logits, is_guided):
        if not is_guided:
            return logits
        cond, uncond = jnp.split(logits, 2)
        return guidance.guide(cond, uncond, jnp.asarray(plan.guidance_scale))

    both = condition
    if guided:
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition, null_condition)
    spans = make_spans(count, predictor.prefix_length, guided)
    # A loop that reads a part of the cache copies all of it in every step, twice on a CPU: what is
    # updated in place has no other use. So the cache is as long as what is read.
    first = spans[0].live - predictor.prefix_length if spans else count
    logits, cache = predictor.start(both, first)
    token = draw(0, guide(logits, guided > 0))
    is_doubled, b = guided > 0, token.shape[0]
    tokens = jnp.zeros((b, count), jnp.int32).at[:, 0].set(token)
    for span in spans:
        if is_doubled and not span.guided:
            cache = jax.tree.map(lambda x: x[:b], cache)
            is_doubled = False
        cache = cache.grow(span.live)
        body = _make_body(predictor, span, draw, guide)
        tokens, token, cache = jax.lax.fori_loop(span.first, span.end, body, (tokens, token, cache))
    return tokens


def _count_guided(program: AutoregressiveProgram, forced: np.ndarray) -> int:
    """Return how many tokens are guided, from the first on, those in between included."""
    if not program.guided:
        return 0
    drawn = np.flatnonzero(forced < 0)
    if not program.guided_tokens or program.guided_tokens >= len(drawn):
        return len(forced)
    return int(drawn[program.guided_tokens - 1]) + 1


def _make_body(
    predictor: CausalPredictor,
    span: Span,
    draw: Callable[[Any, Array], Array],
    guide: Callable[[Array, bool], Array],
) -> Callable[..., Any]:
    def body(i, carry):
        tokens, token, cache = carry
        # What follows a token that is none is none either; it is looked up as any.
        given = jnp.maximum(token, 0)
        given = jnp.concatenate([given, given]) if span.guided else given
        logits, cache = predictor.step(given, i - 1, span.live, cache)
        drawn = draw(i, guide(logits, span.guided))
        token = jnp.where(token < 0, token, drawn)
        return jax.lax.dynamic_update_slice(tokens, token[:, None], (0, i)), token, cache

    return body


def _make_draw(
    program: AutoregressiveProgram,
    plan: AutoregressivePlan,
    rngs: jax.Array,
    forced: Int[np.ndarray, " n"],
) -> Callable[[Any, Float[Array, "b k"]], Int[Array, " b"]]:
    """Return `draw(i, logits [b k]) → codes [b]`; -1 where the logits are no numbers."""
    any_forced = bool((forced >= 0).any())
    own = jax.vmap(lambda rng: jax.random.fold_in(rng, _STREAM))(rngs)

    def draw(i, logits):
        logits = logits[:, None].astype(jnp.float32)
        if program.greedy:
            codes, log_prob = categorical.argmax_code(logits)
        else:
            logits = logits / plan.temperature
            if program.top_k:
                logits = filters.keep_top_k(logits, program.top_k)
            if program.filtered:
                logits = filters.keep_top_p(logits, plan.top_p)
            keys = jax.vmap(jax.random.fold_in, (0, None))(own, i)
            uniforms = categorical.uniforms_per_image(keys, 1)
            codes, log_prob = categorical.draw_categorical(logits, uniforms)
        codes = jnp.where(jnp.isnan(log_prob), -1, codes)[:, 0]
        if not any_forced:
            return codes
        given = jnp.asarray(forced, jnp.int32)[i]
        return jnp.where(given < 0, codes, given)

    return draw
