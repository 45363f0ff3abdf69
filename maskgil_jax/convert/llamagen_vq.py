"""LlamaGen-VQ checkpoints (`vq_ds16_c2i.pt`, `vq_ds8_c2i.pt` and any other width).

Reference: FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py.
"""

from maskgil_jax.convert import vqgan
from maskgil_jax.tokenizers.llamagen_vq import LlamaGenVQConfig

FAMILY = vqgan.make_vq_family(
    LlamaGenVQConfig,
    vqgan.Names(
        down="conv_blocks",
        up="conv_blocks",
        up_path="up_{i}",
        blocks="res",
        middle=("0", "1", "2"),
    ),
    wrappers=("ema", "model", "state_dict"),
    export_wrapper="model",
    # Usage statistics of training; the original registers 65536 entries for any codebook.
    dropped={"quantize.codebook_used": (65536,)},
)
