"""Open-MAGVIT2-VQ for canvases of coloured digits: 8×8 pixels a token, 512 codes.

Trained on canvases of 2×2 cells, which have the most ink; on larger ones up to 96×96 and 64×128
it is as good, at 128×128 colours suffer. Its nets have no attention: such a layer let
the codes of plain paper tell what stands elsewhere, and few of them were then the same. The
tokenizer that the package ships as `asset:t2i_digits_tokenizer` was trained by exactly this file.

Paper row: none (the embedded text-to-image set). Hardware: two CPU cores.
Expected metric: see RESULTS.md.
Command: python -m maskgil_jax.train --config configs/t2i_digits_tokenizer.py --workdir runs/t2i
"""

from maskgil_jax import config as schema


def get_config(preset: str = "recommended"):
    """Return the configuration."""
    config = schema.preset(preset)
    config.kind = "tokenizer"

    config.vq.family = "open-magvit2"
    config.vq.codebook_size = 512
    config.vq.channels = 32
    config.vq.channel_multipliers = (1, 1, 1, 2)
    config.vq.num_res_blocks = 1
    config.vq_loss.codebook = 0.0
    config.vq_loss.entropy = 0.02
    config.vq_loss.entropy_temperature = 0.5

    config.data.name = "canvases"
    config.data.image_size = (64, 64)
    config.data.flip = False
    config.data.num_threads = 1

    config.training.batch_size = 16
    config.training.num_steps = 2000
    config.optimizer.learning_rate = 2e-3
    config.optimizer.rate_schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.0

    config.logging.every = 100
    config.logging.sample_every = 500
    config.logging.checkpoint_every = 200
    config.report.name = "canvases"
    config.report.batch_size = 32
    return config
