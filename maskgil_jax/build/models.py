"""From a validated configuration to models, tokenizers and samplers."""

import dataclasses
import importlib.resources
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from maskgil_jax import config as schema
from maskgil_jax.build.sizes import bucket_sizes
from maskgil_jax.decoding.autoregressive import AutoregressiveConfig, CausalPredictor
from maskgil_jax.decoding.prediction import Predictor
from maskgil_jax.decoding.sampler import SamplerConfig
from maskgil_jax.masking import check_choice
from maskgil_jax.models.base import TokenModelConfig
from maskgil_jax.models.bert import BidirectionalTransformerConfig
from maskgil_jax.models.captions import Caption, CaptionModelConfig
from maskgil_jax.models.llamagen import CausalModelConfig, LlamaGenConfig
from maskgil_jax.models.llamagen_text import LlamaGenTextConfig
from maskgil_jax.models.maskgil import MaskGILConfig
from maskgil_jax.models.maskgil_text import MaskGILTextConfig
from maskgil_jax.text.base import TextEncoder, Tokenized
from maskgil_jax.text.prompts import check_prompts, encode_bytes, show
from maskgil_jax.tokenizers.base import Tokenizer, TokenizerConfig, TokenizerSpec
from maskgil_jax.tokenizers.chameleon_vq import ChameleonVQConfig
from maskgil_jax.tokenizers.llamagen_vq import LlamaGenVQConfig
from maskgil_jax.tokenizers.maskgit_vq import MaskGITVQConfig
from maskgil_jax.tokenizers.open_magvit2 import OpenMAGVIT2Config

TOKENIZERS: dict[str, type[TokenizerConfig]] = {
    config.family: config
    for config in (LlamaGenVQConfig, MaskGITVQConfig, ChameleonVQConfig, OpenMAGVIT2Config)
}
MODELS: dict[str, type[TokenModelConfig]] = {
    config.family: config
    for config in (
        MaskGILConfig,
        MaskGILTextConfig,
        BidirectionalTransformerConfig,
        LlamaGenConfig,
        LlamaGenTextConfig,
    )
}
ASSET = "asset:"


def find_model(family: str) -> type[TokenModelConfig]:
    """Return the configuration class of a model family.

    Raises:
        ValueError: if there is no such family.
    """
    check_choice("model family", family, tuple(MODELS))
    return MODELS[family]


def model_config(config: ConfigDict) -> TokenModelConfig:
    """Return the model section, validated.

    Raises:
        ValueError: if the family is unknown, a value is not allowed, or a field that the family
            lacks differs from what the configuration's preset gives it.
    """
    fields = config.model.to_dict()
    family = find_model(fields.pop("family"))
    known = {field.name for field in dataclasses.fields(family)}
    unset = schema.preset(config.preset).model
    for name, value in fields.items():
        if name not in known and value != unset[name]:
            raise ValueError(
                f"model.{name} {value!r} has no meaning for model.family "
                f"{family.family!r}; leave it at {unset[name]!r}"
            )
    return family(**{name: value for name, value in fields.items() if name in known})


def text_model_config(config: ConfigDict) -> CaptionModelConfig:
    """Return the model section of a run that learns from captions, validated.

    Raises:
        ValueError: as `model_config`, or if the family is another one.
    """
    model = model_config(config)
    if not isinstance(model, CaptionModelConfig):
        raise ValueError(f"model.family {model.family!r} is not conditioned on captions")
    return model


# Setting → the setting that it belongs to, and the values with which it has an effect.
_BELONGS = {
    "gumbel_temperature": ("order", ("confidence",)),
    "halton_roll": ("order", ("halton",)),
    "guidance_power": ("guidance_schedule", ("power_cosine",)),
    "remasking_strength": ("remasking", ("cap", "rescale")),
    "remasking_choice": ("remasking", ("cap", "rescale")),
}


def _check_has_effect(sampler: SamplerConfig, name: str) -> None:
    owner, values = _BELONGS.get(name, ("order", (sampler.order,)))
    if getattr(sampler, owner) not in values:
        raise ValueError(
            f"{name} {getattr(sampler, name)} has no meaning with {owner} "
            f"{getattr(sampler, owner)!r}; leave it out, or set {owner} to "
            f"{' or '.join(map(repr, values))}"
        )


