"""Chameleon-VQ for 32×32 handwritten digits: 8×8 tokens, 128 codes, attention in mid-net alone.

Paper row: none (the embedded default). Hardware: two CPU cores.
Expected metric: see RESULTS.md.
Command:
    python -m maskgil_jax.train --config configs/digits_chameleon_vq.py --workdir runs/chameleon_vq
"""

from configs import digits_tokenizer


def get_config(preset: str = "recommended"):
    """Return the configuration: `digits_tokenizer.py` with another tokenizer."""
    config = digits_tokenizer.get_config(preset)
    config.vq.family = "chameleon-vq"
    config.vq.embed_dim = 32
    return config
