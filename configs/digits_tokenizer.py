"""LlamaGen-VQ for 32×32 handwritten digits: 8×8 tokens, 128 codes.

The tokenizer that the package ships as `asset:digits_tokenizer` was trained by exactly this file.

Paper row: none (the embedded default). Hardware: two CPU cores.
Expected metric: see RESULTS.md.
Command: python -m maskgil_jax.train --config configs/digits_tokenizer.py --workdir runs/tokenizer
"""

from maskgil_jax import config as schema


def get_config(preset: str = "recommended"):
    """Return the configuration."""
    config = schema.preset(preset)
    config.kind = "tokenizer"

    config.vq.codebook_size = 128
    config.vq.channels = 32
    config.vq.channel_multipliers = (1, 1, 1)
    config.vq.num_res_blocks = 1
    config.vq.latent_channels = 32
    # Without the term many codes are never used.
    config.vq_loss.entropy = 0.003
    config.vq_loss.entropy_temperature = 0.05

    config.data.name = "digits"
    config.data.image_size = (32, 32)
    config.data.flip = False
    config.data.shift_px = 2.0
    config.data.rotation_deg = 8.0
    config.data.scale_range = (0.9, 1.1)
    config.data.num_threads = 1

    config.training.batch_size = 64
    config.training.num_steps = 1000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.rate_schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.0

    config.logging.every = 100
    config.logging.sample_every = 250
    config.logging.checkpoint_every = 100
    config.report.name = "digits"
    return config
