"""Open-MAGVIT2 for 32×32 handwritten digits: 8×8 tokens of 8 bits, which are 256 codes.

Paper row: none (the embedded default). Hardware: two CPU cores.
Expected metric: see RESULTS.md.
Command:
    python -m maskgil_jax.train --config configs/digits_open_magvit2.py --workdir runs/open_magvit2
"""

from configs import digits_tokenizer


def get_config(preset: str = "recommended"):
    """Return the configuration: `digits_tokenizer.py` with another tokenizer."""
    config = digits_tokenizer.get_config(preset)
    config.vq.family = "open-magvit2"
    config.vq.codebook_size = 2**8
    config.vq.latent_channels = None
    config.vq_loss.codebook = 0.0
    config.vq_loss.entropy = 0.02
    config.vq_loss.entropy_temperature = 0.5
    return config
