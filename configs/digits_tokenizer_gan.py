"""LlamaGen-VQ for 32×32 handwritten digits with 4×4 tokens, trained with a discriminator.

So few tokens do not hold a digit: squared errors alone leave it blurred, and the discriminator,
which judges patches of 34 pixels, that is whole digits, asks for its strokes. The images are not
warped: a bicubic warp has four times the power of a digit above half the Nyquist frequency, which
the discriminator would demand of every reconstruction. No perceptual term: the weights of its net
are not shipped.

Paper row: none (the embedded default). Hardware: two CPU cores.
Expected metric: see RESULTS.md.
Command: python -m maskgil_jax.train --config configs/digits_tokenizer_gan.py --workdir runs/gan
"""

from maskgil_jax import config as schema


def get_config(preset: str = "recommended"):
    """Return the configuration."""
    config = schema.preset(preset)
    config.kind = "tokenizer"

    config.vq.codebook_size = 128
    config.vq.channels = 32
    config.vq.channel_multipliers = (1, 1, 1, 1)
    config.vq.num_res_blocks = 1
    config.vq.latent_channels = 32
    config.vq_loss.entropy = 0.003
    config.vq_loss.entropy_temperature = 0.05
    config.vq_loss.adversarial = 0.4
    config.vq_loss.adaptive_weight = True
    config.vq_loss.discriminator_start = 300
    config.vq_loss.discriminator_layers = 2
    config.vq_loss.discriminator_channels = 32

    config.data.name = "digits"
    config.data.image_size = (32, 32)
    config.data.flip = False
    config.data.num_threads = 1

    config.training.batch_size = 32
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
