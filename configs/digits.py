"""A small MaskGIL on real handwritten digits: the embedded default.

Paper row: none (Table 2's architecture at 4 layers, width 128). Hardware: two CPU cores.
Expected metric: see RESULTS.md.
Command: python -m maskgil_jax.train --config configs/digits.py --workdir runs/digits
"""

from maskgil_jax import config as schema


def get_config(preset: str = "recommended"):
    """Return the configuration."""
    config = schema.preset(preset)

    config.model.num_layers = 4
    config.model.width = 128
    config.model.num_heads = 4
    config.model.mlp_width = 512
    config.model.codebook_size = 128
    config.model.num_classes = 10
    config.model.grid_size = (8, 8)
    config.model.dtype = "float32"
    config.tokenizer.path = "asset:digits_tokenizer"

    config.data.name = "digits"
    config.data.image_size = (32, 32)
    config.data.flip = False
    config.data.shift_px = 1.5
    config.data.rotation_deg = 6.0
    config.data.scale_range = (0.95, 1.05)
    config.data.cache_tokens = True
    config.data.cache_copies = 8
    config.data.num_threads = 1

    config.training.batch_size = 128
    config.training.num_steps = 1500
    config.training.ema_decay = 0.995
    config.optimizer.learning_rate = 1e-3
    config.optimizer.rate_schedule = "cosine"
    config.optimizer.warmup_steps = 100

    config.logging.every = 100
    config.logging.sample_every = 500
    config.logging.checkpoint_every = 250
    config.report.name = "digits"
    return config
