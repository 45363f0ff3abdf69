"""What is seen and measured of a run: grids of pictures on the way, figures at the end.

Calls on generation, embedded data and `evals/`; `train.py` says when.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maskgil_jax import generation, pictures
from maskgil_jax.build import captions as build_captions
from maskgil_jax.build import data as build_data
from maskgil_jax.build import models as build_models
from maskgil_jax.build.sizes import bucket_sizes
from maskgil_jax.data.buckets import Size
from maskgil_jax.data.canvas_captions import KINDS, heldout_prompts
from maskgil_jax.data.canvases import COLOURS, SIZES, CanvasSource, Scene
from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.data.transforms import PickCaption, to_float
from maskgil_jax.evals import textures
from maskgil_jax.evals.canvas_checker import canvas_geneval_report
from maskgil_jax.evals.canvases import canvases_report, cut_digit
from maskgil_jax.evals.digits import digits_report
from maskgil_jax.text.base import TextEncoder
from maskgil_jax.tokenizers.base import Tokenizer
from maskgil_jax.tokenizers.losses import codebook_usage

GRID_ROWS = 8
_EXAMPLES = 8  # captions of a dataset that samples are drawn for
READER_CANVASES = 2000  # training canvases that the reader of digits is fitted on
REBUILT_CANVASES = 700  # of these, that it sees as a tokenizer rebuilds them, too


def draw_grid(
    config: ConfigDict,
    mesh: Mesh,
    tokenizer: Tokenizer | None,
    state: Any,
    captions: Any = None,
) -> np.ndarray:
    """Return samples, one class or caption a column; of a tokenizer, images and reconstructions.

    Args:
        config: of the run.
        mesh: devices to generate on.
        tokenizer: of a model's tokens; `None` if a tokenizer was trained.
        state: the training state.
        captions: a `Caption` of what to show, of a run that learns from captions.
    """
    if captions is not None and tokenizer is not None:
        rows = jax.tree.map(lambda x: np.concatenate([x] * GRID_ROWS), captions)
        images = _generate(config, mesh, tokenizer, state, rows)
        return pictures.make_grid(images, columns=len(captions.lengths))
    if tokenizer is not None:
        columns = min(config.model.num_classes, 10)
        labels = np.tile(np.arange(columns), GRID_ROWS)
        images = _generate(config, mesh, tokenizer, state, labels)
        return pictures.make_grid(images, columns=columns)
    images = _example_images(config)[:16]
    trained = Tokenizer(config=build_models.tokenizer_config(config), params=_local(state))
    rebuilt = pictures.to_uint8(np.asarray(trained.decode(trained.encode(images))))
    both = np.concatenate([pictures.to_uint8(images), rebuilt])
    return pictures.make_grid(both, columns=len(images))


def measure(
    config: ConfigDict,
    mesh: Mesh,
    tokenizer: Tokenizer | None,
    state: Any,
    encoder: TextEncoder | None = None,
) -> dict[str, Any]:
    """Return the figures that `config.report.name` asks for, and the number of updates.

    Args:
        config: of the run.
        mesh: devices to generate on.
        tokenizer: of a model's tokens; `None` if a tokenizer was trained.
        state: the training state.
        encoder: of the prompts, for a model that reads its features.
    """
    steps = {"steps": config.training.num_steps}
    if config.report.name == "none":
        return steps
    if tokenizer is not None and config.report.name == "captioned_canvases":
        return steps | _measure_captioned(config, mesh, tokenizer, state, encoder)
    if tokenizer is not None:
        return steps | _measure_samples(config, mesh, tokenizer, state)
    trained = Tokenizer(config=build_models.tokenizer_config(config), params=_local(state))
    if config.report.name == "canvases":
        return steps | _measure_canvases(config, trained)
    return steps | _measure_digits(config, trained)


def _measure_samples(
    config: ConfigDict, mesh: Mesh, tokenizer: Tokenizer, state: Any
) -> dict[str, float]:
    labels = np.arange(config.report.num_samples) % config.model.num_classes
    images = _generate(config, mesh, tokenizer, state, labels)
    measured = digits_report(
        images, labels, train=digits_arrays("train"), heldout=digits_arrays("test")
    )
    return {name: round(value, 4) for name, value in measured.items()}


def _measure_captioned(
    config: ConfigDict,
    mesh: Mesh,
    tokenizer: Tokenizer,
    state: Any,
    encoder: TextEncoder | None,
) -> dict[str, float]:
    """Draw what held-out captions say, in every bucket, and count what shows it: GenEval's columns.

    Of every kind there are a sixth of `report.num_samples` prompts.
    """
    sizes = bucket_sizes(config)
    each = -(-config.report.num_samples // len(KINDS))
    asked = [pair for kind in KINDS for pair in heldout_prompts(kind, each, config.seed)]
    model = build_models.text_model_config(config)
    images: list[np.ndarray] = []
    expectations = []
    for place, size in enumerate(sizes):
        some = asked[place :: len(sizes)]
        captions = build_models.read_prompts(model, [prompt for prompt, _ in some], encoder)
        images += list(
            _generate(config, mesh, tokenizer, state, captions, size, first_index=len(images))
        )
        expectations += [expectation for _, expectation in some]
    train = known_digits(tokenizer)
    measured = canvas_geneval_report(images, expectations, palette=COLOURS, train=train)
    return {name: round(value, 4) for name, value in measured.items()}


def _measure_digits(config: ConfigDict, trained: Tokenizer) -> dict[str, float]:
    """Rebuild the held-out digits; usage is that of the training digits."""
    images = _example_images(config)
    tokens = trained.encode(images, batch_size=64)
    rebuilt = np.clip(np.asarray(trained.decode(tokens, batch_size=64)), -1, 1)
    mse = float(np.mean((rebuilt - images) ** 2))
    train_images = to_float(digits_arrays("train")[0])
    usage = codebook_usage(trained.encode(train_images, batch_size=64), trained.spec.codebook_size)
    return {
        "mse": mse,
        "psnr_db": float(10 * np.log10(4 / mse)),
        "usage": float(usage),
        "high_frequency_ratio": textures.high_frequency_ratio(rebuilt, images),
        "patch_frechet": textures.patch_frechet(rebuilt, images),
    }


def _measure_canvases(config: ConfigDict, trained: Tokenizer) -> dict[str, float]:
    """Rebuild `report.num_samples` held-out canvases, as many of each size, and compare."""
    per_size = -(-config.report.num_samples // len(SIZES))
    errors: dict[str, float] = {}
    counts = np.zeros(trained.spec.codebook_size, int)
    originals: list[tuple[np.ndarray, Scene]] = []
    rebuilt: list[tuple[np.ndarray, Scene]] = []
    for size in SIZES:
        drawn = [CanvasSource("test", size).draw(index) for index in range(per_size)]
        images = to_float(np.stack([image for image, _ in drawn]))
        tokens = trained.encode(images, batch_size=config.report.batch_size)
        decoded = np.asarray(trained.decode(tokens, batch_size=config.report.batch_size))
        errors["{}x{}".format(*size)] = float(np.mean((decoded.clip(-1, 1) - images) ** 2))
        counts += np.bincount(np.asarray(tokens).ravel(), minlength=len(counts))
        originals += drawn
        scenes = [scene for _, scene in drawn]
        rebuilt += zip(pictures.to_uint8(decoded), scenes, strict=True)
    mse = sum(errors.values()) / len(errors)
    measured = {
        "mse": mse,
        "psnr_db": 10 * np.log10(4 / mse),
        **{f"psnr_db_{name}": 10 * np.log10(4 / error) for name, error in errors.items()},
        "usage": np.mean(counts > 0),
        **_read_canvases(originals, rebuilt),
    }
    return {name: round(float(value), 5) for name, value in measured.items()}


def _read_canvases(
    originals: list[tuple[np.ndarray, Scene]], rebuilt: list[tuple[np.ndarray, Scene]]
) -> dict[str, float]:
    """Compare the digits that the scenes name, read by what is learnt from training canvases."""
    objects = [o for _, scene in originals for o in scene.objects]
    return canvases_report(
        _cut(rebuilt),
        _cut(originals),
        np.array([o.digit for o in objects]),
        np.array([tuple(COLOURS).index(o.colour) for o in objects]),
        palette=np.array(list(COLOURS.values())),
        train=known_digits(),
    )


def _cut(canvases: list[tuple[np.ndarray, Scene]]) -> np.ndarray:
    return np.stack([cut_digit(image, o.box) for image, scene in canvases for o in scene.objects])


def known_digits(tokenizer: Tokenizer | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return what a reader of digits is fitted on: crops of training canvases, and their digits.

    Args:
        tokenizer: some of the canvases are there as it rebuilds them too, if there is one, so that
            the reader knows its blur.
    """
    source = CanvasSource("train")
    canvases = [source.draw(index) for index in range(READER_CANVASES)]
    if tokenizer is not None:
        first = canvases[:REBUILT_CANVASES]
        scenes = [scene for _, scene in first]
        canvases += list(zip(rebuild_canvases(first, tokenizer), scenes, strict=True))
    return _cut(canvases), np.array([o.digit for _, scene in canvases for o in scene.objects])


