"""Rotary position tables in one and two dimensions.

A table is cos and sin of one angle per position and pair of channels; `apply_rope` rotates the
interleaved pairs (0, 1), (2, 3), … of queries and keys, or the pairs (0, d/2), (1, d/2 + 1), ….
A row of zeros (cos = sin = 0) makes the query and the key of its position vanish, which LlamaGen's
weights need for condition tokens.

Reference: RoFormer (Su et al., 2021); LlamaGen `gpt.py`, `precompute_freqs_cis_2d`; Chen et al.,
2023, "Extending Context Window … via Positional Interpolation".
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def _frequencies(num_pairs: int, base: float) -> np.ndarray:
    return base ** (-np.arange(num_pairs, dtype=np.float64) / num_pairs)


def _table(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def rope_1d(length: int, head_dim: int, base: float = 10000.0) -> np.ndarray:
    """Return the table of positions 0…length-1 as float32 [length, head_dim/2, 2] (cos, sin)."""
    return _table(np.outer(np.arange(length), _frequencies(head_dim // 2, base)))


def rope_2d(
    grid_size: tuple[int, int],
    head_dim: int,
    base: float = 10000.0,
    span: tuple[int, int] | None = None,
) -> np.ndarray:
    """Return the table of a gh × gw grid in raster order: first half rows, second half columns.

    Args:
        grid_size: (gh, gw), tokens per column and per row.
        head_dim: channels per head, divisible by 4.
        base: base of the frequencies.
        span: the grid over whose positions this one is spread: row r lies at r·span[0]/gh, and so
            do columns. Every token lies at its own number if `None`.

    Returns:
        float32 [gh·gw, head_dim/2, 2] (cos, sin).

    Raises:
        ValueError: if `head_dim` is not divisible by 4.
    """
    if head_dim % 4:
        raise ValueError(f"2D RoPE needs a head dimension divisible by 4, not {head_dim}")
    gh, gw = grid_size
    frequencies = _frequencies(head_dim // 4, base)
    height, width = span or grid_size
    rows = np.repeat(np.outer(np.arange(gh) * (height / gh), frequencies), gw, axis=0)
    columns = np.tile(np.outer(np.arange(gw) * (width / gw), frequencies), (gh, 1))
    return _table(np.concatenate([rows, columns], axis=-1))


def condition_rows(count: int, head_dim: int, kind: str) -> np.ndarray:
    """Return table rows for condition tokens: `identity` (cos 1, sin 0) or `zero` (both 0).

    Raises:
        ValueError: if `kind` is neither.
    """
    if kind not in ("identity", "zero"):
        raise ValueError(f"cond_rope {kind!r} has no rows; allowed here: 'identity', 'zero'")
    rows = np.zeros((count, head_dim // 2, 2), np.float32)
    rows[..., 0] = kind == "identity"
    return rows


def diagonal_rows(
    count: int, length: int, grid_size: tuple[int, int], head_dim: int, base: float = 10000.0
) -> np.ndarray:
    """Return table rows for condition tokens on the diagonal of a grid: i at (i·gh, i·gw) / length.

    Their order is then seen by what attends to them, and both axes of the grid see it alike.

    Args:
        count: number of tokens.
        length: how many of them would fill the diagonal.
        grid_size: (gh, gw), tokens per column and per row.
        head_dim: channels per head, divisible by 4.
        base: base of the frequencies.

    Returns:
        float32 [count, head_dim/2, 2] (cos, sin).

    Reference: Wang et al., 2024, "Qwen2-VL", section 2.1 (text has one position on all axes).
    """
    frequencies = _frequencies(head_dim // 4, base)
    axes = [np.outer(np.arange(count) * (side / length), frequencies) for side in grid_size]
    return _table(np.concatenate(axes, axis=-1))


def apply_rope(
    x: Float[Array, "b l h d"],
    table: Float[Array | np.ndarray, "l d2 2"],
    pairs: str = "interleaved",
) -> Float[Array, "b l h d"]:
    """Rotate the channel pairs of `x` in float32; the result has the type of `x`.

    Args:
        x: queries or keys.
        table: cos and sin.
        pairs: `interleaved` (2i, 2i + 1), as LlamaGen, or `halves` (i, i + d/2), as Hugging Face.
    """
    cos, sin = jnp.asarray(table[..., 0]), jnp.asarray(table[..., 1])
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    wide = x.astype(jnp.float32)
    if pairs == "halves":
        one, two = jnp.split(wide, 2, axis=-1)
        turned = jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
        return turned.astype(x.dtype)
    wide = wide.reshape(*x.shape[:-1], -1, 2)
    even, odd = wide[..., 0], wide[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
