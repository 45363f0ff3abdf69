"""MaskGIL-XL on ImageNet 256×256, class-conditional: 774.7M parameters.

Paper row: Table 2, XL (36 layers, width 1280, 20 heads).
Hardware: not tried yet. By arithmetic, 12.4 GB of state on every device (float32 parameters, Adam,
gradient; less with --config.mesh.fsdp=N) and 413 MB of activations per image, logits not counted.
Expected metric: not measured. The paper reports FID 3.90, IS 296.25, precision 0.87, recall
0.49 with 8 steps and guidance 2.5. 300,000 updates of 256 images are about 60 epochs; the paper
trains 50 to 400.
Command: python -m maskgil_jax.train --config configs/xl.py --workdir runs/xl
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
    size = SIZES["xl"]
    config.model.update(dataclasses.asdict(size), mlp_width=size.mlp_width)
    config.sampler.guidance_scale = 2.5
    return config
