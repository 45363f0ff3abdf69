"""Open-MAGVIT2 checkpoints: `imagenet_256_L.ckpt` of TencentARC and any other width.

They are files of Lightning that hold the trained weights, and a moving average of them whose names
have lost their dots. The average is what the published figures were measured with, so it is taken
where there is one.

Reference: TencentARC/SEED-Voken, src/Open_MAGVIT2: models/lfqgan.py, modules/ema.py and
modules/diffusionmodules/improved_model.py.
"""

import dataclasses
from typing import Any

from maskgil_jax.convert import vqgan
from maskgil_jax.convert.inference import SizeReader
from maskgil_jax.convert.rules import Family, Rule, StateDict
from maskgil_jax.tokenizers.open_magvit2 import OpenMAGVIT2Config

NAME = "open-magvit2"
_AVERAGE = "model_ema."


def _res_rules(key: str, path: str) -> tuple[Rule, ...]:
    return vqgan.res_rules(key, path, bias=False)


RULES = (
    *vqgan.conv_rules("encoder.conv_in", "encoder/conv_in", bias=False),
    *vqgan.conv_rules("encoder.conv_out", "encoder/conv_out"),
    *vqgan.conv_rules(
        "decoder.{c:conv_in|conv_out}",
        "decoder/{c:conv_in|conv_out}",
    ),
    *vqgan.norm_rules("{s:encoder|decoder}.norm_out", "{s:encoder|decoder}/norm_out"),
    *_res_rules("{s:encoder|decoder}.mid_block.{j}", "{s:encoder|decoder}/mid_res_{j}"),
    *_res_rules("encoder.down.{i}.block.{j}", "encoder/down_{i}_res_{j}"),
    *vqgan.conv_rules("encoder.down.{i}.downsample", "encoder/down_{i}_downsample"),
    *_res_rules("decoder.up.{i}.block.{j}", "decoder/up_{~i}_res_{j}"),
    *vqgan.conv_rules("decoder.up.{i}.upsample.conv1", "decoder/up_{~i}_upsample"),
    *vqgan.linear_rules(
        "decoder.adaptive.{i}.{c:gamma|beta}", "decoder/up_{~i}_norm/{c:gamma|beta}"
    ),
)
_DOTLESS = [(dataclasses.replace(rule, key=rule.key.replace(".", "")), rule) for rule in RULES]


def rename(state: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Put the moving averages, where there are any, in place of the weights they are of."""
    averages = {}
    for key in state:
        if not key.startswith(_AVERAGE):
            continue
        name = key.removeprefix(_AVERAGE)
        for dotless, rule in _DOTLESS:
            if match := dotless.key_regex.fullmatch(name):
                averages[key] = rule.format_key(match.groupdict())
    if not averages:
        return state, "took the weights themselves: there is no moving average of them"
    kept = {
        key: value
        for key, value in state.items()
        if key not in averages and not any(rule.key_regex.fullmatch(key) for rule in RULES)
    }
    plain = len(state) - len(kept) - len(averages)
    renamed = kept | {name: state[key] for key, name in averages.items()}
    return renamed, (
        f"took {len(averages)} moving averages, under {_AVERAGE!r}, in place of {plain} weights"
    )


def infer_config(state: StateDict) -> OpenMAGVIT2Config:
    """Infer the sizes of an Open-MAGVIT2 tokenizer from the shapes of its state dict.

    Raises:
        ConversionError: tensors that carry the sizes are missing, or the sizes make no model.
    """
    read = SizeReader(NAME, state, RULES)
    channels, multipliers, blocks = vqgan.read_levels(read, r"encoder\.down\.", r"\.block\.")
    bits = read.size("number of bits", *vqgan.LATENT_WIDTHS)
    return read.build(
        OpenMAGVIT2Config,
        # A hostile width must not become a number of a billion digits.
        codebook_size=2 ** min(bits, 64),
        channels=channels,
        channel_multipliers=multipliers,
        num_res_blocks=blocks,
        image_channels=read.size("number of image channels", *vqgan.IMAGE_CHANNELS),
    )


FAMILY = Family(
    name=NAME,
    kind="tokenizer",
    architecture=NAME,
    rules=RULES,
    infer_config=infer_config,
    abstract_tree=vqgan.abstract_tree,
    config_type=OpenMAGVIT2Config,
    wrappers=("state_dict",),
    export_wrapper="state_dict",
    dropped={_AVERAGE + "decay": None, _AVERAGE + "num_updates": None},
    # Discriminator and perceptual net, and the moving average of the former.
    dropped_prefixes=("loss.", _AVERAGE + "loss"),
    renames=rename,
)