def rebuild_canvases(
    canvases: Sequence[tuple[np.ndarray, Scene]], tokenizer: Tokenizer, batch_size: int = 16
) -> list[np.ndarray]:
    """Return the images as a tokenizer rebuilds them, in their order."""
    by_size: dict[Size, list[int]] = {}
    for index, (_, scene) in enumerate(canvases):
        by_size.setdefault(scene.size, []).append(index)
    rebuilt: dict[int, np.ndarray] = {}
    for indices in by_size.values():
        images = to_float(np.stack([canvases[index][0] for index in indices]))
        tokens = tokenizer.encode(images, batch_size=batch_size)
        decoded = pictures.to_uint8(np.asarray(tokenizer.decode(tokens, batch_size=batch_size)))
        rebuilt |= dict(zip(indices, decoded, strict=True))
    return [rebuilt[index] for index in range(len(canvases))]


def _generate(
    config: ConfigDict,
    mesh: Mesh,
    tokenizer: Tokenizer,
    state: Any,
    condition: Any,
    size: Size | None = None,
    first_index: int = 0,
) -> np.ndarray:
    tokens = generation.generate_tokens(
        build_models.model_config(config),
        _inference_params(state),
        condition,
        build_models.sampler_config(config),
        grid_size=None if size is None else tokenizer.spec.grid_size(*size),
        seed=config.seed,
        first_index=first_index,
        batch_size=config.report.batch_size,
        mesh=mesh,
    )
    return generation.decode_images(tokenizer, tokens)


