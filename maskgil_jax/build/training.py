"""From a validated configuration to datasets, steps and states."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maskgil_jax import sharding
from maskgil_jax.build import models as build
from maskgil_jax.data import transforms
from maskgil_jax.data.arrays import ArraySource
from maskgil_jax.data.digits import DigitsSource
from maskgil_jax.data.folder import ImageFolderSource
from maskgil_jax.data.pipeline import Source, make_loader
from maskgil_jax.masking import check_choice
from maskgil_jax.tokenizers.base import Tokenizer
from maskgil_jax.tokenizers.losses import TokenizerLossWeights, tokenizer_loss
from maskgil_jax.training import steps
from maskgil_jax.training.loop import LoopConfig
from maskgil_jax.training.optimizer import OptimizerConfig, find_matrices, make_optimizer, make_rate

KINDS = ("maskgil", "tokenizer")
DATASETS = ("digits", "folder", "tfds")
TOKENIZER_METRICS = ("loss", "reconstruction", "codebook", "commitment", "perplexity", "usage")


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


def loop_config(config: ConfigDict) -> LoopConfig:
    """Return lengths and intervals of the run, validated."""
    return LoopConfig(
        num_steps=config.training.num_steps,
        batch_size=config.training.batch_size,
        log_every=config.logging.every,
        checkpoint_every=config.logging.checkpoint_every,
        sample_every=config.logging.sample_every,
    )


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
    """Return the optimiser section, validated."""
    return OptimizerConfig(**config.optimizer.to_dict())


def loss_config(config: ConfigDict) -> steps.MaskedLossConfig:
    """Return the masked loss of the training section, validated."""
    training = config.training
    return steps.MaskedLossConfig(
        mask_token_id=config.model.codebook_size,
        null_label=config.model.num_classes,
        loss_tokens=training.loss_tokens,
        label_smoothing=training.label_smoothing,
        condition_dropout=training.condition_dropout,
        mask_schedule=training.mask_schedule,
        mask_draw=training.mask_draw,
    )


def validate(config: ConfigDict) -> None:
    """Build every settings object once, so that a wrong value is known before work begins.

    Raises:
        ValueError: naming the value and what is allowed.
    """
    check_choice("kind", config.kind, KINDS)
    check_choice("data.name", config.data.name, DATASETS)
    check_choice("report.name", config.report.name, ("none", "digits"))
    training = config.training
    loop_config(config)
    make_optimizer(optimizer_config(config), training.num_steps)
    if not 0 <= training.ema_decay < 1:
        raise ValueError(f"training.ema_decay {training.ema_decay} is not in [0, 1)")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed {config.seed} is out of range; allowed: 0 to {2**32 - 1}")
    _check_at_least(config, _LEAST)
    transform = image_transform(config)
    if config.report.name == "digits" and config.data.name != "digits":
        raise ValueError(f"report.name 'digits' needs data.name 'digits', not {config.data.name!r}")
    if config.kind == "tokenizer":
        vq = build.tokenizer_config(config)
        vq.spec.grid_size(*config.data.image_size)
        if vq.spec.image_channels != 3:
            raise ValueError(
                f"vq.image_channels {vq.spec.image_channels}: the datasets give 3 (RGB)"
            )
        if config.data.cache_tokens:
            raise ValueError("data.cache_tokens is for kind 'maskgil': a tokenizer needs images")
        TokenizerLossWeights(**config.vq_loss.to_dict())
    else:
        model = build.model_config(config)
        if model.attention == "cudnn" and jax.default_backend() != "gpu":
            raise ValueError("model.attention 'cudnn' needs a GPU; use 'xla'")
        build.sampler_config(config)
        loss_config(config)
        _check_cache(config, transform)


_LEAST = {
    "data.cache_copies": 1,
    "data.num_threads": 0,
    "data.prefetch": 1,
    "data.max_bad_images": 0,
    "logging.keep_checkpoints": 1,
    "report.batch_size": 1,
    "report.num_samples": 4,
    "tokenizer.batch_size": 1,
    "training.accumulation_steps": 1,
}


def _check_at_least(config: ConfigDict, least: Mapping[str, int]) -> None:
    for name, minimum in least.items():
        section, field = name.split(".")
        if config[section][field] < minimum:
            raise ValueError(f"{name} {config[section][field]} must be at least {minimum}")


def _check_cache(config: ConfigDict, transform: transforms.Chain) -> None:
    cached, copies = config.data.cache_tokens, config.data.cache_copies
    if copies > 1 and not cached:
        raise ValueError(f"data.cache_copies {copies} needs data.cache_tokens true")
    if cached and copies == 1 and len(transform.transforms) > 2:
        raise ValueError("data.cache_copies 1 would freeze one augmentation; use more copies")


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Raise a `ValueError` unless batches, and their parts, split evenly over the devices."""
    size, parts = config.training.batch_size, config.training.accumulation_steps
    if parts < 1 or size % parts:
        raise ValueError(
            f"training.batch_size {size} is not divisible by training.accumulation_steps {parts}"
        )
    name = "training.batch_size" + (f" {size} / accumulation_steps {parts} =" if parts > 1 else "")
    sharding.check_batch_size(name, size // parts, mesh)
    tensor, local = mesh.shape["tensor"], jax.local_device_count()
    if jax.process_count() > 1 and local % tensor:
        # Processes that share a tensor group would each bring other images for the same rows.
        raise ValueError(
            f"mesh.tensor {tensor} must divide the {local} devices of each process; split over "
            "processes with mesh.data or mesh.fsdp"
        )


def make_source(config: ConfigDict) -> Source:
    """Open the dataset.

    Raises:
        ValueError: if it is missing, empty or unreadable.
    """
    data = config.data
    if data.name == "digits":
        return DigitsSource(data.split)
    if not data.path:
        raise ValueError(f"data.path is empty; data.name {data.name!r} needs the dataset's folder")
    if data.name == "folder":
        return ImageFolderSource(data.path, data.split, max_bad_images=data.max_bad_images)
    # array_record, which it reads with, has no wheels outside Linux.
    from maskgil_jax.data.tfds import TFDSSource

    return TFDSSource(data.tfds_name, data.split, data.path, max_bad_images=data.max_bad_images)


def image_transform(config: ConfigDict) -> transforms.Chain:
    """Return crop, augmentation and scaling to [-1, 1] of one record."""
    data = config.data
    height, width = data.image_size
    if height != width:
        raise ValueError(f"data.image_size {(height, width)} must be square: images are cropped so")
    parts: list[transforms.Transform] = [transforms.CenterCrop(size=height)]
    affine = transforms.RandomAffine(
        max_shift_px=data.shift_px,
        max_rotation_deg=data.rotation_deg,
        scale_range=tuple(data.scale_range),
    )
    if affine != transforms.RandomAffine():
        parts.append(affine)
    if data.flip:
        parts.append(transforms.RandomFlip())
    return transforms.Chain(transforms=(*parts, transforms.ToFloat()))


def make_batches(config: ConfigDict, source: Source, transform: Any) -> Any:
    """Return the resumable iterator over this process's rows of every batch."""
    data = config.data
    return make_loader(
        source,
        batch_size=config.training.batch_size,
        seed=config.seed,
        transform=transform,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=data.num_threads,
        prefetch=max(data.num_threads, data.prefetch, 1),
    )


def cache_tokens(config: ConfigDict, source: Source, tokenizer: Tokenizer) -> ArraySource:
    """Encode a whole dataset into memory, `data.cache_copies` augmented copies of every image.

    Copy c of image i draws its augmentation from the generator seeded with (seed, c, i). Every
    process encodes all of it, so this is for data that is small.
    """
    copies, transform = config.data.cache_copies, image_transform(config)
    size = config.tokenizer.batch_size
    tokens: list[np.ndarray] = []
    labels: list[int] = []
    pairs = [(copy, index) for copy in range(copies) for index in range(len(source))]
    for start in range(0, len(pairs), size):
        records = [
            transform(source[index], np.random.default_rng((config.seed, copy, index)))
            for copy, index in pairs[start : start + size]
        ]
        # What a bicubic resize overshoots has been clipped by the conversion to uint8.
        images = np.stack([record["image"] for record in records])
        tokens.append(np.asarray(tokenizer.encode(images, batch_size=size)))
        labels.extend(int(record["label"]) for record in records)
    arrays = {"tokens": np.concatenate(tokens), "label": np.asarray(labels, np.int32)}
    return ArraySource(arrays, name=f"{source.name} tokens", num_classes=config.model.num_classes)


def make_encoder(tokenizer: Tokenizer, mesh: Mesh) -> Callable[[Any], Any]:
    """Return the jitted map from image batches to token batches, split over the mesh."""
    params = jax.device_put(tokenizer.params, sharding.replicated(mesh))

    @functools.partial(jax.jit, out_shardings=sharding.batch_sharding(mesh))
    def encode(params, images):
        return tokenizer.module.apply({"params": params}, images, method="encode")

    return lambda batch: {
        "tokens": encode(params, batch["image"]),
        "label": batch["label"],
    }


def make_maskgil_task(config: ConfigDict, mesh: Mesh) -> Task:
    """Return the task of training a MaskGIL on token batches."""
    model, loss = build.model_config(config), loss_config(config)
    loss_fn = steps.make_masked_loss(build.training_apply(model), loss)

    def prepare(batch, rng):
        return steps.corrupt_batch(batch, rng, loss)

    return _make_task(config, mesh, build.init_model(model), loss_fn, prepare, steps.MASKED_METRICS)


def make_tokenizer_task(config: ConfigDict, mesh: Mesh) -> Task:
    """Return the task of training a tokenizer on image batches."""
    vq, weights = build.tokenizer_config(config), TokenizerLossWeights(**config.vq_loss.to_dict())
    module, (height, width) = vq.make_module(), config.data.image_size
    vq.spec.grid_size(height, width)

    def init(rng):
        return module.init(rng, jnp.zeros((1, height, width, vq.spec.image_channels)))["params"]

    def loss_fn(params, batch, rng):
        images = batch["image"]
        outputs: Any = module.apply({"params": params}, images, train=True, rngs={"dropout": rng})
        loss, values = tokenizer_loss(outputs, images, weights)
        values = {name: jnp.asarray(value) for name, value in values.items()}
        return steps.Summed(loss=loss, weight=jnp.ones(()), sums={}, means=values)

    names = TOKENIZER_METRICS + (("entropy",) if weights.entropy else ())
    return _make_task(
        config, mesh, init, loss_fn, lambda batch, _: batch, (*names, "grad_norm", "param_norm")
    )


def _make_task(config, mesh, init_params, loss_fn, prepare, metric_names) -> Task:
    training = config.training
    optimizer = make_optimizer(optimizer_config(config), training.num_steps, find_matrices)

    def create():
        params = init_params(jax.random.key(config.seed))
        return steps.create_state(params, optimizer, ema=training.ema_decay > 0)

    boxed = jax.eval_shape(create)
    shardings = sharding.state_shardings(boxed, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings
    )
    step = steps.make_train_step(
        loss_fn,
        prepare,
        optimizer,
        seed=config.seed,
        ema_decay=training.ema_decay,
        accumulation_steps=training.accumulation_steps,
    )
    everywhere = sharding.replicated(mesh)

    def sharded_step(*args):
        with nn.logical_axis_rules(sharding.RULES):
            return step(*args)

    return Task(
        step=jax.jit(
            sharded_step,
            in_shardings=(shardings, everywhere, sharding.batch_sharding(mesh)),
            out_shardings=(shardings, everywhere),
            donate_argnums=(0, 1),
        ),
        init=jax.jit(lambda: nn.unbox(create()), out_shardings=shardings),
        abstract=abstract,
        metric_names=metric_names,
    )


def rate_schedule(config: ConfigDict) -> optax.Schedule:
    """Return the learning rate as a function of the step."""
    return make_rate(optimizer_config(config), config.training.num_steps)
