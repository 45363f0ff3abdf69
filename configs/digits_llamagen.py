"""LlamaGen on real handwritten digits: a small causal model on the codes of `digits.py`.

Paper row: none (the shape of Table 5, fusion, with a model that draws token by token; 1.1 M
parameters).
Hardware: two CPU cores.
Expected metric: digit-FID 14.0, agreement 0.87, recall 0.81 (RESULTS.md, "Fusion").
Command: python -m maskgil_jax.train --config configs/digits_llamagen.py --workdir runs/digits_ar
"""

from configs import digits
from maskgil_jax import config as schema


def get_config(preset: str = "recommended"):
    """Return the configuration: `digits.py` with a causal model and its decoder."""
    config = digits.get_config(preset)
    config.model.family = "llamagen"
    config.model.cond_rope = "identity"
    # The causal decoder has no such setting.
    config.sampler.gumbel_temperature = schema.preset(preset).sampler.gumbel_temperature
    return config
