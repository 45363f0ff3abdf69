"""LlamaGen with a caption as its condition: text-to-image, token by token.

The caption's features are the prefilling tokens, as many for every image: shorter captions are
padded on the left, so that the last feature stands next to the image, and what is padding is never
looked at. The null caption is as long as a caption can be, and of it as much is seen as of the
caption that it stands for: in its place in training, and beside it in guidance.

Reference: Sun et al., 2024, section 3.2; LlamaGen `autoregressive/models/gpt.py`,
`model_type="t2i"`, `autoregressive/sample/sample_t2i.py` and `dataset/t2i.py`.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maskgil_jax.models.captions import (
    ByteEncoder,
    Caption,
    CaptionEmbedding,
    CaptionModelConfig,
    align_right,
)
from maskgil_jax.models.llamagen import CausalModel, CausalModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaGenTextConfig(CaptionModelConfig, CausalModelConfig):
    """Shape and options of a text-conditional LlamaGen."""

    family: ClassVar[str] = "llamagen-text"
    null_keeps_length: ClassVar[bool] = True

    def make_module(self) -> "LlamaGenText":
        """Return the Flax module."""
        return LlamaGenText(self)


class LlamaGenText(CausalModel):
    """Causal LLaMA with the tokens of a `Caption` as its condition."""

    def setup(self):
        """Create the submodules."""
        super().setup()
        cfg = self.config
        if cfg.text == "bytes":
            self.byte_encoder = ByteEncoder(
                cfg.byte_config(), cfg.byte_patch, cfg.ngram_rows, cfg.text_length
            )
        self.caption_embed = CaptionEmbedding(
            cfg.feature_width, cfg.width, cfg.num_prefill, jnp.dtype(cfg.dtype)
        )

    def embed_condition(self, condition: Caption) -> tuple[Float[Array, "b n e"], Int[Array, " b"]]:
        """Return the prefilling tokens of every image and how many count; see the base."""
        cfg = self.config
        values = jnp.asarray(condition.values)
        lengths = jnp.asarray(condition.lengths, jnp.int32)
        if cfg.text == "bytes":
            values, lengths = self.byte_encoder(values, lengths)
        return self.caption_embed(align_right(values, lengths, cfg.num_prefill), lengths)
