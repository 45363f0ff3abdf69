"""LlamaGen-VQ checkpoints (`vq_ds16_c2i.pt`, `vq_ds8_c2i.pt` and any other width).

Reference: FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py.
"""

from maskgil_jax.convert import vqgan
from maskgil_jax.convert.inference import SizeReader
from maskgil_jax.convert.rules import Family, Rule, StateDict
from maskgil_jax.tokenizers.llamagen_vq import LlamaGenVQConfig

NAME = "llamagen-vq"


def _side_rules(side: str, block: str, resample: str) -> tuple[Rule, ...]:
    """Rules of the encoder or the decoder, which differ only in the names of their levels."""
    level, path = f"{side}.conv_blocks.{{i}}", f"{side}/{block}_{{i}}"
    return (
        *vqgan.end_rules(side),
        *vqgan.res_rules(f"{level}.res.{{j}}", f"{path}_res_{{j}}"),
        *vqgan.attn_rules(f"{level}.attn.{{j}}", f"{path}_attn_{{j}}"),
        *vqgan.conv_rules(f"{level}.{resample}.conv", f"{path}_{resample}"),
        *vqgan.res_rules(f"{side}.mid.0", f"{side}/mid_res_0"),
        *vqgan.attn_rules(f"{side}.mid.1", f"{side}/mid_attn"),
        *vqgan.res_rules(f"{side}.mid.2", f"{side}/mid_res_1"),
    )


RULES = (
    *_side_rules("encoder", "down", "downsample"),
    *_side_rules("decoder", "up", "upsample"),
    *vqgan.QUANTIZER_RULES,
)


def infer_config(state: StateDict) -> LlamaGenVQConfig:
    """Infer the sizes of a LlamaGen-VQ from the shapes of its state dict.

    Raises:
        ConversionError: tensors that carry the sizes are missing, or the sizes make no model.
    """
    read = SizeReader(NAME, state, RULES)
    return vqgan.infer_vq_config(LlamaGenVQConfig, read, r"encoder\.conv_blocks\.", r"\.res\.")


FAMILY = Family(
    name=NAME,
    kind="tokenizer",
    architecture=NAME,
    rules=RULES,
    infer_config=infer_config,
    abstract_tree=vqgan.abstract_tree,
    config_type=LlamaGenVQConfig,
    wrappers=("ema", "model", "state_dict"),
    export_wrapper="model",
    layout={"l2_normalize": True, "level_attention": True},
    # Usage statistics of training; the original registers 65536 entries for any codebook.
    dropped={"quantize.codebook_used": (65536,)},
)
