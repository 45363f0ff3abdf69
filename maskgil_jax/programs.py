"""The compiled programs of generation: a draft, the masked loop, pixels; all or a step of it.

Each is made once for what shapes the computation, and given everything else. What calls them, batch
by batch, is in `generation.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maskgil_jax import sharding
from maskgil_jax.build import models as build
from maskgil_jax.decoding import fusion, masked
from maskgil_jax.decoding.autoregressive import AutoregressiveConfig, AutoregressiveProgram
from maskgil_jax.decoding.sampler import Program, SamplerConfig
from maskgil_jax.models.base import TokenModelConfig
from maskgil_jax.pictures import quantize
from maskgil_jax.tokenizers.base import TokenizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A causal model that draws the first tokens of every image.

    Attributes:
        model: architecture.
        params: its parameters.
        sampler: settings of its decoder.
        count: tokens that it draws, 1 to all.
        condition: what the images show, as it takes it.
        null_condition: what guidance leads away from; the model's "no condition" if `None`.
    """

    model: TokenModelConfig
    params: Any
    sampler: AutoregressiveConfig
    count: int
    condition: Any
    null_condition: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftProgram:
    """What shapes the computation of a draft; see `Draft`."""

    model: TokenModelConfig
    program: AutoregressiveProgram
    count: int


@functools.lru_cache(maxsize=64)
def make_generate_fn(
    model: TokenModelConfig,
    program: Program | None,
    mesh: Mesh,
    grid_size: tuple[int, int] | None = None,
    *,
    draft: DraftProgram | None = None,
    tokenizer: TokenizerConfig | None = None,
    return_trace: bool = False,
    batch_invariant: bool = False,
):
    """Return the jitted `(params, tokenizer_params, batch) → (tokens [b l], trace, pixels)`.

    The parameters are those of the model and of the draft's. Of the batch, a `masked.Batch` and a
    `fusion.Draft` or `None`, null conditions are filled in. The trace is int32 [t b l]. Pixels are
    uint8 [b H W c] and, of every image, whether they were finite numbers; `None` without a
    tokenizer. The batch is split over the mesh's data axes; every process receives all results.

    With `program` `None` nothing is left to the model: the draft draws all tokens.

    With `batch_invariant` every image is computed alone. The function then has a fourth argument,
    the number of images that are wanted: those behind them are padding, and left out.
    """
    spread = _make_spreader(mesh, batch_invariant)
    draw_first = _make_draft_fn(model, draft, grid_size)

    def decode(whole, rows):
        (params, draft_params), common = whole
        batch = draw_first(draft_params, *_put_together(model, draft, common, rows))
        if program is None:
            return batch.tokens, None
        tokens, trace = masked.decode_batch(
            build.make_predictor(model, params, grid_size),
            batch,
            program,
            mask_token_id=model.mask_token_id,
            grid_size=grid_size or model.grid_size,
            return_trace=return_trace,
        )
        return tokens, None if trace is None else jnp.moveaxis(trace.tokens, 0, 1)

    def run(params, tokenizer_params, batch, *count):
        common, rows = _take_apart(batch, mesh)
        tokens, trace = spread(decode, (params, common), rows, *count)
        if trace is not None:
            trace = jnp.moveaxis(trace, 1, 0)
        if tokenizer is None:
            return tokens, trace, None
        decode_pixels = _make_pixel_fn(tokenizer, grid_size or model.grid_size)
        return tokens, trace, spread(decode_pixels, tokenizer_params, tokens, *count)

    return jax.jit(run, out_shardings=sharding.replicated(mesh))


def _make_draft_fn(
    model: TokenModelConfig, draft: DraftProgram | None, grid_size: tuple[int, int] | None
) -> Callable[..., masked.Batch]:
    """Return `(params, batch, given) → batch`, with the first tokens drawn if there is a draft."""
    if draft is None:
        return lambda params, batch, given: batch

    def draw_first(params, batch, given):
        tokens = fusion.draw_first(
            build.make_causal_predictor(draft.model, params, grid_size or model.grid_size),
            given,
            batch.tokens,
            batch.rngs,
            draft.program,
            count=draft.count,
            mask_token_id=model.mask_token_id,
        )
        return dataclasses.replace(batch, tokens=tokens)

    return draw_first


