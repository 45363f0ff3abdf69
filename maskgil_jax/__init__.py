"""maskgil_jax: masked image generation in JAX.

Two data paths run through the package, and each reads top to bottom:

1. Training (`train.py`): images → tokens → masked tokens → model → loss → update → checkpoint.
2. Generation (`sample.py`, `generator.py`, `generation.py`): label → condition → decoding loop →
   tokens → tokenizer decoder → uint8 image.

Shape letters used everywhere: b batch, l tokens, s keys, e width, h heads, d head dimension,
v logits, k codes, z code dimension, gh gw grid, H W pixels, c image channels.

Public names are imported when first used:

    import maskgil_jax

    tokenizer = maskgil_jax.load_tokenizer("asset:digits_tokenizer")
    model = maskgil_jax.load_model("runs/digits")
    logits = model.logits(tokens, labels)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "ImageGenerator": "maskgil_jax.generator",
    "Lumina": "maskgil_jax.lumina",
    "mix_labels": "maskgil_jax.models.conditioning",
    "load_model": "maskgil_jax.loading",
    "load_text_encoder": "maskgil_jax.loading",
    "load_tokenizer": "maskgil_jax.loading",
    "generate_tokens": "maskgil_jax.generation",
    "decode_images": "maskgil_jax.generation",
    "SamplerConfig": "maskgil_jax.decoding.masked",
}

__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from maskgil_jax.decoding.masked import SamplerConfig
    from maskgil_jax.generation import decode_images, generate_tokens
    from maskgil_jax.generator import ImageGenerator
    from maskgil_jax.loading import load_model, load_text_encoder, load_tokenizer
    from maskgil_jax.lumina import Lumina
    from maskgil_jax.models.conditioning import mix_labels


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'maskgil_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
