"""From a validated configuration to datasets, steps and states."""

import dataclasses
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
from maskgil_jax.data.canvases import MIN_SIZE, CanvasSource
from maskgil_jax.data.digits import DigitsSource
from maskgil_jax.data.folder import ImageFolderSource
from maskgil_jax.data.pipeline import Source, make_loader
from maskgil_jax.masking import check_choice
from maskgil_jax.tokenizers import discriminator
from maskgil_jax.tokenizers.base import Tokenizer
from maskgil_jax.tokenizers.losses import (
    TokenizerLossWeights,
    check_lookup_free,
    metric_names,
    tokenizer_loss,
)
from maskgil_jax.tokenizers.lpips import MIN_SIDE as LPIPS_MIN_SIDE
from maskgil_jax.training import adversarial, steps
from maskgil_jax.training.loop import LoopConfig
from maskgil_jax.training.optimizer import OptimizerConfig, find_matrices, make_optimizer, make_rate

CROPS = ("center", "random", "window")
KINDS = ("maskgil", "tokenizer")
DATASETS = ("digits", "canvases", "folder", "tfds", "tokens")
REPORTS = ("none", "digits", "canvases")  # each but "none" needs the dataset of its name


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


def _check_vq_loss(config: ConfigDict, vq: Any) -> None:
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


def validate(config: ConfigDict) -> None:
    """Build every settings object once, so that a wrong value is known before work begins.

    Raises:
        ValueError: naming the value and what is allowed.
    """
    check_choice("kind", config.kind, KINDS)
    check_choice("data.name", config.data.name, DATASETS)
    check_choice("report.name", config.report.name, REPORTS)
    training = config.training
    loop_config(config)
    make_optimizer(optimizer_config(config), training.num_steps)
    if not 0 <= training.ema_decay < 1:
        raise ValueError(f"training.ema_decay {training.ema_decay} is not in [0, 1)")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed {config.seed} is out of range; allowed: 0 to {2**32 - 1}")
    _check_at_least(config, _LEAST)
    _check_stored_tokens(config)
    transform = image_transform(config)
    report = config.report.name
    if report not in ("none", config.data.name):
        raise ValueError(
            f"report.name {report!r} needs data.name {report!r}, not {config.data.name!r}"
        )
    if report == "canvases" and config.kind != "tokenizer":
        raise ValueError("report.name 'canvases' is for kind 'tokenizer'; use 'none'")
    if config.kind == "tokenizer":
        vq = build.tokenizer_config(config)
        vq.spec.grid_size(*config.data.image_size)
        if vq.spec.image_channels != 3:
            raise ValueError(
                f"vq.image_channels {vq.spec.image_channels}: the datasets give 3 (RGB)"
            )
        if config.data.cache_tokens:
            raise ValueError("data.cache_tokens is for kind 'maskgil': a tokenizer needs images")
        _check_vq_loss(config, vq)
    else:
        build.model_config(config)
        if config.model.attention == "cudnn" and jax.default_backend() != "gpu":
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
    augmented = len(transform.transforms) > 2 or config.data.crop != "center"
    if cached and copies == 1 and augmented:
        raise ValueError("data.cache_copies 1 would freeze one augmentation; use more copies")


# What an image goes through before it is encoded, switched off.
_NO_IMAGES: dict[str, Any] = {
    "split": "train",
    "crop": "center",
    "flip": False,
    "shift_px": 0.0,
    "rotation_deg": 0.0,
    "scale_range": (1.0, 1.0),
    "max_bad_images": 0,
    "cache_tokens": False,
}


