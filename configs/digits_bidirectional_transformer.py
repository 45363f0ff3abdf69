"""The Bidirectional Transformer on real handwritten digits: a small run of the study's baseline.

Paper row: none (the baseline of Table A.2 at 4 layers and width 128, 0.9 M parameters).
Hardware: two CPU cores.
Expected metric: not measured.
Command:
    python -m maskgil_jax.train --config configs/digits_bidirectional_transformer.py --workdir DIR
"""

from maskgil_jax import config as schema


def get_config(preset: str = "recommended"):
    """Return the configuration."""
    config = schema.preset(preset)

    config.model.family = "bidirectional-transformer"
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
    config.data.cache_tokens = True
    config.data.num_threads = 1

    # As configs/digits.py, so that the two models differ in nothing else.
    config.training.batch_size = 64
    config.training.num_steps = 2000
    config.training.ema_decay = 0.99
    config.training.label_smoothing = 0.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.rate_schedule = "cosine"
    config.optimizer.warmup_steps = 100

    config.logging.every = 100
    config.logging.sample_every = 500
    config.logging.checkpoint_every = 250

    config.sampler.guidance_scale = 1.0
    config.sampler.gumbel_temperature = 50.0
    config.report.name = "digits"
    return config
