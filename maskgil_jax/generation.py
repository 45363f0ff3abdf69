"""From labels to codes to pixels, batch by batch: the functions under `ImageGenerator`.

`generate` runs the decoding loop over batches, and `decode_images` turns codes into pixels. What
they compile is in `programs.py`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from maskgil_jax import sharding
from maskgil_jax.decoding import fusion, masked, prediction
from maskgil_jax.decoding.autoregressive import AutoregressiveConfig
from maskgil_jax.decoding.sampler import SamplerConfig
from maskgil_jax.models.base import TokenModelConfig
from maskgil_jax.models.conditioning import check_range
from maskgil_jax.pictures import to_uint8
from maskgil_jax.programs import (
    Draft,
    DraftProgram,
    make_decode_fn,
    make_draft_fn,
    make_generate_fn,
    make_step_fn,
)
from maskgil_jax.tokenizers.base import Tokenizer, TokenizerConfig, check_tokens

# `(step, tokens [b gh gw])`, after every step; masked tokens hold the mask token.
Callback = Callable[[int, np.ndarray], None]
# Classes [b], or float mixtures of classes [b, C+1].
Labels = Sequence[int] | np.ndarray
# More numbers of images than this would not fit what is folded into their keys.
MAX_IMAGES = 2**31
# Images that begin alike are decoded together at first if there are this many of a kind or more.
_IMAGES_PER_KIND = 4


def check_batch_size(batch_size: int) -> None:
    """Raise a `ValueError` unless at least one image is made at a time."""
    if not isinstance(batch_size, int | np.integer):
        raise ValueError(f"batch_size {batch_size!r} is no whole number")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")


def check_first_index(first_index: int, count: int) -> None:
    """Raise a `ValueError` unless so many images can be numbered from there on."""
    whole = isinstance(first_index, int | np.integer)
    if not (whole and 0 <= first_index <= MAX_IMAGES - count):
        raise ValueError(
            f"first_index {first_index} is out of range; allowed: 0 to {MAX_IMAGES - count}, for "
            f"{count} images"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What a generation made.

    Attributes:
        images: uint8 [b H W c]; `None` where only codes were asked for.
        tokens: int32 [b gh gw].
        trace: int32 [t b gh gw], the tokens after every step, masked ones as the mask token; or
            `None` if it was not asked for.
    """

    images: Any = None
    tokens: np.ndarray
    trace: np.ndarray | None = None


