"""LlamaGen-VQ checkpoints (`vq_ds16_c2i.pt`, `vq_ds8_c2i.pt` and any other width).

Reference: FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py.
"""

from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from maskgil_jax.convert.inference import SizeReader
from maskgil_jax.convert.rules import ConversionError, Family, Rule, StateDict, TensorLike
from maskgil_jax.tokenizers.llamagen_vq import LlamaGenVQConfig

NAME = "llamagen-vq"
# Far more than any tokenizer has: each level halves the grid.
_MAX_LEVELS, _MAX_BLOCKS = 8, 32


def _conv_rules(key: str, path: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{key}.weight", f"{path}/kernel", "kh kw i o -> o i kh kw"),
        Rule(f"{key}.bias", f"{path}/bias", "o -> o"),
    )


def _norm_rules(key: str, path: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{key}.weight", f"{path}/scale", "c -> c"),
        Rule(f"{key}.bias", f"{path}/bias", "c -> c"),
    )


def _res_rules(key: str, path: str) -> tuple[Rule, ...]:
    return (
        *_norm_rules(f"{key}.{{c:norm1|norm2}}", f"{path}/{{c:norm1|norm2}}"),
        *_conv_rules(f"{key}.{{c:conv1|conv2}}", f"{path}/{{c:conv1|conv2}}"),
        *_conv_rules(f"{key}.nin_shortcut", f"{path}/shortcut"),
    )


def _attn_rules(key: str, path: str) -> tuple[Rule, ...]:
    return (
        *_norm_rules(f"{key}.norm", f"{path}/norm"),
        *_conv_rules(f"{key}.{{c:q|k|v}}", f"{path}/{{c:q|k|v}}"),
        *_conv_rules(f"{key}.proj_out", f"{path}/out"),
    )


def _side_rules(side: str, block: str, resample: str) -> tuple[Rule, ...]:
    """Rules of the encoder or the decoder, which differ only in the names of their levels."""
    return (
        *_conv_rules(f"{side}.{{c:conv_in|conv_out}}", f"{side}/{{c:conv_in|conv_out}}"),
        *_norm_rules(f"{side}.norm_out", f"{side}/norm_out"),
        *_res_rules(f"{side}.conv_blocks.{{i}}.res.{{j}}", f"{side}/{block}_{{i}}_res_{{j}}"),
        *_attn_rules(f"{side}.conv_blocks.{{i}}.attn.{{j}}", f"{side}/{block}_{{i}}_attn_{{j}}"),
        *_conv_rules(
            f"{side}.conv_blocks.{{i}}.{resample}.conv", f"{side}/{block}_{{i}}_{resample}"
        ),
        *_res_rules(f"{side}.mid.0", f"{side}/mid_res_0"),
        *_attn_rules(f"{side}.mid.1", f"{side}/mid_attn"),
        *_res_rules(f"{side}.mid.2", f"{side}/mid_res_1"),
    )


RULES = (
    *_side_rules("encoder", "down", "downsample"),
    *_side_rules("decoder", "up", "upsample"),
    Rule("quantize.embedding.weight", "quantizer/codebook", "k z -> k z"),
    *_conv_rules("{c:quant_conv|post_quant_conv}", "{c:quant_conv|post_quant_conv}"),
)


def infer_config(state: StateDict) -> LlamaGenVQConfig:
    """Infer the sizes of a LlamaGen-VQ from the shapes of its state dict.

    Raises:
        ConversionError: tensors that carry the sizes are missing, or the sizes make no model.
    """
    read = SizeReader(NAME, state, RULES)
    conv_in, conv_out = r"encoder\.conv_in\.", r"encoder\.conv_out\."
    channels = read.size("width", (conv_in + "weight", 0), (conv_in + "bias", 0))
    levels = read.count("number of levels", r"encoder\.conv_blocks\.(\d+)\.", _MAX_LEVELS)
    level = r"encoder\.conv_blocks\.{}\.res\.\d+\."
    widths = []
    for i in range(levels):
        block = level.format(i)
        parts = [(block + part, 0) for part in (r"conv[12]\.weight", r"conv[12]\.bias")]
        widths.append(read.size(f"width of level {i}", *parts))
    if any(width % channels for width in widths):
        read.problem(f"level widths {widths} are no multiples of encoder.conv_in's {channels}")
    codebook, embed_dim = ((r"quantize\.embedding\.weight", axis) for axis in (0, 1))
    latents = [(conv_out + "weight", 0), (conv_out + "bias", 0), (r"decoder\.conv_in\.weight", 1)]
    sizes: dict[str, Any] = {
        "codebook_size": read.size("codebook size", codebook),
        "embed_dim": read.size(
            "code width", embed_dim, (r"quant_conv\.weight", 0), (r"quant_conv\.bias", 0)
        ),
        "num_res_blocks": read.count(
            "depth", r"encoder\.conv_blocks\.0\.res\.(\d+)\.", _MAX_BLOCKS
        ),
        "latent_channels": read.size("latent width", *latents),
        "image_channels": read.size(
            "number of image channels", (conv_in + "weight", 1), (r"decoder\.conv_out\.bias", 0)
        ),
    }
    read.finish()
    multipliers = tuple(width // channels for width in widths)
    try:
        return LlamaGenVQConfig(channels=channels, channel_multipliers=multipliers, **sizes)
    except ValueError as error:
        raise ConversionError(f"the sizes in the file make no {NAME}: {error}") from error


def abstract_tree(config: LlamaGenVQConfig) -> dict[str, TensorLike]:
    """Return path -> shape and dtype of every parameter, without computing any."""
    side = config.downsample_factor
    images = jax.ShapeDtypeStruct((1, side, side, config.image_channels), "float32")
    tree = jax.eval_shape(config.make_module().init, jax.random.key(0), images)["params"]
    return flatten_dict(nn.unbox(tree), sep="/")


FAMILY = Family(
    name=NAME,
    kind="tokenizer",
    architecture=NAME,
    rules=RULES,
    infer_config=infer_config,
    abstract_tree=abstract_tree,
    config_type=LlamaGenVQConfig,
    wrappers=("ema", "model", "state_dict"),
    export_wrapper="model",
    # Usage statistics of training; the original registers 65536 entries for any codebook.
    dropped={"quantize.codebook_used": (65536,)},
)
