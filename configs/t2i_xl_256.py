"""MaskGIL-XL from captions at 256×256 and its 25 buckets: the first of two stages.

757M parameters, where the paper says 775M; features of Gemma 2B as prefilling tokens, codes of
Chameleon-VQ. docs/text.md says how to get and convert the encoder, README.md the tokenizer, and
docs/text_data.md how to store captioned images.

Paper row: Table 4 (GenEval 0.49 overall after both stages), section 4.4.
Hardware: not tried; 32 TPU v4 or 8 H100 are what its size asks for.
Expected metric: not measured.
Command: python -m maskgil_jax.train --config configs/t2i_xl_256.py --workdir runs/t2i_xl_256
    --config.data.path=DATA --config.tokenizer.path=chameleon_vq --config.text.encoder=gemma_2b
"""

from maskgil_jax import config as schema


def get_config(preset: str = "recommended"):
    """Return the configuration."""
    config = schema.preset(preset)

    config.model.family = "maskgil-text"
    config.model.num_layers = 36
    config.model.width = 1280
    config.model.num_heads = 20
    config.model.mlp_width = 3584
    config.model.codebook_size = 8192
    config.model.cond_rope = "identity"
    config.model.text = "features"
    config.model.text_width = 2048
    config.model.text_length = 120
    config.model.remat = "dots"
    config.tokenizer.path = "chameleon_vq"
    config.text.encoder = "gemma_2b"

    config.data.name = "captions"
    config.data.format = "webdataset"
    config.data.path = "captioned_images"
    config.data.flip = False
    config.data.buckets = "area"

    config.training.batch_size = 256
    config.training.num_steps = 500_000
    config.training.ema_decay = 0.9999
    config.optimizer.warmup_steps = 5000

    config.sampler.guidance_scale = 4.0
    config.sampler.num_steps = 16
    return config