def generate(
    model: TokenModelConfig,
    params: Any,
    condition: Any,
    sampler: SamplerConfig | AutoregressiveConfig,
    *,
    draft: Draft | None = None,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    start: Int[np.ndarray, "b gh gw"] | None = None,
    null_condition: Any = None,
    grid_size: tuple[int, int] | None = None,
    first_index: int = 0,
    callback: Callback | None = None,
    return_trace: bool = False,
    batch_invariant: bool = False,
) -> Generation:
    """Generate one image per condition, or one grid of codes.

    Image i draws its randomness from `fold_in(seed, i)`, so in float32 on CPU the codes depend on
    the batch size or the number of devices only where rounding decides between nearly equal ones;
    with `batch_invariant` not even there. On a GPU or TPU that also needs
    `jax_default_matmul_precision="highest"` and deterministic operations.

    Args:
        model: architecture.
        params: its parameters.
        condition: classes 0…C-1 (C means "no condition"), or float mixtures [b, C+1]; of a text
            model a `Caption`.
        sampler: settings of the decoder; of a causal model an `AutoregressiveConfig`.
        draft: draws the first tokens of every image, from conditions in the same order; the model
            completes the rest.
        tokenizer: turns the codes into images, in the same program; codes only if `None`.
        seed: seed of all images.
        batch_size: images at a time, rounded up to a power of two and to a multiple of the mesh's
            data axes; fewer images are padded likewise.
        mesh: devices to use; all of them if `None`.
        start: codes to keep and, where to generate, the mask token; nothing is known if `None`.
        null_condition: what guidance leads away from, in the shape of `condition` (a negative
            prompt); the model's "no condition" if `None`.
        grid_size: (gh, gw); that of `start`, else the configured one, if `None`.
        first_index: number i of the first image, where this is part of a longer list.
        callback: called after every step of every batch, which then runs step by step; not for a
            causal model, which decodes in one program.
        return_trace: whether to return the tokens after every step too; not for a causal model.
        batch_invariant: whether every image is computed alone, which takes longer; `batch_size` is
            then how many go to the devices at a time.

    Raises:
        ValueError: if a condition, the seed or `first_index` is out of range, the batch size is not
            positive, `start` does not fit the conditions or the model, parameters are split over
            devices where `batch_invariant` needs them whole, or the model or the tokenizer gave no
            finite numbers.
        MemoryError: if the device's memory does not suffice, and the remedy is known.
    """
    condition, null_condition = _check_conditions(model, condition, null_condition)
    total = len(jax.tree.leaves(condition)[0])
    check_batch_size(batch_size)
    masked.check_seed(seed)
    check_first_index(first_index, total)
    gh, gw = grid_size or (model.grid_size if start is None else start.shape[1:])
    if draft is not None:
        draft = _check_draft(model, draft, total, gh * gw, start)
    draft, masked_sampler = _share_out(
        model, params, sampler, draft, (condition, null_condition), start, gh * gw
    )
    if masked_sampler is None and (callback is not None or return_trace):
        raise ValueError(
            "a causal model draws all tokens, or all are known at the start: there are no steps to "
            "call back after or to trace"
        )
    start = _check_start(model, start, total, (gh, gw))
    mesh = mesh or sharding.make_mesh({"data": -1})
    shards = sharding.batch_shards(mesh)
    size = padded_size(min(batch_size, max(total, 1)), shards)
    decoding = _Decoding(
        model=model,
        params=place(params, mesh),
        draft=draft and dataclasses.replace(draft, params=place(draft.params, mesh)),
        sampler=masked_sampler,
        tokenizer=tokenizer,
        tokenizer_params=None if tokenizer is None else place(dict(tokenizer.params), mesh),
        mesh=mesh,
        grid_size=(gh, gw),
        return_trace=return_trace,
        batch_invariant=batch_invariant,
    )
    if batch_invariant:
        draft_params = None if decoding.draft is None else decoding.draft.params
        for given in (decoding.params, decoding.tokenizer_params, draft_params):
            sharding.check_whole("batch_invariant", given, mesh)
    parts = []
    for first in range(0, total, size):
        count = min(size, total - first)
        take = functools.partial(_take_rows, first=first, count=count, size=size)
        tokens, some, nothing = jax.tree.map(take, (start, condition, null_condition))
        drafted = None
        if draft is not None:
            conditions = jax.tree.map(take, (draft.condition, draft.null_condition))
            drafted = fusion.Draft(
                condition=conditions[0], null_condition=conditions[1], plan=draft.sampler.plan()
            )
        apart = batch_invariant or draft is not None
        batch = masked.Batch(
            tokens=tokens,
            condition=some,
            null_condition=nothing,
            rngs=masked.image_keys(seed, first_index + np.arange(first, first + size)),
            plan=decoding.plan(tokens),
            shared=None if apart else find_shared(tokens, (some, nothing), shards),
        )
        parts.append(decoding.run((batch, drafted), count, first_index + first, callback))
    if not parts:
        return decoding.empty()
    return Generation(
        images=None if tokenizer is None else np.concatenate([part.images for part in parts]),
        tokens=np.concatenate([part.tokens for part in parts]),
        trace=np.concatenate([part.trace for part in parts], axis=1) if return_trace else None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Decoding:
    """What all batches of a generation have in common; its parameters lie on the mesh."""

    model: TokenModelConfig
    params: Any
    draft: Draft | None
    sampler: SamplerConfig | None
    tokenizer: Tokenizer | None
    tokenizer_params: Any
    mesh: Mesh
    grid_size: tuple[int, int]
    return_trace: bool
    batch_invariant: bool

    def plan(self, tokens: np.ndarray) -> Any:
        """Return the numbers of every step of the masked decoder; `None` if there is none."""
        if self.sampler is None:
            return None
        unknown = np.sum(tokens == self.model.mask_token_id, axis=1)
        if self.draft is not None:
            unknown = unknown - self.draft.count
        return self.sampler.plan(unknown, tokens.shape[1])

    def run(
        self,
        batch: tuple[masked.Batch, fusion.Draft | None],
        count: int,
        first_index: int,
        callback: Callback | None,
    ) -> Generation:
        """Return what the first `count` images of a batch become."""
        size = len(batch[0].tokens)
        with jax.set_mesh(self.mesh), self._explain_exhaustion(size):
            if callback is None:
                results = self._run_fused(batch, count)
            else:
                results = self._run_on_host(batch, count, callback)
            tokens, trace, pixels = jax.block_until_ready(results)
        made = np.asarray(tokens)[:count]
        if (unknown := (made == self.model.mask_token_id).any(1)).any():
            raise ValueError(
                f"the model gave no numbers (NaN) for image {first_index + int(unknown.argmax())}; "
                "its parameters are damaged, or too large for the type it computes in"
            )
        made = made.reshape(count, *self.grid_size)
        if trace is not None:
            trace = np.asarray(trace)[:, :count].reshape(-1, count, *self.grid_size)
        if self.tokenizer is None:
            return Generation(tokens=made, trace=trace)
        if pixels is None:
            at_once = 1 if self.batch_invariant else size
            images = np.asarray(self.tokenizer.decode(made, batch_size=at_once))
            finite = np.isfinite(images).all((1, 2, 3))
        else:
            images, finite = (np.asarray(x)[:count] for x in pixels)
        if not finite.all():
            raise ValueError(
                "the tokenizer gave no finite numbers for image "
                f"{first_index + int(finite.argmin())}; its parameters are damaged, or too large "
                "for the type it computes in"
            )
        if pixels is None:
            images = to_uint8(images)
        return Generation(images=images, tokens=made, trace=trace)

    def _draft_program(self) -> DraftProgram | None:
        if self.draft is None:
            return None
        return DraftProgram(
            model=self.draft.model, program=self.draft.sampler.program(), count=self.draft.count
        )

    def _run_fused(self, batch: tuple[masked.Batch, fusion.Draft | None], count: int):
        run = make_generate_fn(
            self.model,
            None if self.sampler is None else self.sampler.program(),
            self.mesh,
            self.grid_size,
            draft=self._draft_program(),
            tokenizer=self._decoder(),
            return_trace=self.return_trace,
            batch_invariant=self.batch_invariant,
        )
        params = self.params, None if self.draft is None else self.draft.params
        return run(params, self.tokenizer_params, batch, *self._wanted(count))

    def _run_on_host(
        self, given: tuple[masked.Batch, fusion.Draft | None], count: int, callback: Callback
    ):
        batch, drafted = given[0], self._draft_program()
        if drafted is not None and self.draft is not None:
            draw = make_draft_fn(
                self.model,
                drafted,
                self.mesh,
                self.grid_size,
                batch_invariant=self.batch_invariant,
            )
            tokens = draw(self.draft.params, given, *self._wanted(count))
            batch = dataclasses.replace(batch, tokens=tokens)
        assert self.sampler is not None, "a causal model has no callback"
        program, history = self.sampler.program(), []
        apart, state = masked.begins_apart(batch, program), masked.start_state(batch.tokens)
        for i in range(program.num_steps):
            first = i == 0 if apart else None
            step = make_step_fn(
                self.model,
                program,
                self.mesh,
                self.grid_size,
                first=first,
                batch_invariant=self.batch_invariant,
            )
            state = step(self.params, batch, i, state, *self._wanted(count))
            tokens = np.asarray(state.tokens)
            callback(i, tokens[:count].reshape(count, *self.grid_size))
            history.append(tokens)
        pixels, decoder = None, self._decoder()
        if decoder is not None:
            run = make_decode_fn(
                decoder, self.mesh, self.grid_size, batch_invariant=self.batch_invariant
            )
            pixels = run(self.tokenizer_params, state.tokens, *self._wanted(count))
        return tokens, np.stack(history) if self.return_trace else None, pixels

    def _wanted(self, count: int) -> tuple[int, ...]:
        """Return the last argument of a program that leaves padding out, if it is one."""
        return (count,) if self.batch_invariant else ()

    def _explain_exhaustion(self, batch_size: int) -> contextlib.AbstractContextManager[None]:
        if self.tokenizer is None:
            return contextlib.nullcontext()
        return self.tokenizer.explain_exhaustion("generate", batch_size, self.grid_size, batch_size)

    def _decoder(self) -> TokenizerConfig | None:
        """Return what decodes inside a program; tiles are put together on the host."""
        if self.tokenizer is None or self.tokenizer.needs_tiles(self.grid_size):
            return None
        return self.tokenizer.config

    def empty(self) -> Generation:
        """Return what no conditions become."""
        tokens, trace, images = np.zeros((0, *self.grid_size), np.int32), None, None
        if self.return_trace and self.sampler is not None:
            trace = np.zeros((self.sampler.num_steps, *tokens.shape), np.int32)
        if self.tokenizer is not None:
            images = decode_images(self.tokenizer, tokens)
        return Generation(images=images, tokens=tokens, trace=trace)


def _take_rows(x: np.ndarray, *, first: int, count: int, size: int) -> np.ndarray:
    """Return `count` rows, the last of them repeated until there are `size`."""
    return np.pad(x[first : first + count], [(0, size - count)] + [(0, 0)] * (x.ndim - 1), "edge")


def find_shared(tokens: np.ndarray, condition: Any, shards: int) -> prediction.Shared | None:
    """Return which images of a batch begin alike, if they are of few enough kinds.

    Args:
        tokens: [b l] before the first step.
        condition: of every image.
        shards: over how many devices the batch is split.

    Returns:
        a quarter as many rows as images, always: few shapes, few compilations. `None` if there are
        more kinds than that.
    """
    rows = len(tokens) // _IMAGES_PER_KIND
    if rows == 0 or rows % shards:
        return None
    parts = [np.asarray(part) for part in (tokens, *jax.tree.leaves(condition))]
    keys = [tuple(row.tobytes() for row in rows) for rows in zip(*parts, strict=True)]
    kinds = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    if len(kinds) > rows:
        return None
    groups = np.array([kinds[key] for key in keys], np.int32)
    firsts = np.unique(groups, return_index=True)[1]
    return prediction.Shared(
        rows=np.pad(firsts, (0, rows - len(firsts)), "edge").astype(np.int32), groups=groups
    )


def generate_tokens(*args: Any, **options: Any) -> Int[np.ndarray, "b gh gw"]:
    """Generate one grid of codes per condition; the arguments are those of `generate`."""
    return generate(*args, **options, tokenizer=None).tokens


def _check_conditions(
    model: TokenModelConfig, condition: Any, null_condition: Any
) -> tuple[Any, Any]:
    """Return both as NumPy arrays of the same shapes; the second may be `None`."""
    condition = model.check_condition(condition)
    if null_condition is None:
        return condition, None
    null_condition = model.check_condition(null_condition)
    shapes = [[x.shape for x in jax.tree.leaves(c)] for c in (condition, null_condition)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"null_condition has shapes {shapes[1]}; the condition has {shapes[0]}")
    return condition, null_condition


def _check_draft(
    model: TokenModelConfig, draft: Draft, total: int, seq_len: int, start: Any
) -> Draft:
    """Return the draft with checked conditions.

    Raises:
        ValueError: if its model is not causal or has other codes, its count or conditions do not
            fit, or tokens are known at the start.
    """
    if not draft.model.causal:
        raise ValueError(f"the draft's family {draft.model.family!r} is not causal")
    if draft.model.codebook_size != model.codebook_size:
        raise ValueError(
            f"the draft's model draws {draft.model.codebook_size} codes, but the model completes "
            f"{model.codebook_size}; both must share a tokenizer"
        )
    if not 1 <= draft.count <= seq_len:
        raise ValueError(f"draft count {draft.count} is out of range; allowed: 1 to {seq_len}")
    if start is not None:
        raise ValueError("a draft begins with no tokens known; leave out the start or the draft")
    condition, null = _check_conditions(draft.model, draft.condition, draft.null_condition)
    if (found := len(jax.tree.leaves(condition)[0])) != total:
        raise ValueError(f"the draft has {found} conditions for {total} images")
    return dataclasses.replace(draft, condition=condition, null_condition=null)


def _share_out(
    model: TokenModelConfig,
    params: Any,
    sampler: SamplerConfig | AutoregressiveConfig,
    draft: Draft | None,
    conditions: tuple[Any, Any],
    start: Any,
    seq_len: int,
) -> tuple[Draft | None, SamplerConfig | None]:
    """Return what is left to a causal model and to a masked one, `None` where nothing is.

    Raises:
        ValueError: if the sampler is none of the model's, or a causal model has a start or a draft.
    """
    if isinstance(sampler, AutoregressiveConfig) != model.causal:
        raise ValueError(
            f"a model of family {model.family!r} is not decoded by {type(sampler).__name__}"
        )
    if isinstance(sampler, SamplerConfig):
        unknown = seq_len - (0 if draft is None else draft.count)
        if start is not None and np.size(start):
            unknown = int(np.count_nonzero(np.asarray(start) == model.mask_token_id))
        return draft, sampler if unknown else None
    if start is not None or draft is not None:
        raise ValueError("a causal model draws all tokens; give it no start and no draft")
    condition, null = conditions
    whole = Draft(
        model=model,
        params=params,
        sampler=sampler,
        count=seq_len,
        condition=condition,
        null_condition=null,
    )
    return whole, None


def _check_start(
    model: TokenModelConfig, start: np.ndarray | None, count: int, grid_size: tuple[int, int]
) -> np.ndarray:
    if start is None:
        return np.full((count, grid_size[0] * grid_size[1]), model.mask_token_id, np.int32)
    start = np.asarray(start)
    if start.shape != (count, *grid_size):
        raise ValueError(
            f"start has shape {start.shape}; {count} images on a grid of {grid_size[0]}×"
            f"{grid_size[1]} tokens need {(count, *grid_size)}"
        )
    check_range("token", start, model.codebook_size + 1)
    return start.reshape(count, grid_size[0] * grid_size[1]).astype(np.int32)


def padded_size(count: int, parts: int) -> int:
    """Return the next power of two, made a multiple of `parts`: few sizes, few compilations."""
    return -(-(1 << (count - 1).bit_length()) // parts) * parts


def place(params: Any, mesh: Mesh) -> Any:
    """Put parameters on a mesh, whole on every device, unless they already lie on it."""

    def target(x: Any) -> Any:
        current = getattr(x, "sharding", None)
        if isinstance(current, jax.sharding.NamedSharding) and current.mesh == mesh:
            return current
        return sharding.replicated(mesh)

    return jax.device_put(params, jax.tree.map(target, params))


def decode_images(
    tokenizer: Tokenizer, tokens: Int[np.ndarray, "b gh gw"], *, batch_size: int = 64
) -> UInt8[np.ndarray, "b H W c"]:
    """Turn codes into uint8 images, clipped, never rescaled; `batch_size` at a time.

    Raises:
        ValueError: if the tokens do not fit the tokenizer, or the batch size is not positive.
    """
    check_tokens(tokens, tokenizer.spec)
    check_batch_size(batch_size)
    size = padded_size(max(1, min(batch_size, len(tokens))), 1)
    starts = range(0, max(len(tokens), 1), size)
    parts = [tokenizer.decode(tokens[start : start + size], batch_size=size) for start in starts]
    return np.concatenate([to_uint8(np.asarray(part)) for part in parts])
