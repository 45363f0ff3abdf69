"""LlamaGen-XXL on ImageNet 256×256, class-conditional and causal: 1411.0M parameters.

Paper row: none (LlamaGen-XXL: 48 layers, width 1536, 24 heads).
Hardware: not tried. By arithmetic, 22.6 GB of state on every device (float32 parameters, Adam,
gradient; less with --config.mesh.fsdp=N).
Expected metric: not measured.
Command: python -m maskgil_jax.train --config configs/llamagen_xxl.py --workdir runs/llamagen_xxl
    --config.data.path=IMAGENET --config.tokenizer.path=DIR
IMAGENET holds train/<wnid>/*.JPEG; DIR is LlamaGen's 16× tokenizer, imported from vq_ds16_c2i.pt by
tools/convert_checkpoint.py.
"""

from configs import llamagen_b


def get_config(preset: str = "recommended"):
    """Return the configuration: `llamagen_b.py` with a larger model."""
    return llamagen_b.get_config(preset, size="xxl")