def sampler_config(config: ConfigDict, **changes: Any) -> SamplerConfig | AutoregressiveConfig:
    """Return the sampler section, validated, with `changes` applied; `None` means no change.

    It is of the masked decoder, or for a causal family of the autoregressive one.

    Raises:
        ValueError: if a value is not allowed, the decoder lacks a setting that differs from what
            the configuration's preset gives it, a change would have no effect beside the other
            settings, or there are more steps than tokens.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    fields = config.sampler.to_dict() | changes
    causal = find_model(config.model.family).causal
    kind: Any = AutoregressiveConfig if causal else SamplerConfig
    known = {field.name for field in dataclasses.fields(kind)}
    unset = schema.preset(config.preset).sampler
    for name, value in fields.items():
        if name not in known and (value != unset.get(name) or name in changes):
            raise ValueError(
                f"sampler.{name} {value!r} has no meaning for model.family "
                f"{config.model.family!r}; allowed: {', '.join(sorted(known))}"
            )
    sampler = kind(**{name: value for name, value in fields.items() if name in known})
    if isinstance(sampler, AutoregressiveConfig):
        return sampler
    for name in changes:
        _check_has_effect(sampler, name)
    gh, gw = config.model.grid_size
    if sampler.num_steps > gh * gw:
        raise ValueError(
            f"sampler.num_steps {sampler.num_steps} is out of range; allowed: 1 to {gh * gw}, the "
            f"number of tokens of a {gh}×{gw} grid"
        )
    return sampler


def find_tokenizer(family: str) -> Any:
    """Return the configuration class of a tokenizer family.

    Raises:
        ValueError: if there is no such family.
    """
    check_choice("tokenizer family", family, tuple(TOKENIZERS))
    return TOKENIZERS[family]


def tokenizer_config(config: ConfigDict) -> TokenizerConfig:
    """Return the tokenizer architecture section, validated; `None` is the family's default.

    Raises:
        ValueError: if the family is unknown, lacks a field that is set, or a value is not allowed.
    """
    fields = {name: value for name, value in config.vq.to_dict().items() if value is not None}
    family = find_tokenizer(fields.pop("family"))
    known = {field.name for field in dataclasses.fields(family)}
    if strangers := [f"vq.{name} {fields[name]!r}" for name in fields if name not in known]:
        raise ValueError(
            f"{', '.join(strangers)} has no meaning for vq.family {family.family!r}; leave it unset"
        )
    return family.from_dict(fields)


def create_tokenizer(family: str, fields: dict[str, Any], params: Any) -> Tokenizer:
    """Bind the parameters of a tokenizer of the named family.

    Raises:
        ValueError: if the family or a field is unknown.
    """
    return Tokenizer(config=find_tokenizer(family).from_dict(fields), params=params)


def resolve_path(path: str) -> pathlib.Path:
    """Return the directory that a configured path names; `asset:NAME` is inside the package.

    Raises:
        ValueError: if the path is empty or there is no such asset.
    """
    if not path:
        raise ValueError("tokenizer.path is empty; give a model directory or a run directory")
    if not path.startswith(ASSET):
        return pathlib.Path(path)
    assets = pathlib.Path(str(importlib.resources.files("maskgil_jax.assets")))
    names = sorted(p.name for p in assets.iterdir() if (p / "config.json").is_file())
    name = path.removeprefix(ASSET)
    if name not in names:
        raise ValueError(f"asset {name!r} is unknown; allowed: {', '.join(names) or 'none'}")
    return assets / name


def check_fit(config: ConfigDict, spec: TokenizerSpec, num_classes: int | None) -> None:
    """Raise a `ValueError` that lists all that does not fit between model, tokenizer and data.

    Args:
        config: the configuration.
        spec: the tokenizer's.
        num_classes: of the dataset; not checked if `None`.
    """
    size, factor = tuple(config.data.image_size), spec.downsample_factor
    problems = []
    if any(side % factor for side in size):
        problems.append(f"data.image_size {size} is not divisible by the tokenizer's {factor}")
    sizes = set(bucket_sizes(config)) - {size}
    if wrong := [bucket for bucket in sorted(sizes) if any(side % factor for side in bucket)]:
        problems.append(f"buckets {wrong} are not divisible by the tokenizer's {factor}")
    grid = tuple(side // factor for side in size)
    if tuple(config.model.grid_size) != grid:
        problems.append(
            f"model.grid_size {tuple(config.model.grid_size)} must be {grid}: images of "
            f"{size[0]}×{size[1]} pixels, {factor}× down-sampled by the tokenizer"
        )
    if config.model.codebook_size != spec.codebook_size:
        problems.append(
            f"model.codebook_size {config.model.codebook_size} must be the tokenizer's "
            f"{spec.codebook_size}"
        )
    if num_classes is not None and config.model.num_classes != num_classes:
        problems.append(
            f"model.num_classes {config.model.num_classes} must be the dataset's {num_classes}"
        )
    if problems:
        raise ValueError("model, tokenizer and data do not fit: " + "; ".join(problems))


def check_text_encoder(config: TokenModelConfig, encoder: TextEncoder) -> None:
    """Raise a `ValueError` unless a model reads the features of a text encoder."""
    if not isinstance(config, CaptionModelConfig) or config.text != "features":
        raise ValueError(
            f"a model of family {config.family!r} that reads "
            f"{getattr(config, 'text', 'classes')} has no use for a text encoder"
        )
    wanted, found = (config.text_width, config.text_length), (encoder.width, encoder.max_length)
    if wanted[0] != found[0] or wanted[1] < found[1]:
        raise ValueError(
            f"text encoder {encoder.name} gives up to {found[1]} features of width {found[0]}, but "
            f"the model reads up to {wanted[1]} of width {wanted[0]}"
        )


def read_prompts(
    config: CaptionModelConfig,
    prompts: Sequence[str],
    encoder: TextEncoder | None = None,
    *,
    batch_size: int = 64,
    cut: bool = False,
) -> Caption:
    """Turn prompts into the captions that a model reads.

    Args:
        config: architecture of the model.
        prompts: texts, none empty.
        encoder: gives the features, for a model that reads such.
        batch_size: prompts that go through it at a time; another number rounds differently.
        cut: whether longer prompts are cut, as captions to learn from are, and not refused.

    Raises:
        ValueError: as `tokenize_prompts`.
    """
    ids, lengths, _ = tokenize_prompts(config, prompts, encoder, cut=cut)
    if config.text == "bytes" or encoder is None:
        return Caption(ids, lengths)
    parts = [
        np.asarray(encoder.encode(ids[rows], lengths[rows]))
        for rows in (slice(first, first + batch_size) for first in range(0, len(ids), batch_size))
    ]
    return Caption(np.concatenate(parts), lengths)


def tokenize_prompts(
    config: CaptionModelConfig,
    prompts: Sequence[str],
    encoder: TextEncoder | None = None,
    *,
    cut: bool = False,
) -> Tokenized:
    """Turn prompts into bytes, or into ids of the text encoder, whichever a model reads.

    The arguments are those of `read_prompts`.

    Raises:
        ValueError: if a prompt is empty, no text or too long, or there is no text encoder for a
            model that needs one.
    """
    if config.text == "bytes":
        found, most = encode_bytes(prompts, config.text_length), f"{config.text_length} bytes"
    elif encoder is None:
        raise ValueError(
            "the model reads features of a text encoder; name the one that it was trained with, "
            "--text_encoder or `text_encoder=`"
        )
    else:
        found, most = encoder.tokenize(check_prompts(prompts)), f"{encoder.max_length} tokens"
    if not cut:
        _check_whole(prompts, found.cut, most)
    return found


def _check_whole(prompts: Sequence[str], lost: np.ndarray, most: str) -> None:
    if lost.any():
        number = int(lost.argmax())
        raise ValueError(
            f"prompt {number} {show(prompts[number])} of {len(prompts[number]):,} characters is "
            f"longer than the {most} that the model reads; shorten it"
        )


def training_apply(config: TokenModelConfig) -> Callable[..., Any]:
    """Return `(params, tokens, condition, dropout_rng) → (logits, output_norm)` with dropout on."""
    module = config.make_module()

    def apply(params, tokens, condition, dropout_rng):
        logits, variables = module.apply(
            {"params": params},
            tokens,
            condition,
            train=True,
            rngs={"dropout": dropout_rng},
            mutable=["intermediates"],
        )
        return logits, variables["intermediates"]["transformer"]["output_norm"][0]

    return apply


def make_predictor(
    config: TokenModelConfig, params: Any, grid_size: tuple[int, int] | None = None
) -> Predictor:
    """Return what the decoder asks of a model, on a grid; the configured one if `None`."""
    module, variables = config.make_module(), {"params": params}
    gh, gw = grid_size or config.grid_size

    def features(tokens, condition):
        return module.apply(variables, tokens.reshape(-1, gh, gw), condition, method="features")

    def head(features, positions):
        return module.apply(variables, features, positions, method="logits")

    return Predictor(features=features, head=head)


def make_causal_predictor(
    config: TokenModelConfig, params: Any, grid_size: tuple[int, int] | None = None
) -> CausalPredictor:
    """Return what the autoregressive decoder asks of a model, on a grid; the configured if `None`.

    Raises:
        ValueError: if the model is not causal.
    """
    if not isinstance(config, CausalModelConfig):
        causal = ", ".join(name for name, family in MODELS.items() if family.causal)
        raise ValueError(
            f"a model of family {config.family!r} does not predict token by token; families that "
            f"do: {causal}"
        )
    model = config.make_cached(params, grid_size)
    return CausalPredictor(model.prefix_length, model.start, model.step)


def init_model(config: TokenModelConfig) -> Callable[[Any], Any]:
    """Return `rng → params`, boxed with their logical axis names."""
    gh, gw = config.grid_size

    def init(rng):
        tokens = jnp.zeros((1, gh, gw), jnp.int32)
        return config.make_module().init(rng, tokens, config.example_condition())["params"]

    return init
