"""LlamaGen's class-conditional models, `c2i_*.pt`.

The names are those of `maskgil.py`, which grew from LlamaGen's code, but without a mask token: the
tables of tokens and of the head have one row a code.
"""

import dataclasses

from maskgil_jax.convert import maskgil
from maskgil_jax.convert.maskgil import build_config, read_labelled
from maskgil_jax.convert.rules import StateDict
from maskgil_jax.models.llamagen import LlamaGenConfig

NAME = "llamagen"
LAYOUT = {"rope_base": 10000.0, "norm_eps": 1e-5}


def infer_config(
    state: StateDict,
    *,
    num_heads: int | None = None,
    grid_size: tuple[int, int] = (16, 16),
    cond_rope: str = "zero",
    qk_norm: str | None = None,
    post_norm: str | None = None,
) -> LlamaGenConfig:
    """Infer the config of a class-conditional LlamaGen from the shapes of its state dict.

    The arguments are those of `maskgil.infer_config`.

    Raises:
        ConversionError: tensors that carry the sizes are missing, or the sizes make no model.
    """
    told = read_labelled(NAME, state, num_heads=num_heads, qk_norm=qk_norm, post_norm=post_norm)
    return build_config(
        NAME, LlamaGenConfig, **told, grid_size=grid_size, cond_rope=cond_rope, **LAYOUT
    )


FAMILY = dataclasses.replace(
    maskgil.FAMILY,
    name=NAME,
    architecture=NAME,
    infer_config=infer_config,
    config_type=LlamaGenConfig,
    layout=LAYOUT,
    # The published files of the larger models were written by FSDP and hold the weights bare.
    wrappers=("model", "module", "ema", "state_dict"),
)
