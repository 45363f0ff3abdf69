"""Fusion: a causal model draws the first tokens of an image, a masked one completes the rest.

What is drawn here stands in the batch that `masked.decode_batch` is given. More of the first is
quality, more of the second is speed.

Reference: MaskGIL section 5.1, Table 5 and Figure 8.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from maskgil_jax.decoding import autoregressive
from maskgil_jax.decoding.autoregressive import (
    AutoregressivePlan,
    AutoregressiveProgram,
    CausalPredictor,
)


def count_drawn(share: float, seq_len: int) -> int:
    """Return how many tokens are a share of an image's, to the nearest whole number.

    Raises:
        ValueError: if the share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share} of the tokens is out of range; allowed: 0 to 1")
    return int(np.floor(share * seq_len + 0.5))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """What the first tokens of a batch are drawn from.

    Attributes:
        condition: of the causal model, a pytree with a leading batch axis.
        null_condition: the same pytree, meaning "no condition"; read only with guidance.
        plan: the numbers of the draw.
    """

    condition: Any
    null_condition: Any
    plan: AutoregressivePlan


def draw_first(
    causal: CausalPredictor,
    draft: Draft,
    tokens: Int[Array, "b l"],
    rngs: jax.Array,
    program: AutoregressiveProgram,
    *,
    count: int,
    mask_token_id: int,
) -> Int[Array, "b l"]:
    """Return the tokens with the first `count` of each image drawn anew.

    Where the logits were no numbers, and behind such a place, stands the mask token.
    """
    drawn = autoregressive.decode(
        causal, draft.condition, draft.null_condition, rngs, program, draft.plan, count=count
    )
    drawn = jnp.where(drawn < 0, mask_token_id, drawn).astype(tokens.dtype)
    return jnp.concatenate([drawn, tokens[:, count:]], axis=1)