def _check_stored_tokens(config: ConfigDict) -> None:
    """Refuse what stored tokens would ignore."""
    data = config.data
    if data.name != "tokens":
        if not data.check_records:
            raise ValueError(
                f"data.check_records False is for data.name 'tokens', not {data.name!r}"
            )
        return
    if config.kind == "tokenizer":
        raise ValueError("data.name 'tokens' is for kind 'maskgil': a tokenizer needs images")
    wrong = [
        f"data.{name} {data[name]!r} must be {neutral!r}"
        for name, neutral in _NO_IMAGES.items()
        if data[name] != neutral
    ]
    if wrong:
        raise ValueError(
            f"data.name 'tokens' has no images to change: {'; '.join(wrong)}. Crops and flips are "
            "chosen when tokens are extracted, with --crops of tools/extract_tokens.py"
        )


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
    if data.name == "canvases":
        return CanvasSource(data.split)
    if not data.path:
        raise ValueError(f"data.path is empty; data.name {data.name!r} needs the dataset's folder")
    if data.name == "folder":
        return ImageFolderSource(data.path, data.split, max_bad_images=data.max_bad_images)
    # array_record, which both read with, has no wheels outside Linux.
    if data.name == "tokens":
        from maskgil_jax.data.token_records import TokenRecordSource

        return TokenRecordSource(data.path, check_records=data.check_records)
    from maskgil_jax.data.tfds import TFDSSource

    return TFDSSource(data.tfds_name, data.split, data.path, max_bad_images=data.max_bad_images)


def image_transform(config: ConfigDict) -> transforms.Chain:
    """Return crop, augmentation and scaling to [-1, 1] of one record."""
    data = config.data
    parts: list[transforms.Transform] = [_make_crop(data)]
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


def _make_crop(data: ConfigDict) -> transforms.Transform:
    """Return the crop to `data.image_size`."""
    height, width = data.image_size
    check_choice("data.crop", data.crop, CROPS)
    if (data.crop == "window") != (data.name == "canvases"):
        raise ValueError(
            f"data.crop {data.crop!r} does not go with data.name {data.name!r}: windows are cut of "
            "canvases, and of nothing else"
        )
    if data.name == "canvases":
        if max(height, width) > MIN_SIZE:
            raise ValueError(
                f"data.image_size {(height, width)} is larger than the smallest canvas; allowed: "
                f"sides up to {MIN_SIZE}"
            )
        if data.flip:
            raise ValueError("data.flip True would mirror the digits of canvases; use False")
        return transforms.RandomCrop(size=(height, width))
    if height != width:
        raise ValueError(f"data.image_size {(height, width)} must be square: images are cropped so")
    if data.crop == "random":
        return transforms.ResizedRandomCrop(size=height)
    return transforms.CenterCrop(size=height)


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


def check_stored_tokens(config: ConfigDict, source: Any, tokenizer: Tokenizer) -> None:
    """Raise a `ValueError` that lists why stored tokens do not fit tokenizer and model, if so.

    Args:
        config: of the run.
        source: `TokenRecordSource`.
        tokenizer: what the run's samples are decoded with.
    """
    dataset, problems = source.dataset, []
    maker, size = dataset.tokenizer, tuple(config.data.image_size)
    if maker.fingerprint != tokenizer.fingerprint:
        problems.append(
            f"they were made by another tokenizer ({maker.family}, {maker.path}, fingerprint "
            f"{maker.fingerprint[:12]}…) than tokenizer.path {config.tokenizer.path} "
            f"({tokenizer.spec.family}, fingerprint {tokenizer.fingerprint[:12]}…)"
        )
    if tuple(dataset.image_size) != size:
        problems.append(f"data.image_size {size} must be {tuple(dataset.image_size)}")
    if tuple(config.model.grid_size) != dataset.grid:
        problems.append(f"model.grid_size {tuple(config.model.grid_size)} must be {dataset.grid}")
    if config.model.codebook_size != maker.codebook_size:
        problems.append(
            f"model.codebook_size {config.model.codebook_size} must be {maker.codebook_size}"
        )
    if dataset.num_classes is None:
        problems.append("their images have no labels, which a class-conditional model learns from")
    if problems:
        raise ValueError(f"the tokens in {config.data.path} do not fit: {'; '.join(problems)}")


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
    """Return the task of training a model on token batches."""
    model, loss = build.model_config(config), loss_config(config)
    masked_loss = steps.make_masked_loss(build.training_apply(model), loss)

    def loss_fn(params, batch, rng, frozen):
        return masked_loss(params, batch, rng)

    def prepare(batch, rng):
        return steps.corrupt_batch(batch, rng, loss)

    init = build.init_model(model)
    return _make_task(config, mesh, init, loss_fn, prepare, steps.MASKED_METRICS, {})


