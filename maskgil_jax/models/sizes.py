"""Published sizes of the LLaMA-style image models.

Reference: MaskGIL Table 2; LlamaGen `autoregressive/models/gpt.py` (the sizes beyond XXL).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """Depth and width of a model; the head dimension is width / num_heads."""

    num_layers: int
    width: int
    num_heads: int

    @property
    def mlp_width(self) -> int:
        """Hidden width of the SwiGLU MLP."""
        return swiglu_width(self.width)


def swiglu_width(width: int, multiple_of: int = 256) -> int:
    """Return int(2/3 · 4 · width) rounded up to a multiple of `multiple_of`."""
    hidden = int(2 * 4 * width / 3)
    return -(-hidden // multiple_of) * multiple_of


SIZES = {
    "b": Size(12, 768, 12),
    "l": Size(24, 1024, 16),
    "xl": Size(36, 1280, 20),
    "xxl": Size(48, 1536, 24),
    "xxxl": Size(48, 2560, 40),
    "1b": Size(22, 2048, 32),
    "3b": Size(24, 3200, 32),
    "7b": Size(32, 4096, 32),
}
