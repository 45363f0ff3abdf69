"""Fusion: a causal model draws the first tokens of an image, a masked one completes the rest.

More of the first is quality, more of the second is speed.

Reference: MaskGIL section 5.1, Table 5 and Figure 8.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from maskgil_jax.decoding import autoregressive, masked, prediction
from maskgil_jax.decoding.autoregressive import (
    AutoregressivePlan,
    AutoregressiveProgram,
    CausalPredictor,
)
from maskgil_jax.decoding.sampler import Program


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


def decode(
    causal: CausalPredictor,
    draft: Draft,
    draft_program: AutoregressiveProgram,
    predictor: prediction.Predictor,
    batch: masked.Batch,
    program: Program,
    *,
    count: int,
    mask_token_id: int,
    grid_size: tuple[int, int] | None = None,
    return_trace: bool = False,
) -> tuple[Int[Array, "b l"], masked.Trace | None]:
    """Draw the first `count` tokens of each image with one model and the others with another.

    Args:
        causal: the model that draws first.
        draft: what it starts from.
        draft_program: settings that shape its part.
        predictor: the masked model.
        batch: what it starts from; its plan is for the tokens that are left.
        program: settings that shape its part.
        count: tokens that the causal model draws, at least 1.
        mask_token_id: id of the mask token, equal to the number of codes.
        grid_size: (gh, gw) with gh·gw = l; only the order `halton` needs it.
        return_trace: whether to keep the tokens after every step of the masked model.

    Returns:
        As `masked.decode_batch`.
    """
    tokens = draw_first(
        causal,
        draft,
        batch.tokens,
        batch.rngs,
        draft_program,
        count=count,
        mask_token_id=mask_token_id,
    )
    return masked.decode_batch(
        predictor,
        dataclasses.replace(batch, tokens=tokens),
        program,
        mask_token_id=mask_token_id,
        grid_size=grid_size,
        return_trace=return_trace,
    )
