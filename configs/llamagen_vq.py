"""LlamaGen-VQ f16 on ImageNet 256: the published recipe.

l2, LPIPS and codebook terms alike, commitment 0.25, no entropy term; a hinge PatchGAN of weight 0.5
from update 20,000; 40 epochs of batches of 128; Adam without decay at 1e-4, betas 0.9 and 0.95,
gradients clipped at 1; random crops of 80 to 100 % of the shorter side. The average of the
parameters is kept and is what is used, at the rate that the published trainer has for it.

VGG16 and the heads of LPIPS have to be imported once:
    python tools/convert_checkpoint.py import --family lpips --src vgg16-397923af.pth \
        --heads vgg.pth --dst lpips

Paper row: Table 1, LlamaGen-VQ (rFID 4.54, usage 100 %). Hardware: 8 × A100 80 GB or TPU v4-16.
Expected metric: not measured.
Command: python -m maskgil_jax.train --config configs/llamagen_vq.py --workdir runs/llamagen_vq \
    --config.data.path=/data/imagenet --config.vq_loss.lpips_path=lpips
"""

from maskgil_jax import config as schema

EPOCHS, TRAIN_IMAGES = 40, 1_281_167


def get_config(preset: str = "recommended"):
    """Return the configuration."""
    config = schema.preset(preset)
    config.kind = "tokenizer"

    config.vq.family = "llamagen-vq"
    config.vq.dtype = "bfloat16"
    config.vq_loss.reconstruction_kind = "l2"
    config.vq_loss.reconstruction = 1.0
    config.vq_loss.perceptual = 1.0
    config.vq_loss.lpips_path = "lpips"
    config.vq_loss.codebook = 1.0
    config.vq_loss.commitment = 0.25
    config.vq_loss.entropy = 0.0
    config.vq_loss.adversarial = 0.5
    config.vq_loss.adaptive_weight = False
    config.vq_loss.discriminator_start = 20_000
    config.vq_loss.discriminator_loss = "hinge"
    config.vq_loss.discriminator_layers = 3
    config.vq_loss.discriminator_channels = 64

    config.data.crop = "random"

    config.training.batch_size = 128
    config.training.num_steps = EPOCHS * (TRAIN_IMAGES // config.training.batch_size)
    config.training.ema_decay = 0.9999
    config.optimizer.learning_rate = 1e-4
    config.optimizer.betas = (0.9, 0.95)
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    return config
