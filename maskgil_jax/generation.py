"""From labels to codes to pixels, batch by batch: the functions under `ImageGenerator`.

`generate` runs the decoding loop over batches, `decode_images` turns codes into pixels, and
`make_image_fn` is both as one program, for export.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from maskgil_jax import loading, sharding
from maskgil_jax.build import models as build
from maskgil_jax.decoding import masked
from maskgil_jax.models.base import TokenModelConfig
from maskgil_jax.pictures import quantize, to_uint8
from maskgil_jax.tokenizers.base import Tokenizer, TokenizerConfig, check_tokens

# `(step, tokens [b gh gw])`, after every step; masked tokens hold the mask token.
Callback = Callable[[int, np.ndarray], None]
# Classes [b], or float mixtures of classes [b, C+1].
Labels = Sequence[int] | np.ndarray
_SUM_SLACK = 1e-3
# More numbers of images than this would not fit what is folded into their keys.
MAX_IMAGES = 2**31


def mix_labels(
    first: int, second: int, shares: Sequence[float] | np.ndarray, num_classes: int
) -> Float[np.ndarray, "b n"]:
    """Return mixtures of two classes, to be given as labels: an interpolation of conditions.

    Args:
        first: class 0…C-1, or C for "no condition".
        second: the other one.
        shares: of the second, one per image; 0 is the first class alone.
        num_classes: C, the model's.

    Returns:
        float32 [b, C+1], rows that sum to 1.

    Raises:
        ValueError: if a class is out of range.
    """
    loading.check_range("label", np.array([first, second]), num_classes + 1)
    eye = np.eye(num_classes + 1, dtype=np.float32)
    weights = np.asarray(shares, np.float32)[:, None]
    return (1 - weights) * eye[first] + weights * eye[second]


def check_labels(labels: Labels, num_classes: int) -> np.ndarray:
    """Return labels as int32 [b] or, if they are mixtures, float32 [b, C+1].

    Raises:
        ValueError: if one is out of range, or a mixture has another width or another sum than 1.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2:
        sums = labels.astype(np.float64).sum(-1)
        if labels.shape[1] != num_classes + 1 or not np.all(np.abs(sums - 1) < _SUM_SLACK):
            raise ValueError(
                f"mixtures of classes have shape {labels.shape} and sums from {sums.min():g} to "
                f"{sums.max():g}; give [b, {num_classes + 1}], the last column for no condition, "
                "and rows that sum to 1"
            )
        return labels.astype(np.float32)
    if labels.ndim != 1:
        raise ValueError(f"labels have shape {labels.shape}; give one class per image, [b]")
    if labels.size:
        loading.check_range("label", labels, num_classes + 1)
    return labels.astype(np.int32)


def check_batch_size(batch_size: int) -> None:
    """Raise a `ValueError` unless at least one image is made at a time."""
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")


@functools.lru_cache(maxsize=64)
def make_generate_fn(
    model: TokenModelConfig,
    sampler: masked.SamplerConfig,
    mesh: Mesh,
    grid_size: tuple[int, int] | None = None,
    return_trace: bool = False,
):
    """Return the jitted `(params, start [b l], labels, rngs [b]) → (tokens [b l], trace or None)`.

    The batch is split over the mesh's data axes; every process receives all tokens.
    """
    bind = _make_binder(model, sampler, mesh, grid_size)

    def run(params, start, labels, rngs):
        logits_fn, start, condition, null_condition = bind(params, start, labels)
        return masked.decode(
            logits_fn,
            start,
            condition,
            null_condition,
            rngs,
            sampler,
            mask_token_id=model.mask_token_id,
            grid_size=grid_size or model.grid_size,
            return_trace=return_trace,
        )

    return jax.jit(run, out_shardings=sharding.replicated(mesh))


