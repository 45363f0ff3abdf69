"""From a validated configuration to captions: their datasets, sizes, ids and features."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maskgil_jax import sharding
from maskgil_jax.build.models import MODELS, find_model
from maskgil_jax.build.sizes import bucket_sizes
from maskgil_jax.data import transforms
from maskgil_jax.data.buckets import Size, format_size
from maskgil_jax.data.captions import read_caption_folder, read_json_lines
from maskgil_jax.data.pipeline import Source
from maskgil_jax.data.token_dataset import TextOrigin
from maskgil_jax.data.webdataset import read_webdataset
from maskgil_jax.masking import check_choice
from maskgil_jax.models.captions import Caption, CaptionModelConfig
from maskgil_jax.text.base import TextEncoder
from maskgil_jax.text.gemma_encoder import GemmaEncoder
from maskgil_jax.text.prompts import encode_bytes

FORMATS = ("folder", "jsonl", "webdataset", "tfds")
DATASETS = ("captions", "canvases", "tokens")  # that have captions, tokens if extracted so
FAMILIES = tuple(name for name, kind in MODELS.items() if issubclass(kind, CaptionModelConfig))
_LOOKED_AT = 200  # captions that are looked at before a run, in all buckets together
# Fields of captions, as they must be where there are none.
_UNUSED: dict[str, Any] = {
    "format": "",
    "caption_key": "captions/text",
    "allow_incomplete": False,
    "buckets": "none",
    "bucket_multiple": 32,
    "bucket_max_ratio": 4.0,
    "bucket_sizes": (),
}


def is_captioned(config: ConfigDict) -> bool:
    """Return whether a run learns from captions.

    Raises:
        ValueError: if its model is of no known family.
    """
    return config.kind == "maskgil" and issubclass(
        find_model(config.model.family), CaptionModelConfig
    )


def open_dataset(data: ConfigDict) -> Source:
    """Open the dataset of images with captions that `data.format` names.

    Raises:
        ValueError: if it is missing, empty, unreadable or incomplete.
    """
    check_choice("data.format", data.format, FORMATS)
    if data.format == "tfds":
        # array_record, which reads it, has no wheels outside Linux.
        from maskgil_jax.data.tfds import TFDSCaptionSource

        return TFDSCaptionSource(
            data.tfds_name,
            data.split,
            data.path,
            caption_key=data.caption_key,
            max_bad_images=data.max_bad_images,
        )
    readers = {
        "folder": read_caption_folder,
        "jsonl": read_json_lines,
        "webdataset": read_webdataset,
    }
    return readers[data.format](
        data.path, allow_incomplete=data.allow_incomplete, max_bad_images=data.max_bad_images
    )


def check_settings(config: ConfigDict) -> None:
    """Refuse captions where nothing learns from them, and fields that would be ignored."""
    data = config.data
    if not is_captioned(config):
        if data.name == "captions":
            wrong = config.kind == "tokenizer"
            what = "a tokenizer" if wrong else f"family {config.model.family!r}"
            raise ValueError(
                f"data.name 'captions' is for models of texts ({', '.join(FAMILIES)}); {what} "
                "would not learn from the captions"
            )
        _refuse(config, _UNUSED, f"data.name {data.name!r} has no captions")
        if config.text.encoder:
            raise ValueError(
                f"text.encoder {config.text.encoder} is for model.family "
                f"{' or '.join(map(repr, FAMILIES))}, not {config.model.family!r}"
            )
        return
    if data.name not in DATASETS:
        raise ValueError(
            f"data.name {data.name!r} has no captions; allowed with model.family "
            f"{config.model.family!r}: {', '.join(DATASETS)}"
        )
    _check_fields(config)
    text = config.text
    reads_features = config.model.text == "features"
    # Stored tokens may hold the features; they are not opened yet.
    needed = reads_features and data.name != "tokens"
    if (needed and not text.encoder) or (text.encoder and not reads_features):
        raise ValueError(
            f"model.text {config.model.text!r} and text.encoder {config.text.encoder!r}: features "
            "need the directory of their encoder, and bytes have none"
        )
    if config.model.text == "bytes" and (text.hidden_layer, text.dtype) != (-1, None):
        raise ValueError(
            f"text.hidden_layer {text.hidden_layer} and text.dtype {text.dtype} are of a text "
            "encoder, and bytes have none; leave them at -1 and None"
        )
    if config.evaluation.every_steps:
        raise ValueError(
            f"evaluation.every_steps {config.evaluation.every_steps}: samples of captions are not "
            "evaluated while a model trains; use 0"
        )
    bucket_sizes(config)


def _check_fields(config: ConfigDict) -> None:
    """Refuse fields that the dataset does not use, or that would make its captions wrong."""
    data = config.data
    if data.name == "canvases":
        neutral = {name: _UNUSED[name] for name in ("format", "caption_key", "allow_incomplete")}
        _refuse(config, neutral, "canvases are drawn")
        if data.buckets == "area":
            raise ValueError("data.buckets 'area' is for pictures; canvases have 'listed' ones")
        neutral = {"crop": "center", "flip": False, "shift_px": 0.0, "rotation_deg": 0.0}
        _refuse(
            config,
            neutral | {"scale_range": (1.0, 1.0)},
            "the captions of canvases would become wrong",
        )
    elif data.name == "tokens":
        neutral = {name: _UNUSED[name] for name in ("format", "caption_key", "allow_incomplete")}
        _refuse(config, neutral, "stored tokens are read as they are")
    else:
        check_choice("data.format", data.format, FORMATS)
        if data.format != "tfds" and data.split != "train":
            raise ValueError(
                f"data.split {data.split!r} is not for data.format {data.format!r}, which has no "
                "splits: name the split's folder in data.path"
            )
        unused = "allow_incomplete" if data.format == "tfds" else "caption_key"
        neutral = {unused: _UNUSED[unused]}
        _refuse(config, neutral, f"data.format {data.format!r} does not use it")
    ignored = [] if data.buckets == "area" else ["bucket_multiple", "bucket_max_ratio"]
    ignored += [] if data.buckets == "listed" else ["bucket_sizes"]
    neutral = {name: _UNUSED[name] for name in ignored}
    _refuse(config, neutral, f"data.buckets {data.buckets!r} does not use it")


def _refuse(config: ConfigDict, neutral: Mapping[str, Any], why: str) -> None:
    wrong = [
        f"data.{name} {config.data[name]!r} must be {value!r}"
        for name, value in neutral.items()
        if config.data[name] != value
    ]
    if wrong:
        raise ValueError(f"{why}: {'; '.join(wrong)}")


def find_stored_features(config: ConfigDict, sources: Mapping[Size, Any]) -> TextOrigin | None:
    """Return what made the features that a run reads from its records, or `None`.

    Args:
        config: of the run.
        sources: its datasets, whose records are all of one kind.
    """
    if config.data.name != "tokens" or not is_captioned(config) or config.model.text != "features":
        return None
    return next(iter(sources.values())).dataset.text


def check_stored_features(
    config: ConfigDict, stored: TextOrigin, fingerprint: str | None, dtype: str | None
) -> None:
    """Raise a `ValueError` that lists why stored features do not fit model and run, if so.

    What is generated later reads its prompts with the encoder of `config.text`.

    Args:
        config: of the run.
        stored: what made them.
        fingerprint: of the encoder that the run names, under the settings of what is stored;
            `None` if it names none.
        dtype: type in which that one computes if none is asked for.
    """
    text, model, problems = config.text, config.model, []
    if fingerprint is not None and fingerprint != stored.fingerprint:
        problems.append(
            f"text.encoder {text.encoder} (fingerprint {fingerprint[:12]}…) is another encoder; "
            "name theirs, or none"
        )
    if text.hidden_layer != stored.hidden_layer:
        problems.append(f"text.hidden_layer {text.hidden_layer} must be {stored.hidden_layer}")
    if (text.dtype or dtype) != stored.dtype:
        problems.append(f"text.dtype {text.dtype} must be {stored.dtype!r}")
    if model.text_width != stored.width:
        problems.append(f"model.text_width {model.text_width} must be {stored.width}")
    if model.text_length != stored.length:
        # More, and the encoder might not read as much when it reads prompts.
        problems.append(
            f"model.text_length {model.text_length} must be {stored.length}, at which their "
            "captions were cut"
        )
    if problems:
        raise ValueError(
            f"the features in {config.data.path} ({stored.describe()}) do not fit: "
            f"{'; '.join(problems)}. Or extract the tokens again, with --text_encoder or without"
        )


def make_transform(
    config: ConfigDict, encoder: TextEncoder | None, *, stored: bool = False
) -> transforms.Transform:
    """Return what turns the captions of records into what the model is given.

    That is bytes, or ids of a text encoder, which features are computed of, or stored features.

    Where an image has several, one is drawn. What is too long is cut; `describe_cut` tells of it.

    Args:
        config: of the run.
        encoder: of features that are computed.
        stored: whether records hold the features.
    """
    if stored:
        return transforms.PickFeatures(length=config.model.text_length)
    return transforms.Chain(transforms=(transforms.PickCaption(), _make_reader(config, encoder)))


def read_stored(
    config: ConfigDict, records: Sequence[Mapping[str, Any]], rng: np.random.Generator
) -> Caption:
    """Return the stored features of one text of each record, as float32."""
    pick = transforms.PickFeatures(length=config.model.text_length)
    picked = [pick(dict(record), rng) for record in records]
    features = np.stack([record["caption"] for record in picked])
    lengths = np.stack([record["caption_length"] for record in picked])
    return Caption(features.astype(np.float32), lengths)


def _make_reader(config: ConfigDict, encoder: TextEncoder | None) -> transforms.ReadCaption:
    tokenize: Any = functools.partial(encode_bytes, max_length=config.model.text_length)
    if encoder is not None:
        tokenize = encoder.tokenize
    return transforms.ReadCaption(tokenize=tokenize)


def describe_cut(
    config: ConfigDict, sources: Mapping[Size, Any], encoder: TextEncoder | None
) -> list[str]:
    """Say of every bucket in which captions are cut how many of the first ones are."""
    read, rng = _make_reader(config, encoder), np.random.default_rng(0)
    tokenize, pick = read.tokenize, transforms.PickCaption()
    lines, most = [], -(-_LOOKED_AT // len(sources))
    for size, source in sources.items():
        records = (source[index] for index in range(min(len(source), most)))
        captions = [pick(record, rng)["caption"] for record in records]
        if cut := int(np.sum(tokenize(captions)[2])):
            lines.append(
                f"{cut} of the first {len(captions)} captions of {format_size(size)} are longer "
                f"than model.text_length {config.model.text_length} and are cut"
            )
    return lines


def make_encoder(encoder: TextEncoder, mesh: Mesh) -> Callable[[Any], Any]:
    """Return the map of batches that puts features in place of the ids of captions.

    An encoder in JAX computes on the mesh, every device its share of the captions with all of the
    encoder's parameters; another one computes this process's captions on the host.
    """
    split = sharding.batch_sharding(mesh)
    if not isinstance(encoder, GemmaEncoder):

        def encode_here(batch):
            # Only this process's rows are here.
            ids, lengths = (
                multihost_utils.global_array_to_host_local_array(batch[name], mesh, split.spec)
                for name in ("caption", "caption_length")
            )
            features = encoder.encode(np.asarray(ids), np.asarray(lengths))
            return batch | sharding.put_batch({"caption": features}, mesh)

        return encode_here

    params = jax.device_put(encoder.params, sharding.replicated(mesh))

    @functools.partial(jax.jit, out_shardings=split)
    def encode(params, ids, lengths):
        return encoder.apply(params, ids, lengths)

    return lambda batch: (
        batch | {"caption": encode(params, batch["caption"], batch["caption_length"])}
    )
