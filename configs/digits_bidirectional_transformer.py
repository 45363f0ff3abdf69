"""The Bidirectional Transformer on real handwritten digits: a small run of the study's baseline.

Paper row: none (the baseline of Table A.2 at 4 layers and width 128, 0.9 M parameters).
Hardware: two CPU cores.
Expected metric: not measured.
Command:
    python -m maskgil_jax.train --config configs/digits_bidirectional_transformer.py --workdir DIR
"""

from configs import digits


def get_config(preset: str = "recommended"):
    """Return the configuration: `digits.py` with another model."""
    config = digits.get_config(preset)
    config.model.family = "bidirectional-transformer"
    return config
