"""From a validated configuration to the training of a tokenizer."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maskgil_jax.build import models, tasks
from maskgil_jax.tokenizers import discriminator
from maskgil_jax.tokenizers.losses import (
    TokenizerLossWeights,
    check_lookup_free,
    metric_names,
    tokenizer_loss,
)
from maskgil_jax.tokenizers.lpips import MIN_SIDE as LPIPS_MIN_SIDE
from maskgil_jax.training import adversarial, steps


def loss_weights(config: ConfigDict) -> TokenizerLossWeights:
    """Return the weights of a tokenizer's own loss terms, validated."""
    names = [field.name for field in dataclasses.fields(TokenizerLossWeights)]
    return TokenizerLossWeights(**{name: config.vq_loss[name] for name in names})


def adversarial_config(config: ConfigDict) -> adversarial.AdversarialConfig | None:
    """Return weight and start of the adversarial term, validated; `None` if its weight is 0."""
    section = config.vq_loss
    if section.adversarial == 0:
        return None
    return adversarial.AdversarialConfig(
        weight=section.adversarial,
        start_step=section.discriminator_start,
        adaptive=section.adaptive_weight,
    )


def discriminator_config(config: ConfigDict) -> discriminator.DiscriminatorConfig:
    """Return the shape of the discriminator, validated."""
    section = config.vq_loss
    return discriminator.DiscriminatorConfig(
        layers=section.discriminator_layers, channels=section.discriminator_channels
    )


def check_vq_loss(config: ConfigDict, vq: Any) -> None:
    """Raise a `ValueError` unless the loss section fits itself, the tokenizer and the images."""
    weights, section = loss_weights(config), config.vq_loss
    if vq.lookup_free:
        check_lookup_free(weights)
    if weights.perceptual and not section.lpips_path:
        raise ValueError(
            f"vq_loss.perceptual {weights.perceptual} needs vq_loss.lpips_path: fetch vgg16 "
            "(https://download.pytorch.org/models/vgg16-397923af.pth) and the heads (vgg.pth of "
            "https://github.com/richzhang/PerceptualSimilarity, folder lpips/weights/v0.1), then "
            "run tools/convert_checkpoint.py import --family lpips --src vgg16-397923af.pth "
            "--heads vgg.pth --dst DIR; or set vq_loss.perceptual to 0"
        )
    if section.lpips_path and not weights.perceptual:
        raise ValueError(
            f"vq_loss.lpips_path {section.lpips_path!r} would not be used: vq_loss.perceptual is 0"
        )
    if weights.perceptual and min(config.data.image_size) < LPIPS_MIN_SIDE:
        raise ValueError(
            f"data.image_size {tuple(config.data.image_size)} is too small for vq_loss.perceptual "
            f"{weights.perceptual}: LPIPS needs sides of at least {LPIPS_MIN_SIDE} pixels; or set "
            "it to 0"
        )
    discriminator.find_discriminator_loss(section.discriminator_loss)
    shape, term = discriminator_config(config), adversarial_config(config)
    if term is None:
        return
    shape.check_images(*config.data.image_size)
    if config.training.accumulation_steps > 1:
        raise ValueError(
            f"training.accumulation_steps {config.training.accumulation_steps} with "
            f"vq_loss.adversarial {term.weight}: the discriminator normalises over the whole "
            "batch, which parts of it would change; use accumulation_steps 1, a smaller batch, or "
            "more devices"
        )


def make_tokenizer_task(
    config: ConfigDict, mesh: Mesh, perceptual: tuple[nn.Module, Any] | None = None
) -> tasks.Task:
    """Return the task of training a tokenizer on image batches.

    Args:
        config: the configuration.
        mesh: the devices.
        perceptual: module `(images, images) → distances` and its parameters, which stay as they
            are; needed where the perceptual term has a weight.
    """
    vq, weights = models.tokenizer_config(config), loss_weights(config)
    module, (height, width) = vq.make_module(), config.data.image_size
    vq.spec.grid_size(height, width)
    blank = jnp.zeros((1, height, width, vq.spec.image_channels))
    judge, frozen = perceptual or (None, {})

    def init(rng):
        return module.init(rng, blank)["params"]

    def forward(params, images, rng) -> Any:
        return module.apply({"params": params}, images, train=True, rngs={"dropout": rng})

    def measure(outputs, images, frozen):
        distance: Any = None
        if judge is not None:
            distance = functools.partial(judge.apply, {"params": frozen})
        loss, values = tokenizer_loss(outputs, images, weights, distance)
        return loss, {name: jnp.asarray(value) for name, value in values.items()}

    def loss_fn(params, batch, rng, frozen):
        loss, values = measure(forward(params, batch["image"], rng), batch["image"], frozen)
        return steps.Summed(loss=loss, weight=jnp.ones(()), sums={}, means=values)

    names = metric_names(weights, lookup_free=vq.lookup_free)
    names = (*names, "grad_norm", "param_norm")
    term = adversarial_config(config)
    if term is None:
        return tasks.make_task(config, mesh, init, loss_fn, lambda batch, _: batch, names, frozen)

    training, optimizer = config.training, tasks.make_optimizer(config)
    judging = tasks.make_optimizer(config, first_step=term.start_step)
    patches = discriminator.PatchGAN(discriminator_config(config))

    def create():
        rng = jax.random.key(config.seed)
        # The tokenizer begins as it would without a discriminator.
        other = jax.random.fold_in(rng, 1)
        return adversarial.create_state(
            init(rng),
            optimizer,
            patches.init(other, blank)["params"],
            judging,
            ema=training.ema_decay > 0,
        )

    def make_step(frozen, active):
        fns = adversarial.AdversarialFns(
            forward=forward,
            loss=lambda outputs, images: measure(outputs, images, frozen),
            discriminate=lambda params, images: patches.apply({"params": params}, images),
            discriminator_loss=discriminator.find_discriminator_loss(
                config.vq_loss.discriminator_loss
            ),
            generator_loss=discriminator.generator_loss,
            last_layer=lambda params: params["decoder"]["conv_out"]["kernel"],
        )
        return adversarial.make_adversarial_step(
            fns,
            term,
            optimizer,
            judging,
            active=active,
            seed=config.seed,
            ema_decay=training.ema_decay,
        )

    phases = {
        0: functools.partial(make_step, active=False),
        term.start_step: functools.partial(make_step, active=True),
    }
    return tasks.jit_task(mesh, create, phases, (*names, *adversarial.metric_names(term)), frozen)