def example_captions(
    config: ConfigDict, sources: Mapping[Size, Any], encoder: TextEncoder | None
) -> Any:
    """Return a `Caption` to show while a run learns: held-out ones of canvases, else the first.

    Args:
        config: of the run.
        sources: its datasets; there is nothing to show if it does not learn from captions.
        encoder: of the captions, for a model that reads features which are not stored.
    """
    if not build_captions.is_captioned(config):
        return None
    rng = np.random.default_rng(config.seed)
    if build_captions.find_stored_features(config, sources) is not None:
        return build_captions.read_stored(config, _first_records(sources), rng)
    model = build_models.text_model_config(config)
    if config.data.name == "canvases":
        prompts = [heldout_prompts(kind, 1, config.seed)[0][0] for kind in KINDS]
    else:
        prompts = [PickCaption()(record, rng)["caption"] for record in _first_records(sources)]
    found = build_models.read_prompts(model, prompts, encoder, cut=True)
    return jax.tree.map(np.asarray, found)


def _first_records(sources: Mapping[Size, Any]) -> list[dict[str, Any]]:
    source = next(iter(sources.values()))
    return [source[index] for index in range(min(len(source), _EXAMPLES))]


def _inference_params(state: Any) -> Any:
    return state.params if state.ema is None else state.ema


def _local(state: Any) -> Any:
    """Return the parameters as NumPy arrays, gathered from all processes."""
    return multihost_utils.process_allgather(_inference_params(state), tiled=True)


def _example_images(config: ConfigDict) -> np.ndarray:
    """Return images to reconstruct: held-out ones of digits and canvases, else the first."""
    if config.data.name == "digits":
        return to_float(digits_arrays("test")[0])
    if config.data.name == "canvases":
        source: Any = CanvasSource("test", tuple(config.data.image_size))
    else:
        source = build_data.make_source(config)
    transform = build_data.image_transform(config)
    count = min(len(source), 64)
    rng = np.random.default_rng(config.seed)
    return np.stack([transform(source[i], rng)["image"] for i in range(count)])
