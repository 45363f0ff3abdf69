"""What a Gemma costs in memory and time, from its sizes alone; nothing is run or allocated."""

import dataclasses
import math

import jax
from flax import linen as nn

from maskgil_jax.text.gemma import GemmaConfig, check_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one call of an encoder.

    Attributes:
        parameters: number of parameters that are held.
        parameter_bytes: memory of these.
        working_bytes: memory beside the parameters: the activations of one layer, if the compiler
            fuses nothing, and the copy of its parameters that the loop over layers takes.
        flops: floating-point operations of all matrix products; a multiplication and an addition
            are two. The masked half of the attention is computed, hence counted.
        bytes_read: of parameters: those of all layers, and the rows of the tokens.
    """

    parameters: int
    parameter_bytes: int
    working_bytes: int
    flops: int
    bytes_read: int

    def least_seconds(self, *, flops_per_second: float, bytes_per_second: float) -> float:
        """Return the time below which no device of these rates can be.

        Args:
            flops_per_second: peak rate of matrix products.
            bytes_per_second: peak rate of the memory that holds the parameters.
        """
        return max(self.flops / flops_per_second, self.bytes_read / bytes_per_second)


def estimate_cost(
    config: GemmaConfig,
    *,
    tokens: int = 120,
    batch_size: int = 1,
    hidden_layer: int = -1,
    dtype: str = "bfloat16",
) -> Cost:
    """Return what it costs to encode a batch of captions.

    Args:
        config: the model's sizes.
        tokens: tokens s of each caption, padding included.
        batch_size: captions b.
        hidden_layer: as the encoder's; layers beyond it cost nothing.
        dtype: type of parameters and computation.

    Raises:
        ValueError: a number below 1, more tokens than the model reads, no such hidden layer or
            type.
    """
    check_dtype("dtype", dtype)
    if batch_size < 1 or not 1 <= tokens <= config.max_positions:
        raise ValueError(
            f"batch_size {batch_size} and tokens {tokens} must be at least 1, and tokens at most "
            f"{config.max_positions}"
        )
    size = 4 if dtype == "float32" else 2
    depth = config.find_depth(hidden_layer)
    params = nn.unbox(config.abstract_params(hidden_layer=hidden_layer))
    counts = {
        jax.tree_util.keystr(path, simple=True, separator="/"): math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    rows = batch_size * tokens
    kernels = sum(count for path, count in counts.items() if path.endswith("kernel"))
    heads = config.num_heads * config.head_dim
    attention = 2 * 2 * rows * tokens * heads * depth
    embedding = counts["embedding"]
    parameters = sum(counts.values())
    layers = sum(count for path, count in counts.items() if path.startswith("layers/"))
    layer = layers // max(depth, 1)
    return Cost(
        parameters=parameters,
        parameter_bytes=parameters * size,
        working_bytes=_activation_bytes(config, tokens, batch_size, size) + layer * size,
        flops=2 * rows * kernels + attention,
        bytes_read=(parameters - embedding + rows * config.width) * size,
    )


def _activation_bytes(config: GemmaConfig, tokens: int, batch_size: int, size: int) -> int:
    """Return the larger of what attention and MLP hold, with the residual and its normed copy."""
    cfg, rows = config, batch_size * tokens
    queries = cfg.num_heads * cfg.head_dim
    keys = 2 * cfg.num_kv_heads * cfg.head_dim
    # Logits and weights in float32, and the weights once more in the type of the computation.
    scores = rows * tokens * cfg.num_heads * (8 + size)
    attention = rows * (2 * queries + keys) * size + scores
    mlp = rows * 3 * cfg.mlp_width * size
    # The norms compute in float32.
    residual = rows * cfg.width * (2 * size + 4)
    return max(attention, mlp) + residual
