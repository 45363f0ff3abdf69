"""The settings of a run, checked together, and the training of a model on tokens."""

from collections.abc import Mapping

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maskgil_jax import config as schema
from maskgil_jax import sharding
from maskgil_jax.build import captions, data, models, tasks, tokenizers
from maskgil_jax.masking import check_choice
from maskgil_jax.training import steps
from maskgil_jax.training.loop import LoopConfig

KINDS = ("maskgil", "tokenizer")
# Each needs the dataset of its name, the last one with captions.
REPORTS = ("none", "digits", "canvases", "captioned_canvases")


def loop_config(config: ConfigDict) -> LoopConfig:
    """Return lengths and intervals of the run, validated."""
    return LoopConfig(
        num_steps=config.training.num_steps,
        batch_size=config.training.batch_size,
        log_every=config.logging.every,
        checkpoint_every=config.logging.checkpoint_every,
        sample_every=config.logging.sample_every,
        evaluate_every=config.evaluation.every_steps,
    )


def loss_config(config: ConfigDict) -> steps.MaskedLossConfig:
    """Return the masked loss of the training section, validated."""
    training = config.training
    return steps.MaskedLossConfig(
        mask_token_id=config.model.codebook_size,
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
    check_choice("data.name", config.data.name, data.DATASETS)
    check_choice("report.name", config.report.name, REPORTS)
    training = config.training
    _check_at_least(config, _LEAST)
    loop_config(config)
    tasks.make_optimizer(config)
    if not 0 <= training.ema_decay < 1:
        raise ValueError(f"training.ema_decay {training.ema_decay} is not in [0, 1)")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed {config.seed} is out of range; allowed: 0 to {2**32 - 1}")
    data.check_token_settings(config)
    captions.check_settings(config)
    transform = data.image_transform(config)
    report = config.report.name
    if report not in ("none", config.data.name, f"captioned_{config.data.name}"):
        needed = report.removeprefix("captioned_")
        raise ValueError(
            f"report.name {report!r} needs data.name {needed!r}, not {config.data.name!r}"
        )
    if report == "canvases" and config.kind != "tokenizer":
        raise ValueError("report.name 'canvases' is for kind 'tokenizer'; use 'none'")
    if report == "captioned_canvases" and not captions.is_captioned(config):
        raise ValueError(
            "report.name 'captioned_canvases' is for model.family "
            f"{' or '.join(map(repr, captions.FAMILIES))}; use 'none'"
        )
    if config.kind == "tokenizer":
        vq = models.tokenizer_config(config)
        vq.spec.grid_size(*config.data.image_size)
        if vq.spec.image_channels != 3:
            raise ValueError(
                f"vq.image_channels {vq.spec.image_channels}: the datasets give 3 (RGB)"
            )
        if config.data.cache_tokens:
            raise ValueError("data.cache_tokens is for kind 'maskgil': a tokenizer needs images")
        if config.init_from:
            raise ValueError(
                f"init_from {config.init_from} is for kind 'maskgil'; a tokenizer begins at random"
            )
        tokenizers.check_vq_loss(config, vq)
    else:
        models.model_config(config)
        if config.model.attention == "cudnn" and jax.default_backend() != "gpu":
            raise ValueError("model.attention 'cudnn' needs a GPU; use 'xla'")
        models.sampler_config(config)
        loss_config(config)
        _check_masking(config)
        data.check_cache(config, transform)


def _check_masking(config: ConfigDict) -> None:
    """Refuse settings of masks for a model that knows none."""
    if not models.find_model(config.model.family).causal:
        return
    unset = schema.preset(config.preset).training
    for name in ("loss_tokens", "mask_schedule", "mask_draw"):
        if config.training[name] != unset[name]:
            raise ValueError(
                f"training.{name} {config.training[name]!r} has no meaning for model.family "
                f"{config.model.family!r}, which predicts every token; leave it at {unset[name]!r}"
            )


_LEAST = {
    "data.cache_copies": 1,
    "data.num_records": 0,
    "data.num_threads": 0,
    "data.prefetch": 1,
    "evaluation.batch_size": 1,
    "evaluation.every_steps": 0,
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


def make_maskgil_task(config: ConfigDict, mesh: Mesh) -> tasks.Task:
    """Return the task of training a model on token batches."""
    model, loss = models.model_config(config), loss_config(config)
    masked_loss = steps.make_masked_loss(models.training_apply(model), loss)

    def loss_fn(params, batch, rng, frozen):
        return masked_loss(params, batch, rng)

    def prepare(batch, rng):
        condition = model.read_condition(batch)
        make_inputs = steps.expose_batch if model.causal else steps.corrupt_batch
        return make_inputs(batch["tokens"], condition, rng, loss, model.drop_condition)

    init = models.init_model(model)
    return tasks.make_task(config, mesh, init, loss_fn, prepare, steps.MASKED_METRICS, {})
