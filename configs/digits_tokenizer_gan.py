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

from configs import digits_tokenizer


def get_config(preset: str = "recommended"):
    """Return the configuration: `digits_tokenizer.py`, coarser, judged and without warps."""
    config = digits_tokenizer.get_config(preset)
    config.vq.channel_multipliers = (1, 1, 1, 1)
    config.vq_loss.adversarial = 0.4
    config.vq_loss.adaptive_weight = True
    config.vq_loss.discriminator_start = 300
    config.vq_loss.discriminator_layers = 2
    config.vq_loss.discriminator_channels = 32

    config.data.shift_px = 0.0
    config.data.rotation_deg = 0.0
    config.data.scale_range = (1.0, 1.0)
    config.training.batch_size = 32
    return config
