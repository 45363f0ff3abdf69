"""Chameleon-VQ: a VQGAN of 8,192 plain codes that attends only in the middle of its nets.

Reference: Chameleon Team 2024, "Chameleon: Mixed-Modal Early-Fusion Foundation Models", section
2.1; `chameleon/inference/vqgan.py` of facebookresearch/chameleon.
"""

import dataclasses
from typing import ClassVar

from maskgil_jax.tokenizers.vq import VQConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChameleonVQConfig(VQConfig):
    """Shape of a Chameleon-VQ tokenizer; the defaults are the published one."""

    codebook_size: int = 8192
    embed_dim: int = 256
    l2_normalize: bool = False
    level_attention: bool = False

    family: ClassVar[str] = "chameleon-vq"
