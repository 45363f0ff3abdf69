"""MaskGIT-VQ for 32×32 handwritten digits: 8×8 tokens, 128 plain codes as wide as the latents.

Paper row: none (the embedded default). Hardware: two CPU cores.
Expected metric: see RESULTS.md.
Command:
    python -m maskgil_jax.train --config configs/digits_maskgit_vq.py --workdir runs/maskgit_vq
"""

from configs import digits_tokenizer


def get_config(preset: str = "recommended"):
    """Return the configuration: `digits_tokenizer.py` with another tokenizer."""
    config = digits_tokenizer.get_config(preset)
    config.vq.family = "maskgit-vq"
    config.vq.embed_dim = 32
    return config
