"""MaskGIT-VQ checkpoints: `vqgan_imagenet_f16_1024` of taming-transformers, and any other width.

Reference: CompVis/taming-transformers, taming/models/vqgan.py, modules/diffusionmodules/model.py.
"""

from maskgil_jax.convert import vqgan
from maskgil_jax.tokenizers.maskgit_vq import MaskGITVQConfig

FAMILY = vqgan.make_vq_family(
    MaskGITVQConfig,
    vqgan.TAMING,
    wrappers=("state_dict", "model"),
    export_wrapper="state_dict",
    # Discriminator and perceptual net.
    dropped_prefixes=("loss.",),
)
