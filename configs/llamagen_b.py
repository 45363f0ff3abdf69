"""LlamaGen-B on ImageNet 256×256, class-conditional and causal: 110.9M parameters.

Paper row: Tables A.1 and A.2, the causal LLaMA of the study (12 layers, width 768, 12 heads).
Hardware: not tried. By arithmetic, 1.8 GB of state on every device (float32 parameters, Adam,
gradient; less with --config.mesh.fsdp=N).
Expected metric: not measured.
Command: python -m maskgil_jax.train --config configs/llamagen_b.py --workdir runs/llamagen_b
    --config.data.path=IMAGENET --config.tokenizer.path=DIR
IMAGENET holds train/<wnid>/*.JPEG; DIR is LlamaGen's 16× tokenizer, imported from vq_ds16_c2i.pt by
tools/convert_checkpoint.py.
"""

import dataclasses

from maskgil_jax import config as schema
from maskgil_jax.models.sizes import SIZES


def get_config(preset: str = "recommended", size: str = "b"):
    """Return the configuration; the settings of the optimiser are those of LlamaGen's scripts."""
    config = schema.preset(preset)
    shape = SIZES[size]
    config.model.family = "llamagen"
    config.model.cond_rope = "identity"
    config.model.update(dataclasses.asdict(shape), mlp_width=shape.mlp_width)
    config.optimizer.betas = (0.9, 0.95)
    config.optimizer.weight_decay = 5e-2
    config.optimizer.decay = "matrices"
    config.training.label_smoothing = 0.0
    return config
