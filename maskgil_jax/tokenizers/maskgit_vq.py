"""MaskGIT-VQ: the VQGAN of 16x16 tokens and 1,024 codes that the paper's study calls so.

It is the CompVis tokenizer, not Google's: plain Euclidean codes as wide as the latents.

Reference: MaskGIL, table 1; Esser et al. 2021; `taming/models/vqgan.py` of
CompVis/taming-transformers, model `vqgan_imagenet_f16_1024`.
"""

import dataclasses
from typing import ClassVar

from maskgil_jax.tokenizers.vq import VQConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGITVQConfig(VQConfig):
    """Shape of a MaskGIT-VQ tokenizer; the defaults are the published one."""

    codebook_size: int = 1024
    embed_dim: int = 256
    l2_normalize: bool = False

    family: ClassVar[str] = "maskgit-vq"
