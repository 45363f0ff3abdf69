"""From a validated configuration to datasets, and from images to batches and tokens."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maskgil_jax import sharding
from maskgil_jax.build import captions
from maskgil_jax.build.sizes import bucket_sizes
from maskgil_jax.data import transforms
from maskgil_jax.data.arrays import ArraySource
from maskgil_jax.data.buckets import Size, Subset, format_size, split_by_bucket
from maskgil_jax.data.canvas_captions import CaptionedCanvasSource
from maskgil_jax.data.canvases import CanvasSource, check_size
from maskgil_jax.data.digits import DigitsSource
from maskgil_jax.data.folder import ImageFolderSource
from maskgil_jax.data.pipeline import Source, make_bucketed_loader, make_loader
from maskgil_jax.masking import check_choice
from maskgil_jax.tokenizers.base import Tokenizer

DATASETS = ("digits", "canvases", "folder", "tfds", "tokens", "captions")
CROPS = ("center", "random")


def make_sources(config: ConfigDict) -> dict[Size, Source]:
    """Open the dataset of every bucket; there is one, of `data.image_size`, if none are named.

    Raises:
        ValueError: if it is missing, empty or unreadable.
    """
    data, sizes = config.data, bucket_sizes(config)
    sources: dict[Size, Source]
    if captions.is_captioned(config) and data.name == "canvases":
        sources = {size: CaptionedCanvasSource(data.split, size) for size in sizes}
    elif data.name == "tokens" and captions.is_captioned(config):
        from maskgil_jax.data.token_buckets import open_token_buckets

        stored = open_token_buckets(
            data.path,
            captions=True,
            features=config.model.text == "features",
            check_records=data.check_records,
        )
        sources = dict(stored)
        if strangers := sorted(set(sources) - set(sizes)):
            raise ValueError(
                f"the tokens in {data.path} are of sizes {', '.join(map(format_size, strangers))}, "
                f"which are none of the run's, {', '.join(map(format_size, sizes))}; set "
                "data.image_size and data.buckets as they were extracted with"
            )
    elif data.buckets == "none":
        sources = {sizes[0]: make_source(config)}
    else:
        found = split_by_bucket(make_source(config), sizes, num_threads=data.num_threads)
        sources = dict(found)
    if count := data.num_records:
        for size, source in sources.items():
            if count < len(source):
                sources[size] = Subset(source, np.arange(count), f"first {count}")
    return sources


def make_source(config: ConfigDict) -> Source:
    """Open the dataset.

    Raises:
        ValueError: if it is missing, empty or unreadable.
    """
    data = config.data
    if data.name == "digits":
        return DigitsSource(data.split)
    if data.name == "canvases":
        return CanvasSource(data.split, tuple(data.image_size))
    if not data.path:
        raise ValueError(f"data.path is empty; data.name {data.name!r} needs the dataset's folder")
    if data.name == "folder":
        return ImageFolderSource(data.path, data.split, max_bad_images=data.max_bad_images)
    if data.name == "captions":
        return captions.open_dataset(data)
    # array_record, which both read with, has no wheels outside Linux.
    if data.name == "tokens":
        from maskgil_jax.data.token_records import TokenRecordSource

        return TokenRecordSource(
            data.path, captions=captions.is_captioned(config), check_records=data.check_records
        )
    from maskgil_jax.data.tfds import TFDSSource

    return TFDSSource(data.tfds_name, data.split, data.path, max_bad_images=data.max_bad_images)


def image_transform(config: ConfigDict, size: Size | None = None) -> transforms.Chain:
    """Return crop, augmentation and scaling to [-1, 1] of one record.

    Args:
        config: of the run.
        size: height and width in pixels; `data.image_size` if `None`.
    """
    data = config.data
    crop = _make_crop(data, size or tuple(data.image_size))
    parts: list[transforms.Transform] = [] if crop is None else [crop]
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


def _make_crop(data: ConfigDict, size: Size) -> transforms.Transform | None:
    """Return the crop to a size; `None` for images that are drawn in it."""
    height, width = size
    check_choice("data.crop", data.crop, CROPS)
    if data.name == "canvases":
        if data.crop != "center":
            raise ValueError(
                f"data.crop {data.crop!r} has no meaning with data.name 'canvases', which are "
                "drawn in the size that is asked for; leave it at 'center'"
            )
        if data.flip:
            raise ValueError("data.flip True would mirror the digits of canvases; use False")
        check_size(size)
        return None
    if data.name == "captions":
        if data.flip:
            raise ValueError("data.flip True would mirror what captions say of left and right")
    elif height != width:
        raise ValueError(f"data.image_size {(height, width)} must be square: images are cropped so")
    if data.crop == "random":
        return transforms.ResizedRandomCrop(size=(height, width))
    return transforms.CenterCrop(size=(height, width))


def make_batches(
    config: ConfigDict,
    sources: Mapping[Size, Source],
    make_transform: Callable[[Size], transforms.Transform] | None,
) -> Any:
    """Return the resumable iterator over this process's rows of every batch.

    Args:
        config: of the run.
        sources: size → dataset, of `make_sources`.
        make_transform: size → what its records go through.
    """
    data = config.data
    options: dict[str, Any] = {
        "batch_size": config.training.batch_size,
        "seed": config.seed,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "num_threads": data.num_threads,
        "prefetch": max(data.num_threads, data.prefetch, 1),
    }
    if data.buckets != "none":
        return make_bucketed_loader(sources, make_transform=make_transform, **options)
    [(size, source)] = sources.items()
    transform = None if make_transform is None else make_transform(size)
    return make_loader(source, transform=transform, **options)


def check_cache(config: ConfigDict, transform: transforms.Chain) -> None:
    """Raise a `ValueError` unless copies of cached tokens go with the augmentation."""
    cached, copies = config.data.cache_tokens, config.data.cache_copies
    if copies > 1 and not cached:
        raise ValueError(f"data.cache_copies {copies} needs data.cache_tokens true")
    augmented = len(transform.transforms) > 2 or config.data.crop != "center"
    if cached and copies == 1 and augmented:
        raise ValueError("data.cache_copies 1 would freeze one augmentation; use more copies")


def check_cached_captions(config: ConfigDict, sources: Mapping[Size, Any]) -> None:
    """Raise a `ValueError` if a single cached copy would have one of several captions for good.

    Args:
        config: of the run.
        sources: its datasets.
    """
    data = config.data
    if not (data.cache_tokens and data.cache_copies == 1 and data.name == "captions"):
        return
    for source in sources.values():
        for index in range(len(source)):
            if (count := len(source.captions(index))) > 1:
                raise ValueError(
                    f"data.cache_copies 1 would freeze one of the {count} captions of "
                    f"{source.describe(index)}; use more copies, each of which draws one"
                )


def cache_tokens(
    config: ConfigDict,
    sources: Mapping[Size, Source],
    tokenizer: Tokenizer,
    read_caption: transforms.Transform | None = None,
) -> dict[Size, Source]:
    """Encode all datasets into memory, `data.cache_copies` augmented copies of every image.

    Copy c of image i draws its augmentation from the generator seeded with (seed, c, i). Every
    process encodes all of it, so this is for data that is small.
    """
    return {
        size: _cache_tokens(config, size, source, tokenizer, read_caption)
        for size, source in sources.items()
    }


def _cache_tokens(
    config: ConfigDict,
    image_size: Size,
    source: Source,
    tokenizer: Tokenizer,
    read_caption: transforms.Transform | None,
) -> ArraySource:
    copies, transform = config.data.cache_copies, image_transform(config, image_size)
    size = config.tokenizer.batch_size
    tokens: list[np.ndarray] = []
    others: dict[str, list[np.ndarray]] = {}
    pairs = [(copy, index) for copy in range(copies) for index in range(len(source))]
    for start in range(0, len(pairs), size):
        images = []
        for copy, index in pairs[start : start + size]:
            rng = np.random.default_rng((config.seed, copy, index))
            record = transform(source[index], rng)
            if read_caption is not None:
                record = read_caption(record, rng)
            images.append(record.pop("image"))
            for name, value in record.items():
                others.setdefault(name, []).append(np.asarray(value, np.int32))
        # What a bicubic resize overshoots has been clipped by the conversion to uint8.
        tokens.append(np.asarray(tokenizer.encode(np.stack(images), batch_size=size)))
    arrays = {"tokens": np.concatenate(tokens)}
    arrays |= {name: np.stack(values) for name, values in others.items()}
    classes = None if read_caption is not None else config.model.num_classes
    return ArraySource(arrays, name=f"{source.name} tokens", num_classes=classes)


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
    "num_records": 0,
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
    # Captions go with any of the run's sizes, which `make_sources` has compared.
    if not captions.is_captioned(config) and tuple(dataset.image_size) != size:
        problems.append(f"data.image_size {size} must be {tuple(dataset.image_size)}")
    if not captions.is_captioned(config) and tuple(config.model.grid_size) != dataset.grid:
        problems.append(f"model.grid_size {tuple(config.model.grid_size)} must be {dataset.grid}")
    if config.model.codebook_size != maker.codebook_size:
        problems.append(
            f"model.codebook_size {config.model.codebook_size} must be {maker.codebook_size}"
        )
    if captions.is_captioned(config):
        if not dataset.has_captions:
            problems.append("they have no captions; extract them again with --captions")
    elif dataset.num_classes is None:
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

    def encode_images(batch):
        rest = {name: value for name, value in batch.items() if name != "image"}
        return {"tokens": encode(params, batch["image"]), **rest}

    return encode_images
