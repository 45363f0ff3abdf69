"""From a validated configuration to datasets, and from images to batches and tokens."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maskgil_jax import sharding
from maskgil_jax.data import transforms
from maskgil_jax.data.arrays import ArraySource
from maskgil_jax.data.canvases import MIN_SIZE, CanvasSource
from maskgil_jax.data.digits import DigitsSource
from maskgil_jax.data.folder import ImageFolderSource
from maskgil_jax.data.pipeline import Source, make_loader
from maskgil_jax.masking import check_choice
from maskgil_jax.tokenizers.base import Tokenizer

DATASETS = ("digits", "canvases", "folder", "tfds", "tokens")
CROPS = ("center", "random", "window")


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


def check_cache(config: ConfigDict, transform: transforms.Chain) -> None:
    """Raise a `ValueError` unless copies of cached tokens go with the augmentation."""
    cached, copies = config.data.cache_tokens, config.data.cache_copies
    if copies > 1 and not cached:
        raise ValueError(f"data.cache_copies {copies} needs data.cache_tokens true")
    augmented = len(transform.transforms) > 2 or config.data.crop != "center"
    if cached and copies == 1 and augmented:
        raise ValueError("data.cache_copies 1 would freeze one augmentation; use more copies")


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


def check_token_settings(config: ConfigDict) -> None:
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
    """Return the jitted map from image batches to token batches, split over the mesh.

    Raises:
        ValueError: the tokenizer works in tiles, which this does not.
    """
    if tokenizer.tiling is not None:
        raise ValueError(
            f"the tokenizer has tiles of {tokenizer.tiling.tile_size} pixels; training data is "
            "encoded whole, with a smaller batch_size where memory is short"
        )
    params = jax.device_put(tokenizer.params, sharding.replicated(mesh))

    @functools.partial(jax.jit, out_shardings=sharding.batch_sharding(mesh))
    def encode(params, images):
        return tokenizer.module.apply({"params": params}, images, method="encode")

    return lambda batch: {
        "tokens": encode(params, batch["image"]),
        "label": batch["label"],
    }