@functools.lru_cache(maxsize=64)
def make_draft_fn(
    model: TokenModelConfig,
    draft: DraftProgram,
    mesh: Mesh,
    grid_size: tuple[int, int] | None = None,
    *,
    batch_invariant: bool = False,
):
    """Return the jitted `(draft_params, batch) → tokens [b l]`, the first of them drawn.

    With `batch_invariant` the number of images that are wanted is a third argument, as in
    `make_generate_fn`.
    """
    spread = _make_spreader(mesh, batch_invariant)
    draw_first = _make_draft_fn(model, draft, grid_size)

    def draw(whole, rows):
        params, common = whole
        return draw_first(params, *_put_together(model, draft, common, rows)).tokens

    def run(params, batch, *count):
        common, rows = _take_apart(batch, mesh)
        return spread(draw, (params, common), rows, *count)

    return jax.jit(run, out_shardings=sharding.replicated(mesh))


@functools.lru_cache(maxsize=64)
def make_step_fn(
    model: TokenModelConfig,
    program: Program,
    mesh: Mesh,
    grid_size: tuple[int, int] | None = None,
    *,
    first: bool | None = None,
    batch_invariant: bool = False,
):
    """Return the jitted `(params, batch, i, state) → state`, to loop on the host.

    Args:
        model: architecture of the model.
        program: settings that shape the computation.
        mesh: devices; the batch is split over its data axes.
        grid_size: (gh, gw); the configured one if `None`.
        first: whether it serves the first step only, or all others, or all; see `masked.make_step`.
        batch_invariant: whether every image is computed alone; the number of images that are wanted
            is then a fifth argument, as in `make_generate_fn`.
    """
    spread = _make_spreader(mesh, batch_invariant)

    def step(whole, rows):
        params, common, i = whole
        batch_rows, state = rows
        take = masked.make_step(
            build.make_predictor(model, params, grid_size),
            _put_together(model, None, common, batch_rows)[0],
            program,
            mask_token_id=model.mask_token_id,
            grid_size=grid_size or model.grid_size,
            first=first,
        )
        return take(i, state)

    def run(params, batch, i, state, *count):
        common, rows = _take_apart((batch, None), mesh)
        return spread(step, (params, common, i), (rows, state), *count)

    return jax.jit(run, out_shardings=sharding.replicated(mesh))


@functools.lru_cache(maxsize=64)
def make_decode_fn(
    tokenizer: TokenizerConfig,
    mesh: Mesh,
    grid_size: tuple[int, int],
    *,
    batch_invariant: bool = False,
):
    """Return the jitted `(tokenizer_params, tokens [b l]) → pixels`, as in `make_generate_fn`.

    With `batch_invariant` the number of images that are wanted is a third argument.
    """
    spread = _make_spreader(mesh, batch_invariant)
    decode_pixels = _make_pixel_fn(tokenizer, grid_size)

    def run(params, tokens, *count):
        tokens = jax.lax.with_sharding_constraint(tokens, sharding.batch_sharding(mesh))
        return spread(decode_pixels, params, tokens, *count)

    return jax.jit(run, out_shardings=sharding.replicated(mesh))


def _make_spreader(mesh: Mesh, batch_invariant: bool) -> Callable[..., Any]:
    """Return `spread(function, whole, rows)`, which calls `function(whole, rows)` on all devices.

    `rows` have the batch in front. If each is to be computed alone, it takes their number too.
    """
    if batch_invariant:
        return functools.partial(sharding.map_rows, mesh)
    return lambda function, whole, rows: function(whole, rows)


