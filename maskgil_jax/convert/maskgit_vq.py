"""MaskGIT-VQ checkpoints: `vqgan_imagenet_f16_1024` of taming-transformers, and any other width.

Reference: CompVis/taming-transformers, taming/models/vqgan.py, modules/diffusionmodules/model.py.
"""

from maskgil_jax.convert import vqgan
from maskgil_jax.convert.inference import SizeReader
from maskgil_jax.convert.rules import Family, StateDict
from maskgil_jax.tokenizers.maskgit_vq import MaskGITVQConfig

NAME = "maskgit-vq"
RULES = vqgan.taming_rules(level_attention=True)


def infer_config(state: StateDict) -> MaskGITVQConfig:
    """Infer the sizes of a MaskGIT-VQ from the shapes of its state dict.

    Raises:
        ConversionError: tensors that carry the sizes are missing, or the sizes make no model.
    """
    read = SizeReader(NAME, state, RULES)
    return vqgan.infer_vq_config(MaskGITVQConfig, read, r"encoder\.down\.", r"\.block\.")


FAMILY = Family(
    name=NAME,
    kind="tokenizer",
    architecture=NAME,
    rules=RULES,
    infer_config=infer_config,
    abstract_tree=vqgan.abstract_tree,
    config_type=MaskGITVQConfig,
    wrappers=("state_dict", "model"),
    export_wrapper="state_dict",
    layout={"l2_normalize": False, "level_attention": True},
    # Discriminator and perceptual net.
    dropped_prefixes=("loss.",),
)
