"""MaskGIL-B on ImageNet 256×256, class-conditional: 110.9M parameters.

Paper row: Table 2, B (12 layers, width 768, 12 heads).
Hardware: not tried yet. By arithmetic, 1.8 GB of state on every device (float32 parameters, Adam,
gradient; less with --config.mesh.fsdp=N) and 81 MB of activations per image, logits not counted.
Expected metric: not measured. The paper reports FID 5.64, IS 229.96, precision 0.83, recall
0.48 with 8 steps and guidance 2.0. 300,000 updates of 256 images are about 60 epochs; the paper
trains 50 to 400.
Command: python -m maskgil_jax.train --config configs/b.py --workdir runs/b
    --config.data.path=IMAGENET --config.tokenizer.path=DIR
IMAGENET holds train/<wnid>/*.JPEG; DIR is LlamaGen's 16× tokenizer, imported from vq_ds16_c2i.pt by
tools/convert_checkpoint.py.
"""

import dataclasses

from maskgil_jax import config as schema
from maskgil_jax.models.sizes import SIZES


def get_config(preset: str = "recommended"):
    """Return the configuration."""
    config = schema.preset(preset)
    size = SIZES["b"]
    config.model.update(dataclasses.asdict(size), mlp_width=size.mlp_width)
    return config
