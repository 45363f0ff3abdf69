"""Bidirectional Transformer on ImageNet 256×256, class-conditional: 104.9M parameters.

Paper row: the baseline of Tables A.1 and A.2 (12 layers, 12 heads, width 768), beside which the
study sets the Bidirectional LLaMA of the same depth and width (configs/b.py).
Hardware: not tried yet.
Expected metric: not measured.
Command: python -m maskgil_jax.train --config configs/bidirectional_transformer.py --workdir runs/bt
    --config.data.path=IMAGENET --config.tokenizer.path=DIR
IMAGENET holds train/<wnid>/*.JPEG; DIR is LlamaGen's 16× tokenizer, imported from vq_ds16_c2i.pt by
tools/convert_checkpoint.py. With another tokenizer of the study, also give
--config.model.codebook_size=CODES.
"""

from maskgil_jax import config as schema


def get_config(preset: str = "recommended"):
    """Return the configuration."""
    config = schema.preset(preset)
    config.model.family = "bidirectional-transformer"
    config.model.num_layers = 12
    config.model.width = 768
    config.model.num_heads = 12
    config.model.mlp_width = 3072
    return config
