"""Text-to-image in minutes: captions of coloured digits on canvases of several shapes.

A learned encoder reads the bytes of a caption, so that nothing has to be downloaded.

Paper row: none (the shape of Table 4, GenEval, on the embedded captioned canvases).
Hardware: preset `recommended` one GPU; `cpu` two CPU cores.
Expected metric: `cpu`: after 50 minutes single object 0.98, colors 0.99, counting 0.80, position
0.66 (RESULTS.md). `recommended`: not measured.
Command: python -m maskgil_jax.train --config configs/t2i_digits.py --workdir runs/t2i_digits
On two CPU cores: python -m maskgil_jax.train --config configs/t2i_digits.py:cpu --workdir runs/t2i
"""

from maskgil_jax import config as schema
from maskgil_jax.data.canvases import SIZES


def get_config(preset: str = "recommended"):
    """Return the configuration; `cpu` is a smaller model on a fixed set of smaller canvases."""
    cpu = preset == "cpu"
    config = schema.preset("recommended" if cpu else preset)

    config.model.family = "maskgil-text"
    config.model.num_layers = 6 if cpu else 8
    config.model.width = 128 if cpu else 384
    config.model.num_heads = 4 if cpu else 6
    config.model.mlp_width = 352 if cpu else 1024
    # What is named first is, as a rule, what comes first in reading: left, or above.
    config.model.cond_rope = "diagonal"
    config.model.codebook_size = 512
    config.model.grid_size = (8, 8)
    config.model.text = "bytes"
    config.model.text_width = 96 if cpu else 128
    config.model.text_length = 64
    config.model.dropout = 0.0 if cpu else 0.1
    config.model.dtype = "float32" if cpu else "bfloat16"
    config.tokenizer.path = "asset:t2i_digits_tokenizer"

    config.data.name = "canvases"
    config.data.image_size = (64, 64)
    config.data.buckets = "listed"
    config.data.bucket_sizes = SIZES[:3] if cpu else SIZES
    config.data.flip = False
    config.data.num_threads = 1 if cpu else 12
    config.data.cache_tokens = cpu
    config.data.num_records = 8000 if cpu else 0

    config.training.batch_size = 32 if cpu else 256
    config.training.num_steps = 6000 if cpu else 12_000
    config.training.ema_decay = 0.995
    config.training.label_smoothing = 0.0
    # What a word tells is little beside what the tokens of a picture tell each other, and AdamW
    # notices it much later.
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 4e-3 if cpu else 1e-3
    config.optimizer.rate_schedule = "cosine"
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 1e-2

    config.logging.every = 100
    config.logging.sample_every = 1000
    config.logging.checkpoint_every = 500

    config.sampler.guidance_scale = 3.0
    config.sampler.num_steps = 12
    config.report.name = "captioned_canvases"
    return config
