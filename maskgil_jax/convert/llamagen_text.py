"""LlamaGen's text-conditional models, `t2i_*.pt`.

The names are those of `maskgil_text.py`, but without a mask token, as in `llamagen.py`.
"""

import dataclasses

from maskgil_jax.convert import llamagen
from maskgil_jax.convert.maskgil import build_config
from maskgil_jax.convert.maskgil_text import LAYOUT, RULES, read_captioned
from maskgil_jax.convert.rules import StateDict
from maskgil_jax.models.llamagen_text import LlamaGenTextConfig

NAME = "llamagen-text"


def infer_config(
    state: StateDict,
    *,
    num_heads: int | None = None,
    grid_size: tuple[int, int] = (16, 16),
    cond_rope: str = "zero",
    qk_norm: str | None = None,
    post_norm: str | None = None,
) -> LlamaGenTextConfig:
    """Infer the config of a text-conditional LlamaGen from the shapes of its state dict.

    The arguments are those of `maskgil.infer_config`; the models of 512 pixels have a grid of 32.

    Raises:
        ConversionError: tensors that carry the sizes are missing, or the sizes make no model.
    """
    rows, fields = read_captioned(
        NAME, state, num_heads=num_heads, qk_norm=qk_norm, post_norm=post_norm
    )
    return build_config(
        NAME,
        LlamaGenTextConfig,
        codebook_size=rows,
        **fields,
        grid_size=grid_size,
        cond_rope=cond_rope,
        **LAYOUT,
    )


FAMILY = dataclasses.replace(
    llamagen.FAMILY,
    name=NAME,
    architecture=NAME,
    rules=RULES,
    infer_config=infer_config,
    config_type=LlamaGenTextConfig,
    layout=LAYOUT,
)
