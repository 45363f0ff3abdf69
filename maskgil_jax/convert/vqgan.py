"""What the tables of the convolutional tokenizers share: their blocks' rules, and their sizes.

The original implementations call the parts of a block alike and differ in how they call and number
levels: `Names` tells VQGANs apart, and `make_vq_family` makes the rest of a family from it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from maskgil_jax.convert.inference import SizeReader
from maskgil_jax.convert.rules import Family, Rule, StateDict, TensorLike
from maskgil_jax.tokenizers.base import TokenizerConfig
from maskgil_jax.tokenizers.vq import VQConfig

# Far more than any tokenizer has: each level halves the grid.
MAX_LEVELS, MAX_BLOCKS = 8, 32
# The tensors, each with its axis, that tell how wide the latents and the images are.
LATENT_WIDTHS = (
    (r"encoder\.conv_out\.weight", 0),
    (r"encoder\.conv_out\.bias", 0),
    (r"decoder\.conv_in\.weight", 1),
)
IMAGE_CHANNELS = ((r"encoder\.conv_in\.weight", 1), (r"decoder\.conv_out\.bias", 0))


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """How an implementation of the VQGAN names what it has beside the parts of a block.

    Attributes:
        down: the encoder's levels.
        up: the decoder's levels.
        up_path: the decoder's levels in our tree, whose level 0 is the lowest resolution, where
            decoding starts.
        blocks: the residual blocks of a level.
        middle: the two residual blocks in the middle, and the attention between them.
    """

    down: str
    up: str
    up_path: str
    blocks: str
    middle: tuple[str, str, str]

    def rules(self, *, level_attention: bool) -> tuple[Rule, ...]:
        """Return the table of a tokenizer."""
        return (
            *self._net_rules("encoder", self.down, "down_{i}", "downsample", level_attention),
            *self._net_rules("decoder", self.up, self.up_path, "upsample", level_attention),
            Rule("quantize.embedding.weight", "quantizer/codebook", "k z -> k z"),
            *conv_rules("{c:quant_conv|post_quant_conv}", "{c:quant_conv|post_quant_conv}"),
        )

    def _net_rules(
        self, side: str, levels: str, ours: str, resample: str, level_attention: bool
    ) -> tuple[Rule, ...]:
        level, path = f"{side}.{levels}.{{i}}", f"{side}/{ours}"
        first, attention, second = (f"{side}.mid.{name}" for name in self.middle)
        rules = (
            *end_rules(side),
            *res_rules(f"{level}.{self.blocks}.{{j}}", f"{path}_res_{{j}}"),
            *conv_rules(f"{level}.{resample}.conv", f"{path}_{resample}"),
            *res_rules(first, f"{side}/mid_res_0"),
            *attn_rules(attention, f"{side}/mid_attn"),
            *res_rules(second, f"{side}/mid_res_1"),
        )
        attentions = attn_rules(f"{level}.attn.{{j}}", f"{path}_attn_{{j}}")
        return rules + attentions if level_attention else rules


# taming-transformers, whose decoder's level 0 is the highest resolution.
TAMING = Names(
    down="down",
    up="up",
    up_path="up_{~i}",
    blocks="block",
    middle=("block_1", "attn_1", "block_2"),
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


def abstract_tree(config: TokenizerConfig) -> dict[str, TensorLike]:
    """Return path -> shape and dtype of every parameter, without computing any."""
    spec = config.spec
    side = spec.downsample_factor
    images = jax.ShapeDtypeStruct((1, side, side, spec.image_channels), "float32")
    tree = jax.eval_shape(config.make_module().init, jax.random.key(0), images)["params"]
    return flatten_dict(nn.unbox(tree), sep="/")


def make_vq_family(
    config_type: type[VQConfig],
    names: Names,
    *,
    find_problem: Callable[[StateDict], str | None] = lambda state: None,
    **fields: Any,
) -> Family:
    """Return the family of a VQGAN tokenizer, whose sizes are inferred from the shapes.

    Args:
        config_type: the tokenizer's; its defaults are the layout, which shapes do not tell.
        names: the implementation's.
        find_problem: says what else a state dict lacks, if anything.
        **fields: how its files are wrapped, and the like.
    """
    usual = config_type()
    rules = names.rules(level_attention=usual.level_attention)

    def infer_config(state: StateDict) -> VQConfig:
        read = SizeReader(config_type.family, state, rules)
        if problem := find_problem(state):
            read.problem(problem)
        channels, multipliers, blocks = read_levels(
            read, rf"encoder\.{names.down}\.", rf"\.{names.blocks}\."
        )
        codebook, embed_dim = ((r"quantize\.embedding\.weight", axis) for axis in (0, 1))
        return read.build(
            config_type,
            channels=channels,
            channel_multipliers=multipliers,
            num_res_blocks=blocks,
            codebook_size=read.size("codebook size", codebook),
            embed_dim=read.size(
                "code width", embed_dim, (r"quant_conv\.weight", 0), (r"quant_conv\.bias", 0)
            ),
            latent_channels=read.size("latent width", *LATENT_WIDTHS),
            image_channels=read.size("number of image channels", *IMAGE_CHANNELS),
        )

    return Family(
        name=config_type.family,
        kind="tokenizer",
        architecture=config_type.family,
        rules=rules,
        infer_config=infer_config,
        abstract_tree=abstract_tree,
        config_type=config_type,
        layout={
            "l2_normalize": usual.l2_normalize,
            "level_attention": usual.level_attention,
        },
        **fields,
    )
