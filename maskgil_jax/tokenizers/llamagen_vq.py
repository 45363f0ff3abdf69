"""LlamaGen-VQ: a VQGAN whose narrow codes lie on the unit sphere.

The published f16 tokenizer is the default configuration; f8 has the multipliers (1, 2, 2, 4).

Reference: Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image
Generation", section 2.1; `tokenizer/tokenizer_image/vq_model.py` of FoundationVision/LlamaGen.
"""

import dataclasses
from typing import ClassVar

from maskgil_jax.tokenizers.vq import VQConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaGenVQConfig(VQConfig):
    """Shape of a LlamaGen-VQ tokenizer; the defaults are the published f16 one."""

    family: ClassVar[str] = "llamagen-vq"
