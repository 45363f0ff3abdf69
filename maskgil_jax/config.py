"""The whole configuration schema: `default()` names every field, presets fix every choice.

A config file (`configs/*.py`) starts from `preset(name)` and changes what its run changes. The
result is locked: an unknown field is an error that names the nearest one. `build/` turns it into
frozen dataclasses; nothing below `build/` sees a `ConfigDict`.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# What the sources leave open or contradict, fixed three ways. `recommended` is the default.
# Reference: `paper` MaskGIL sections 2.3, 3, 4.2, 4.3; `released` the published code.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "model.condition": "first",
        "model.rope": "2d",
        "model.cond_rope": "identity",
        "model.embeddings": "separate",
        "training.loss_tokens": "masked",
        "training.mask_draw": "bernoulli",
        "sampler.schedule": "arccos",
        "sampler.schedule_form": "increments",
        "sampler.rescale": True,
        "sampler.guidance_scale": 2.0,
        "sampler.guidance_schedule": "constant",
        "sampler.temperature": 1.0,
        "sampler.gumbel_temperature": 0.0,
    },
    "released": {
        "model.condition": "last",
        "model.rope": "1d",
        "model.cond_rope": "table",
        "model.embeddings": "shared",
        "training.loss_tokens": "all",
        "training.mask_draw": "bernoulli",
        "sampler.schedule": "arccos",
        "sampler.schedule_form": "increments",
        "sampler.rescale": False,
        "sampler.guidance_scale": 3.0,
        "sampler.guidance_schedule": "linear",
        "sampler.temperature": 1.0,
        "sampler.gumbel_temperature": 4.5,
    },
    "recommended": {
        "model.condition": "first",
        "model.rope": "2d",
        "model.cond_rope": "identity",
        "model.embeddings": "separate",
        "training.loss_tokens": "masked",
        "training.mask_draw": "exact",
        "sampler.schedule": "arccos",
        "sampler.schedule_form": "increments",
        "sampler.rescale": True,
        "sampler.guidance_scale": 2.0,
        "sampler.guidance_schedule": "linear",
        "sampler.temperature": 1.0,
        "sampler.gumbel_temperature": 4.5,
    },
}


def default() -> ConfigDict:
    """Return every field with its default: MaskGIL-B on ImageNet 256, preset `recommended`."""
    config = ConfigDict()
    config.kind = "maskgil"  # what is trained: maskgil | tokenizer
    config.preset = "recommended"  # which preset the config started from (for the record)
    # Run or model directory, here or hf://…, whose parameters it begins with; "": random ones.
    config.init_from = ""
    config.seed = 0  # seed of parameters, data order, masks and dropout

    # See MaskGILConfig, MaskGILTextConfig, BidirectionalTransformerConfig, LlamaGenConfig,
    # LlamaGenTextConfig.
    model = config.model = ConfigDict()
    # maskgil (the Bidirectional LLaMA, of classes) | maskgil-text (the same, of captions) |
    # bidirectional-transformer | llamagen (causal, of classes) | llamagen-text (of captions)
    model.family = "maskgil"
    model.num_layers = 12
    model.width = 768
    model.num_heads = 12
    model.mlp_width = 2048
    model.codebook_size = 16384  # must be the tokenizer's
    model.num_classes = 1000  # must be the dataset's
    model.grid_size = (16, 16)  # tokens per column and row: image size / downsample factor
    model.condition = "first"  # place of the class token: first | last
    model.rope = "2d"  # 2d | 1d
    model.cond_rope = "identity"  # rotary row of the class token: identity | zero | table;
    # of a caption's tokens: identity | zero, of maskgil-text also diagonal
    model.rope_base = 10000.0
    model.rope_interpolation = False  # spread other grids over the trained positions (2d)
    model.embeddings = "separate"  # separate token and label tables | one shared table
    model.qk_norm = "none"  # none | layer | rms, over the head dimension, before RoPE
    model.post_norm = "none"  # none | rms | layer, on the outputs of attention and MLP
    model.norm_eps = 1e-5
    model.dropout = 0.1  # on the outputs of attention and MLP
    model.embedding_dropout = 0.0  # on the embedded sequence
    model.dtype = "bfloat16"  # of the computation: bfloat16 | float32; parameters are float32
    model.remat = "none"  # recompute in the backward pass: none | full | dots
    model.scan_unroll = 1  # layers per iteration of the scan
    model.attention = "xla"  # xla | cudnn (GPU, bfloat16)
    model.head_alignment = 128  # head rows are padded to a multiple while computing
    model.text = "features"  # captions: features of text.encoder | bytes, read by the model itself
    model.text_width = 2048  # channels of a feature, or of a byte
    model.text_length = 120  # features, or bytes, that a caption may have
    model.byte_layers = 2  # blocks of the encoder of bytes
    model.byte_heads = 4
    model.byte_patch = 1  # bytes that make one prefilling token
    model.ngram_rows = 2048  # of the tables of two to five bytes in a row; 0: bytes alone
    model.null_length = 1  # tokens of the learned null caption of maskgil-text

    tokenizer = config.tokenizer = ConfigDict()
    # Model directory, here or hf://owner/repo[/folder][@revision], or run directory of a tokenizer;
    # asset:NAME is shipped.
    tokenizer.path = ""
    tokenizer.batch_size = 64  # images at a time when a dataset is encoded up front

    text = config.text = ConfigDict()  # of models with text "features"; tokens: model.text_length
    # Model directory, here or hf://…, or one of the library transformers; may be "" where stored
    # tokens hold the features.
    text.encoder = ""
    text.hidden_layer = -1  # whose output the features are: 0 embeddings, n block n, -1 the last
    text.dtype = placeholder(str)  # of the encoder: float32 | bfloat16; None: as stored

    vq = config.vq = ConfigDict()  # architecture, for kind "tokenizer"; None: as the family has it
    vq.family = "llamagen-vq"  # llamagen-vq | maskgit-vq | chameleon-vq | open-magvit2
    vq.codebook_size = placeholder(int)  # number of codes
    vq.embed_dim = placeholder(int)  # width of a code
    vq.channels = placeholder(int)  # width of the nets at full resolution
    vq.channel_multipliers = placeholder(tuple)  # width of each level over `channels`
    vq.num_res_blocks = placeholder(int)  # per level of the encoder
    vq.latent_channels = placeholder(int)  # width around the quantiser
    vq.image_channels = placeholder(int)
    vq.dropout = placeholder(float)  # inside residual blocks
    vq.l2_normalize = placeholder(bool)  # codes on the unit sphere
    vq.level_attention = placeholder(bool)  # attention at the lowest resolution, not only mid-net
    vq.dtype = placeholder(str)  # of the convolutions: float32 | bfloat16

    vq_loss = config.vq_loss = ConfigDict()  # see TokenizerLossWeights, AdversarialConfig
    vq_loss.reconstruction_kind = "l2"  # l2 | l1
    vq_loss.reconstruction = 1.0
    vq_loss.perceptual = 0.0  # weight of LPIPS, the distance of VGG16 features; 0 needs no weights
    # Model directory of its weights, here or hf://…; see tools/convert_checkpoint.py.
    vq_loss.lpips_path = ""
    vq_loss.codebook = 1.0  # must be 0 where the quantiser is lookup-free
    vq_loss.commitment = 0.25
    vq_loss.entropy = 0.0
    vq_loss.entropy_temperature = 0.01
    vq_loss.adversarial = 0.0  # weight of the adversarial term; 0 trains without a discriminator
    vq_loss.adaptive_weight = False  # times the ratio of gradient norms at the decoder's last layer
    vq_loss.discriminator_start = 20_000  # updates done before the discriminator begins
    vq_loss.discriminator_loss = "hinge"  # hinge | vanilla
    vq_loss.discriminator_layers = 3  # convolutions that halve the resolution: patches of 70 pixels
    vq_loss.discriminator_channels = 64  # width of its first convolution

    data = config.data = ConfigDict()
    data.name = "folder"  # digits | canvases | folder | tfds | tokens | captions
    # folder: root of <split>/<class>/*.JPEG; tfds: data_dir; tokens: their folder; captions: see
    # docs/text_data.md.
    data.path = ""
    data.tfds_name = "imagenet2012"  # a prepared TFDS dataset, read without TensorFlow
    data.format = ""  # of captions: folder | jsonl | webdataset | tfds
    data.caption_key = "captions/text"  # of captions in a TFDS dataset: feature that holds the text
    data.allow_incomplete = False  # captions: leave out and count what lacks an image or a text
    data.buckets = "none"  # captions: none | area, sizes of about the area of image_size | listed
    data.bucket_multiple = 32  # unit of the sides of buckets in pixels
    data.bucket_max_ratio = 4.0  # longer side of a bucket over its shorter side, at most
    data.bucket_sizes = ()  # the listed buckets, (height, width) in pixels
    data.split = "train"
    data.image_size = (256, 256)  # height and width in pixels
    data.crop = "center"  # center | random (80 to 100 % of the shorter side)
    data.flip = True  # random horizontal flips; False for tokens, whose crops were chosen before
    data.shift_px = 0.0  # random shifts up to this many pixels
    data.rotation_deg = 0.0  # random rotations up to this angle
    data.scale_range = (1.0, 1.0)  # random scalings
    data.max_bad_images = 0  # unreadable images to replace before giving up
    data.cache_tokens = False  # encode the whole dataset once, into memory, before training
    data.cache_copies = 1  # augmented copies of every image in that cache
    data.num_records = 0  # the first so many of the dataset, or of each bucket; 0 is all
    data.check_records = True  # tokens: read every record once before training
    data.num_threads = 8  # reading threads of each process
    data.prefetch = 2  # batches put on the devices ahead of time

    training = config.training = ConfigDict()
    training.batch_size = 256  # images per update, over all processes
    training.num_steps = 300_000  # updates
    training.accumulation_steps = 1  # parts in which the gradient of a batch is computed
    training.loss_tokens = "masked"  # masked | all
    training.label_smoothing = 0.1
    training.condition_dropout = 0.1  # share of labels replaced by "no condition"
    training.mask_schedule = "arccos"  # curve of the masked share
    training.mask_draw = "exact"  # exact | bernoulli
    training.ema_decay = 0.0  # decay of the parameter average; 0 keeps none

    optimizer = config.optimizer = ConfigDict()  # see OptimizerConfig
    optimizer.name = "adamw"  # adamw | muon (of matrices inside of a transformer)
    optimizer.learning_rate = 1e-4
    optimizer.rate_schedule = "constant"  # constant | cosine
    optimizer.warmup_steps = 0
    optimizer.betas = (0.9, 0.96)
    optimizer.epsilon = 1e-8
    optimizer.weight_decay = 1e-5
    optimizer.decay = "all"  # all | matrices
    optimizer.clip_norm = 1.0  # 0 switches clipping off

    mesh = config.mesh = ConfigDict()  # devices per axis; -1 takes what is left
    mesh.data = -1
    mesh.fsdp = 1
    mesh.tensor = 1

    logging = config.logging = ConfigDict()
    logging.every = 100  # updates between progress lines and TensorBoard scalars
    logging.sample_every = 10_000  # updates between sample grids; 0 draws them only at the end
    logging.checkpoint_every = 5_000  # updates between checkpoints
    logging.keep_checkpoints = 2

    sampler = config.sampler = ConfigDict()  # see SamplerConfig; AutoregressiveConfig if causal
    sampler.num_steps = 8
    sampler.schedule = "arccos"  # root | linear | cosine | square | arccos
    sampler.schedule_form = "increments"  # increments | mask_ratio
    sampler.rescale = True  # scale the schedule to the tokens unknown at the start
    sampler.guidance_scale = 2.0  # 1 is no guidance
    sampler.guidance_schedule = "linear"  # constant | linear | power_cosine
    sampler.guided_tokens = 0  # of a causal model: guidance of so many tokens only; 0: of all
    sampler.guidance_power = 1.0
    sampler.guidance_start = 0.0  # guided from this share of the steps on …
    sampler.guidance_stop = 1.0  # … and up to this one
    sampler.temperature = 1.0
    sampler.temperature_annealing = (
        0.0  # added in full before the first step, not at all in the last
    )
    sampler.top_k = 0  # 0 is all codes
    sampler.top_p = 1.0
    sampler.order = "confidence"  # confidence | halton | random
    sampler.gumbel_temperature = 4.5  # of the order by confidence
    sampler.halton_roll = False
    sampler.remasking = "none"  # none | cap | rescale
    sampler.remasking_strength = 0.05
    sampler.remasking_choice = "random"  # random | confidence

    evaluation = config.evaluation = ConfigDict()  # of samples while a model trains
    evaluation.every_steps = 0  # updates between, and after the last; 0: never, no field is read
    evaluation.protocol = "adm"  # adm | val | train | digits | digits_train; docs/evaluation.md
    evaluation.metrics = ("fid",)  # such as fid, is, precision, recall; () is the protocol's
    evaluation.num_images = 5000  # samples, as many of each class; FID of fewer is higher
    evaluation.batch_size = 64  # images at a time
    evaluation.reference = ""  # .npz or folder the samples are compared with; digits need none
    evaluation.inception = ""  # weights of the InceptionV3 of FID; digits need none
    evaluation.keep_best = ""  # metric whose best parameters are kept in WORKDIR/best; "": none

    report = config.report = ConfigDict()  # what is measured when a run has ended
    report.name = "none"  # none | digits | canvases | captioned_canvases
    report.num_samples = 1000
    report.batch_size = 250
    return config.lock()


def preset(name: str = "recommended") -> ConfigDict:
    """Return the default configuration with all choices of a preset.

    Args:
        name: `paper`, `released` or `recommended`.

    Raises:
        ValueError: if there is no such preset.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"preset {name!r} is unknown; allowed: {', '.join(PRESETS)}{hint}")
    config = default()
    config.preset = name
    config.update_from_flattened_dict(PRESETS[name])
    return config


def to_json(config: ConfigDict) -> str:
    """Return the configuration as JSON, the form a run directory keeps."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """Return the configuration that `to_json` wrote.

    Raises:
        ValueError: if a field is unknown; fields added since take their defaults.
    """
    config = default()
    _update(config, json.loads(text), "")
    return config


def _update(config: ConfigDict, values: Mapping[str, Any], prefix: str) -> None:
    for name, value in values.items():
        if name not in config:
            raise ValueError(
                f"the run's configuration has the field {prefix}{name}, which this version of "
                "maskgil_jax does not know; use the version that wrote it"
            )
        if isinstance(config[name], ConfigDict):
            _update(config[name], value, f"{prefix}{name}.")
        else:
            config[name] = _freeze(value)


def _freeze(value: Any) -> Any:
    """Return a list and the lists in it as tuples, which JSON does not know."""
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


def diff(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Return one line for every field in which two configurations differ."""
    a, b = _flatten(old.to_dict()), _flatten(new.to_dict())
    return [f"{k}: {a.get(k)!r} → {b.get(k)!r}" for k in sorted(a | b) if a.get(k) != b.get(k)]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _freeze(value)
    return flat