@functools.lru_cache(maxsize=64)
def make_step_fn(
    model: TokenModelConfig,
    sampler: masked.SamplerConfig,
    mesh: Mesh,
    grid_size: tuple[int, int] | None = None,
):
    """Return the jitted `(params, start, labels, rngs, i, state) → state`, to loop on the host."""
    bind = _make_binder(model, sampler, mesh, grid_size)

    def run(params, start, labels, rngs, i, state):
        logits_fn, start, condition, null_condition = bind(params, start, labels)
        unknown = jnp.sum(start == model.mask_token_id, axis=1)
        step = masked.make_step(
            logits_fn,
            start,
            condition,
            null_condition,
            rngs,
            sampler.reveal_counts(unknown, start.shape[1]),
            sampler,
            mask_token_id=model.mask_token_id,
            grid_size=grid_size or model.grid_size,
        )
        return step(i, state)

    return jax.jit(run, out_shardings=sharding.replicated(mesh))


def _make_binder(
    model: TokenModelConfig,
    sampler: masked.SamplerConfig,
    mesh: Mesh,
    grid_size: tuple[int, int] | None,
):
    logits_fn, rows = build.logits_fn(model, grid_size), sharding.batch_sharding(mesh)

    def bind(params, start, labels):
        labels = jax.lax.with_sharding_constraint(labels, rows)
        start = jax.lax.with_sharding_constraint(start, rows)
        return functools.partial(logits_fn, params), start, labels, _null_labels(model, labels)

    return bind


def _null_labels(model: TokenModelConfig, labels: jax.Array) -> jax.Array:
    if labels.ndim == 2:
        return jnp.zeros_like(labels).at[:, -1].set(1)
    return jnp.full_like(labels, model.null_label)


