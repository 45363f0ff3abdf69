"""What the tables of the convolutional tokenizers share: their blocks' rules, and their sizes.

The original implementations call the parts of a block alike and differ in how they number levels.
"""

from typing import Any, TypeVar

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from maskgil_jax.convert.inference import SizeReader
from maskgil_jax.convert.rules import ConversionError, Rule, TensorLike
from maskgil_jax.tokenizers.base import TokenizerConfig
from maskgil_jax.tokenizers.vq import VQConfig

# Far more than any tokenizer has: each level halves the grid.
MAX_LEVELS, MAX_BLOCKS = 8, 32
VQConfigType = TypeVar("VQConfigType", bound=VQConfig)


def conv_rules(key: str, path: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """Return the rules of a convolution."""
    weight = Rule(f"{key}.weight", f"{path}/kernel", "kh kw i o -> o i kh kw")
    return (weight, Rule(f"{key}.bias", f"{path}/bias", "o -> o")) if bias else (weight,)


def linear_rules(key: str, path: str) -> tuple[Rule, ...]:
    """Return the rules of a matrix with its bias."""
    return (
        Rule(f"{key}.weight", f"{path}/kernel", "i o -> o i"),
        Rule(f"{key}.bias", f"{path}/bias", "o -> o"),
    )


def norm_rules(key: str, path: str) -> tuple[Rule, ...]:
    """Return the rules of a norm with scale and bias."""
    return (
        Rule(f"{key}.weight", f"{path}/scale", "c -> c"),
        Rule(f"{key}.bias", f"{path}/bias", "c -> c"),
    )


def res_rules(key: str, path: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """Return the rules of a residual block, whose shortcut need not exist."""
    return (
        *norm_rules(f"{key}.{{c:norm1|norm2}}", f"{path}/{{c:norm1|norm2}}"),
        *conv_rules(f"{key}.{{c:conv1|conv2}}", f"{path}/{{c:conv1|conv2}}", bias=bias),
        *conv_rules(f"{key}.nin_shortcut", f"{path}/shortcut", bias=bias),
    )


def attn_rules(key: str, path: str) -> tuple[Rule, ...]:
    """Return the rules of an attention block."""
    return (
        *norm_rules(f"{key}.norm", f"{path}/norm"),
        *conv_rules(f"{key}.{{c:q|k|v}}", f"{path}/{{c:q|k|v}}"),
        *conv_rules(f"{key}.proj_out", f"{path}/out"),
    )


def end_rules(side: str) -> tuple[Rule, ...]:
    """Return the rules of the first convolution of a net, and of its last with the norm before."""
    return (
        *conv_rules(f"{side}.{{c:conv_in|conv_out}}", f"{side}/{{c:conv_in|conv_out}}"),
        *norm_rules(f"{side}.norm_out", f"{side}/norm_out"),
    )


QUANTIZER_RULES = (
    Rule("quantize.embedding.weight", "quantizer/codebook", "k z -> k z"),
    *conv_rules("{c:quant_conv|post_quant_conv}", "{c:quant_conv|post_quant_conv}"),
)


def taming_rules(*, level_attention: bool) -> tuple[Rule, ...]:
    """Return the table of a VQGAN as taming-transformers names it.

    Its decoder's level 0 is the highest resolution; ours is the lowest, where decoding starts.
    """

    def side_rules(side: str, level: str, ours: str, resample: str) -> tuple[Rule, ...]:
        levels, path = f"{side}.{level}.{{i}}", f"{side}/{ours}"
        rules = (
            *end_rules(side),
            *res_rules(f"{levels}.block.{{j}}", f"{path}_res_{{j}}"),
            *conv_rules(f"{levels}.{resample}.conv", f"{path}_{resample}"),
            *res_rules(f"{side}.mid.block_1", f"{side}/mid_res_0"),
            *attn_rules(f"{side}.mid.attn_1", f"{side}/mid_attn"),
            *res_rules(f"{side}.mid.block_2", f"{side}/mid_res_1"),
        )
        attention = attn_rules(f"{levels}.attn.{{j}}", f"{path}_attn_{{j}}")
        return rules + attention if level_attention else rules

    return (
        *side_rules("encoder", "down", "down_{i}", "downsample"),
        *side_rules("decoder", "up", "up_{~i}", "upsample"),
        *QUANTIZER_RULES,
    )


def read_levels(read: SizeReader, level: str, block: str) -> tuple[int, tuple[int, ...], int]:
    """Return the encoder's channels, its levels' multipliers and its blocks per level.

    Args:
        read: the state dict; a width that is no multiple of the channels is reported there.
        level: how the key of a level begins, as a regular expression.
        block: what follows the level's number in the key of a residual block.
    """
    conv_in = r"encoder\.conv_in\."
    channels = read.size("width", (conv_in + "weight", 0), (conv_in + "bias", 0))
    levels = read.count("number of levels", level + r"(\d+)\.", MAX_LEVELS)
    widths = []
    for i in range(levels):
        convs = rf"{level}{i}{block}\d+\.conv[12]\."
        widths.append(read.size(f"width of level {i}", (convs + "weight", 0), (convs + "bias", 0)))
    if any(width % channels for width in widths):
        read.problem(f"level widths {widths} are no multiples of encoder.conv_in's {channels}")
    blocks = read.count("depth", rf"{level}0{block}(\d+)\.", MAX_BLOCKS)
    return channels, tuple(width // channels for width in widths), blocks


def infer_vq_config(
    config_type: type[VQConfigType], read: SizeReader, level: str, block: str
) -> VQConfigType:
    """Infer the sizes of a VQGAN tokenizer; `level` and `block` are as `read_levels` has them.

    Raises:
        ConversionError: tensors that carry the sizes are missing, or the sizes make no model.
    """
    channels, multipliers, blocks = read_levels(read, level, block)
    codebook, embed_dim = ((r"quantize\.embedding\.weight", axis) for axis in (0, 1))
    conv_in, conv_out = r"encoder\.conv_in\.", r"encoder\.conv_out\."
    latents = [(conv_out + "weight", 0), (conv_out + "bias", 0), (r"decoder\.conv_in\.weight", 1)]
    sizes: dict[str, Any] = {
        "channels": channels,
        "channel_multipliers": multipliers,
        "num_res_blocks": blocks,
        "codebook_size": read.size("codebook size", codebook),
        "embed_dim": read.size(
            "code width", embed_dim, (r"quant_conv\.weight", 0), (r"quant_conv\.bias", 0)
        ),
        "latent_channels": read.size("latent width", *latents),
        "image_channels": read.size(
            "number of image channels", (conv_in + "weight", 1), (r"decoder\.conv_out\.bias", 0)
        ),
    }
    read.finish()
    try:
        return config_type(**sizes)
    except ValueError as error:
        name = config_type.family
        raise ConversionError(f"the sizes in the file make no {name}: {error}") from error


def abstract_tree(config: TokenizerConfig) -> dict[str, TensorLike]:
    """Return path -> shape and dtype of every parameter, without computing any."""
    spec = config.spec
    side = spec.downsample_factor
    images = jax.ShapeDtypeStruct((1, side, side, spec.image_channels), "float32")
    tree = jax.eval_shape(config.make_module().init, jax.random.key(0), images)["params"]
    return flatten_dict(nn.unbox(tree), sep="/")
