"""MaskGIL-XXL on ImageNet 256×256, class-conditional: 1411.1M parameters.

Paper row: Table 2, XXL (48 layers, width 1536, 24 heads), QK-Norm and Post-Norm.
Hardware: not tried yet. By arithmetic, 22.6 GB of state on every device (float32 parameters, Adam,
gradient; less with --config.mesh.fsdp=N) and 645 MB of activations per image, logits not counted.
Expected metric: not measured. The paper reports FID 3.71, IS 303.47, precision 0.88, recall
0.52 with 8 steps and guidance 2.5. 300,000 updates of 256 images are about 60 epochs; the paper
trains 50 to 400.
Command: python -m maskgil_jax.train --config configs/xxl.py --workdir runs/xxl
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
    size = SIZES["xxl"]
    config.model.update(dataclasses.asdict(size), mlp_width=size.mlp_width)
    config.sampler.guidance_scale = 2.5
    # Without the two, the output norm grows until the loss is NaN (Figure 4c). The released code,
    # which that preset reproduces, has neither.
    if preset != "released":
        config.model.qk_norm = "layer"
        config.model.post_norm = "rms"
    return config
