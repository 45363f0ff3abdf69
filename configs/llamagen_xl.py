"""LlamaGen-XL on ImageNet 256×256, class-conditional and causal: 774.7M parameters.

Paper row: none (LlamaGen-XL: 36 layers, width 1280, 20 heads).
Hardware: not tried. By arithmetic, 12.4 GB of state on every device (float32 parameters, Adam,
gradient; less with --config.mesh.fsdp=N).
Expected metric: not measured.
Command: python -m maskgil_jax.train --config configs/llamagen_xl.py --workdir runs/llamagen_xl
    --config.data.path=IMAGENET --config.tokenizer.path=DIR
IMAGENET holds train/<wnid>/*.JPEG; DIR is LlamaGen's 16× tokenizer, imported from vq_ds16_c2i.pt by
tools/convert_checkpoint.py.
"""

from configs import llamagen_b


def get_config(preset: str = "recommended"):
    """Return the configuration: `llamagen_b.py` with a larger model."""
    return llamagen_b.get_config(preset, size="xl")