def make_tokenizer_task(
    config: ConfigDict, mesh: Mesh, perceptual: tuple[nn.Module, Any] | None = None
) -> Task:
    """Return the task of training a tokenizer on image batches.

    Args:
        config: the configuration.
        mesh: the devices.
        perceptual: module `(images, images) → distances` and its parameters, which stay as they
            are; needed where the perceptual term has a weight.
    """
    vq, weights = build.tokenizer_config(config), loss_weights(config)
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
        return _make_task(config, mesh, init, loss_fn, lambda batch, _: batch, names, frozen)

    training, optimizer = config.training, _make_optimizer(config)
    judging = _make_optimizer(config, first_step=term.start_step)
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
    return _jit_task(mesh, create, phases, (*names, *adversarial.metric_names(term)), frozen)


def _make_optimizer(config: ConfigDict, first_step: int = 0) -> optax.GradientTransformation:
    steps_of_run = config.training.num_steps
    return make_optimizer(optimizer_config(config), steps_of_run, find_matrices, first_step)


def _make_task(config, mesh, init_params, loss_fn, prepare, metric_names, frozen) -> Task:
    """Return the task of lowering `loss_fn(params, batch, rng, frozen)`."""
    training, optimizer = config.training, _make_optimizer(config)

    def create():
        params = init_params(jax.random.key(config.seed))
        return steps.create_state(params, optimizer, ema=training.ema_decay > 0)

    def make_step(frozen):
        return steps.make_train_step(
            lambda params, batch, rng: loss_fn(params, batch, rng, frozen),
            prepare,
            optimizer,
            seed=config.seed,
            ema_decay=training.ema_decay,
            accumulation_steps=training.accumulation_steps,
        )

    return _jit_task(mesh, create, {0: make_step}, metric_names, frozen)


def _jit_task(mesh, create, phases, metric_names, frozen) -> Task:
    """Return the task of a state and of the steps `make_step(frozen)`, on the devices of a mesh.

    `phases` maps the number of updates done to the `make_step` that is used from then on. `frozen`
    holds parameters that the steps use and do not change. They are an argument of the compiled
    programs, which would otherwise hold them as constants.
    """
    boxed = jax.eval_shape(create)
    shardings = sharding.state_shardings(boxed, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings
    )
    everywhere = sharding.replicated(mesh)

    def jit_step(make_step):
        def sharded_step(state, metrics, batch, frozen):
            with nn.logical_axis_rules(sharding.RULES):
                return make_step(frozen)(state, metrics, batch)

        return jax.jit(
            sharded_step,
            in_shardings=(shardings, everywhere, sharding.batch_sharding(mesh), everywhere),
            out_shardings=(shardings, everywhere),
            donate_argnums=(0, 1),
        )

    jitted = {first: jit_step(make_step) for first, make_step in phases.items()}
    return Task(
        step=_PhasedStep(jitted, jax.device_put(frozen, everywhere)),
        init=jax.jit(lambda: nn.unbox(create()), out_shardings=shardings),
        abstract=abstract,
        metric_names=metric_names,
    )


class _PhasedStep:
    """Jitted steps with their last argument given; the number of updates done says which is used.

    That number is read from the device for a state that this object did not return itself, and
    counted otherwise, so that the host need not wait for every update.
    """

    def __init__(self, jitted: Mapping[int, Any], frozen: Any):
        self._jitted, self._frozen = dict(sorted(jitted.items())), frozen
        self._done, self._last = 0, None

    def __call__(self, state: Any, metrics: Any, batch: Any) -> Any:
        if len(self._jitted) > 1 and state.step is not self._last:
            self._done = int(state.step)
        state, metrics = self._find(self._done)(state, metrics, batch, self._frozen)
        self._done, self._last = self._done + 1, state.step
        return state, metrics

    def lower(self, state: Any, metrics: Any, batch: Any) -> Any:
        """Lower the step that is used in the end."""
        return self._find(max(self._jitted)).lower(state, metrics, batch, self._frozen)

    def _find(self, done: int) -> Any:
        return self._jitted[max(first for first in self._jitted if first <= done)]


def rate_schedule(config: ConfigDict) -> optax.Schedule:
    """Return the learning rate as a function of the step."""
    return make_rate(optimizer_config(config), config.training.num_steps)
