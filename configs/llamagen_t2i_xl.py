"""LlamaGen-XL from captions at 256×256, causal: 777.9M parameters.

Features of FLAN-T5-XL as prefilling tokens, codes of LlamaGen's 16× tokenizer. docs/text.md says
how to get the encoder, docs/text_data.md how to store captioned images.

Paper row: none (LlamaGen's text-conditional XL, the first of its two stages).
Hardware: not tried. By arithmetic, 12.4 GB of state on every device (float32 parameters, Adam,
gradient; less with --config.mesh.fsdp=N), beside the encoder.
Expected metric: not measured.
Command: python -m maskgil_jax.train --config configs/llamagen_t2i_xl.py --workdir runs/llamagen_t2i
    --config.data.path=DATA --config.tokenizer.path=DIR --config.text.encoder=flan-t5-xl
DIR is imported from vq_ds16_t2i.pt by tools/convert_checkpoint.py.
"""

from configs import llamagen_b


def get_config(preset: str = "recommended"):
    """Return the configuration: `llamagen_b.py` with a larger model, of captions."""
    config = llamagen_b.get_config(preset, size="xl")

    config.model.family = "llamagen-text"
    config.model.text = "features"
    config.model.text_width = 2048
    config.model.text_length = 120
    config.model.remat = "dots"
    config.tokenizer.path = "vq_ds16_t2i"
    config.text.encoder = "flan-t5-xl"

    config.data.name = "captions"
    config.data.format = "webdataset"
    config.data.path = "captioned_images"
    config.data.flip = False

    config.sampler.guidance_scale = 7.5
    config.sampler.top_k = 1000
    return config
