"""LlamaGen-L on ImageNet 256×256, class-conditional and causal: 342.9M parameters.

Paper row: Table 5, the model that begins the images in the fusion (24 layers, width 1024, 16
heads).
Hardware: not tried. By arithmetic, 5.5 GB of state on every device (float32 parameters, Adam,
gradient; less with --config.mesh.fsdp=N).
Expected metric: not measured. The paper reports FID 3.80 of the published weights with guidance
2.0.
Command: python -m maskgil_jax.train --config configs/llamagen_l.py --workdir runs/llamagen_l
    --config.data.path=IMAGENET --config.tokenizer.path=DIR
IMAGENET holds train/<wnid>/*.JPEG; DIR is LlamaGen's 16× tokenizer, imported from vq_ds16_c2i.pt by
tools/convert_checkpoint.py.
"""

from configs import llamagen_b


def get_config(preset: str = "recommended"):
    """Return the configuration: `llamagen_b.py` with a larger model."""
    return llamagen_b.get_config(preset, size="l")