def _take_apart(given: tuple[masked.Batch, fusion.Draft | None], mesh: Mesh) -> tuple[Any, Any]:
    """Return what the images of a batch have in common, and what each has of its own, split."""
    batch, draft = given
    split = functools.partial(
        jax.lax.with_sharding_constraint, shardings=sharding.batch_sharding(mesh)
    )
    conditions = [(batch.condition, batch.null_condition)]
    if draft is not None:
        conditions.append((draft.condition, draft.null_condition))
    counts, plan = None, batch.plan
    if plan is not None:
        counts, plan = plan.counts, dataclasses.replace(plan, counts=None)
    rows = (split(batch.tokens), split(conditions), batch.rngs, counts)
    return (plan, batch.shared, None if draft is None else draft.plan), rows


def _put_together(
    model: TokenModelConfig, draft: DraftProgram | None, common: Any, rows: Any
) -> tuple[masked.Batch, fusion.Draft | None]:
    """Return a batch and draft, or some images', with null conditions where none is given."""
    (plan, shared, draft_plan), (tokens, conditions, rngs, counts) = common, rows

    def fill(config, condition, null):
        return condition, config.null_condition(condition) if null is None else null

    condition, null = fill(model, *conditions[0])
    batch = masked.Batch(
        tokens=tokens,
        condition=condition,
        null_condition=null,
        rngs=rngs,
        plan=plan if plan is None else dataclasses.replace(plan, counts=counts),
        shared=shared,
    )
    if draft is None:
        return batch, None
    condition, null = fill(draft.model, *conditions[1])
    return batch, fusion.Draft(condition=condition, null_condition=null, plan=draft_plan)


def _decode_pixels(
    tokenizer: TokenizerConfig, params: Any, codes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return uint8 pixels, and of every image whether they were finite."""
    decoder: Any = tokenizer.make_module()
    pixels = decoder.apply({"params": params}, codes, method="decode")
    return quantize(pixels), jnp.all(jnp.isfinite(pixels), axis=(1, 2, 3))


def _make_pixel_fn(tokenizer: TokenizerConfig, grid_size: tuple[int, int]) -> Callable[..., Any]:
    return lambda params, tokens: _decode_pixels(tokenizer, params, tokens.reshape(-1, *grid_size))


def make_image_fn(
    model: TokenModelConfig,
    tokenizer: TokenizerConfig,
    sampler: SamplerConfig | AutoregressiveConfig,
    grid_size: tuple[int, int] | None = None,
) -> Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Return labels to pixels as one pure function, to be exported as one program.

    The settings are constants of it.

    Args:
        model: architecture of the model.
        tokenizer: architecture of the tokenizer.
        sampler: settings of the decoder.
        grid_size: (gh, gw); the configured one if `None`.

    Returns:
        `(params, tokenizer_params, labels [b], rngs [b]) → (images, finite)`. Of the tokenizer's
        parameters those of its decoder suffice. The images are uint8 [b H W c]; `finite` [b] is
        false where logits or pixels were no finite numbers, which `generate` refuses.
    """
    gh, gw = grid_size or model.grid_size

    def draw(params, labels, rngs):
        tokens = jnp.full((labels.shape[0], gh * gw), model.mask_token_id, jnp.int32)
        conditions = {"condition": labels, "null_condition": model.null_condition(labels)}
        if isinstance(sampler, AutoregressiveConfig):
            return fusion.draw_first(
                build.make_causal_predictor(model, params, (gh, gw)),
                fusion.Draft(**conditions, plan=sampler.plan()),
                tokens,
                rngs,
                sampler.program(),
                count=gh * gw,
                mask_token_id=model.mask_token_id,
            )
        unknown = jnp.full(labels.shape[0], gh * gw, jnp.int32)
        plan = sampler.plan(unknown, gh * gw)
        return masked.decode_batch(
            build.make_predictor(model, params, grid_size),
            masked.Batch(tokens=tokens, **conditions, rngs=rngs, plan=plan),
            sampler.program(),
            mask_token_id=model.mask_token_id,
            grid_size=(gh, gw),
        )[0]

    def run(params, tokenizer_params, labels, rngs):
        tokens = draw(params, labels, rngs)
        codes = tokens.reshape(-1, gh, gw)
        images, finite = _decode_pixels(tokenizer, tokenizer_params, codes)
        return images, finite & jnp.all(tokens < model.mask_token_id, axis=1)

    return run