def make_image_fn(
    model: TokenModelConfig,
    tokenizer: TokenizerConfig,
    sampler: masked.SamplerConfig,
    grid_size: tuple[int, int] | None = None,
) -> Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Return labels to pixels as one pure function, to be jitted or exported as one program.

    Args:
        model: architecture of the model.
        tokenizer: architecture of the tokenizer.
        sampler: settings of the decoder.
        grid_size: (gh, gw); the configured one if `None`.

    Returns:
        `(params, tokenizer_params, labels [b], rngs [b]) → (images, finite)`. Of the tokenizer's
        parameters those of its decoder suffice. The images are uint8 [b H W c], those of
        `decode_images`; `finite` [b] is false where logits or pixels were no finite numbers,
        which `generate` and `decode_images` refuse.
    """
    logits_fn = build.logits_fn(model, grid_size)
    gh, gw = grid_size or model.grid_size
    decoder: Any = tokenizer.make_module()

    def run(params, tokenizer_params, labels, rngs):
        tokens, _ = masked.decode(
            functools.partial(logits_fn, params),
            jnp.full((labels.shape[0], gh * gw), model.mask_token_id, jnp.int32),
            labels,
            _null_labels(model, labels),
            rngs,
            sampler,
            mask_token_id=model.mask_token_id,
            grid_size=(gh, gw),
        )
        codes = tokens.reshape(-1, gh, gw)
        pixels = decoder.apply({"params": tokenizer_params}, codes, method="decode")
        finite = jnp.all(jnp.isfinite(pixels), axis=(1, 2, 3))
        decided = jnp.all(tokens < model.mask_token_id, axis=1)
        return quantize(pixels), finite & decided

    return run


def generate(
    model: TokenModelConfig,
    params: Any,
    labels: Labels,
    sampler: masked.SamplerConfig,
    *,
    seed: int = 0,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    start: Int[np.ndarray, "b gh gw"] | None = None,
    grid_size: tuple[int, int] | None = None,
    first_index: int = 0,
    callback: Callback | None = None,
    return_trace: bool = False,
) -> tuple[Int[np.ndarray, "b gh gw"], Int[np.ndarray, "t b gh gw"] | None]:
    """Generate one grid of codes per label.

    Image i draws its randomness from `fold_in(seed, i)`, so in float32 on CPU the codes depend on
    the batch size or the number of devices only where rounding decides between nearly equal ones.
    On a GPU or TPU that also needs `jax_default_matmul_precision="highest"` and deterministic
    operations.

    Args:
        model: architecture.
        params: its parameters.
        labels: classes 0…C-1 (C means "no condition"), or float mixtures [b, C+1].
        sampler: settings of the decoder.
        seed: seed of all images.
        batch_size: images at a time, rounded up to a power of two and to a multiple of the mesh's
            data axes; fewer images are padded likewise.
        mesh: devices to use; all of them if `None`.
        start: codes to keep and, where to generate, the mask token; nothing is known if `None`.
        grid_size: (gh, gw); that of `start`, else the configured one, if `None`.
        first_index: number i of the first image, where this is part of a longer list.
        callback: called after every step of every batch, which then runs step by step.
        return_trace: whether to return the tokens after every step too.

    Returns:
        the codes, and the trace or `None`.

    Raises:
        ValueError: if a label, the seed or `first_index` is out of range, the batch size is not
            positive, or `start` does not fit the labels or the model.
    """
    labels = check_labels(labels, model.num_classes)
    check_batch_size(batch_size)
    if not 0 <= first_index <= MAX_IMAGES - len(labels):
        raise ValueError(
            f"first_index {first_index} is out of range; allowed: 0 to "
            f"{MAX_IMAGES - len(labels)}, for {len(labels)} images"
        )
    grid_size = tuple(grid_size or (model.grid_size if start is None else start.shape[1:]))
    start = _check_start(model, start, len(labels), grid_size)
    mesh = mesh or sharding.make_mesh({"data": -1})
    size = padded_size(min(batch_size, max(len(labels), 1)), sharding.batch_shards(mesh))
    params, tokens, traces = place(params, mesh), [], []
    for first in range(0, len(labels), size):
        count = min(size, len(labels) - first)
        inputs = [
            np.pad(x[first : first + count], [(0, size - count)] + [(0, 0)] * (x.ndim - 1), "edge")
            for x in (start, labels)
        ]
        rngs = masked.image_keys(seed, first_index + np.arange(first, first + size))
        with jax.set_mesh(mesh):
            if callback is None:
                run = make_generate_fn(model, sampler, mesh, grid_size, return_trace)
                codes, trace = run(params, *inputs, rngs)
                history = trace.tokens if trace is not None else None
            else:
                step = make_step_fn(model, sampler, mesh, grid_size)
                steps = _run_on_host(
                    functools.partial(step, params, *inputs, rngs), inputs[0], sampler.num_steps
                )
                history = []
                for i, codes in enumerate(steps):
                    callback(i, np.asarray(codes)[:count].reshape(count, *grid_size))
                    history.append(np.asarray(codes))
                history = np.stack(history)
        made = np.asarray(codes)[:count]
        if (unknown := (made == model.mask_token_id).any(1)).any():
            index = first_index + first + int(unknown.argmax())
            raise ValueError(
                f"the model gave no numbers (NaN) for image {index}; its parameters are damaged, "
                "or too large for the type it computes in"
            )
        tokens.append(made.reshape(count, *grid_size))
        if return_trace:
            traces.append(np.asarray(history)[:, :count].reshape(-1, count, *grid_size))
    if not tokens:
        tokens = [np.zeros((0, *grid_size), np.int32)]
        traces = [np.zeros((sampler.num_steps, 0, *grid_size), np.int32)]
    return np.concatenate(tokens), np.concatenate(traces, axis=1) if return_trace else None


def generate_tokens(*args: Any, **options: Any) -> Int[np.ndarray, "b gh gw"]:
    """Generate one grid of codes per label; the arguments are those of `generate`."""
    return generate(*args, **options)[0]


def _run_on_host(step: Callable, start: np.ndarray, num_steps: int):
    state = masked.start_state(jnp.asarray(start))
    for i in range(num_steps):
        state = step(i, state)
        yield state.tokens


def _check_start(
    model: TokenModelConfig, start: np.ndarray | None, count: int, grid_size: tuple[int, int]
) -> np.ndarray:
    if start is None:
        return np.full((count, grid_size[0] * grid_size[1]), model.mask_token_id, np.int32)
    start = np.asarray(start)
    if start.shape != (count, *grid_size):
        raise ValueError(
            f"start has shape {start.shape}; {count} labels on a grid of {grid_size[0]}×"
            f"{grid_size[1]} tokens need {(count, *grid_size)}"
        )
    loading.check_range("token", start, model.codebook_size + 1)
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
