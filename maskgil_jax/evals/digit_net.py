"""A small convolutional net that reads handwritten digits: for digits what Inception is for photos.

Three convolutions, a layer of 64 rectified features and one of 10 logits, on 32×32 grey pixels. Its
weights ship with the package (asset `digit_net`, made by `tools/train_digit_net.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, UInt8

FAMILY = "digit-net"
SIDE = 32
WIDTHS = {"pool": 64, "logits": 10}
# Kernel sides and channels of the convolutions, each of which halves the resolution.
_LAYERS = ((5, 16), (3, 24), (3, 24))

Params = dict[str, dict[str, Any]]


def init_params(seed: int) -> Params:
    """Draw the weights that training starts from: normal, of variance 2 over inputs, float32."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    channels, side = 1, SIDE
    for number, (kernel, width) in enumerate(_LAYERS):
        shapes[f"conv{number}"] = (kernel, kernel, channels, width)
        channels, side = width, side // 2
    shapes["features"] = (side * side * channels, WIDTHS["pool"])
    shapes["logits"] = (WIDTHS["pool"], WIDTHS["logits"])
    return {
        name: {
            "kernel": rng.normal(0, (2 / np.prod(shape[:-1])) ** 0.5, shape).astype(np.float32),
            "bias": np.zeros(shape[-1], np.float32),
        }
        for name, shape in shapes.items()
    }


def read_digits(
    params: Params, images: UInt8[Array, "b 32 32 c"]
) -> dict[str, Float[Array, "b d"]]:
    """Return features `pool` [b, 64], after their rectifier, and `logits` [b, 10], with bias."""
    x = images.astype(jnp.float32).mean(axis=-1, keepdims=True) / 255
    for number in range(len(_LAYERS)):
        layer = params[f"conv{number}"]
        x = lax.conv_general_dilated(
            x,
            jnp.asarray(layer["kernel"]),
            window_strides=(2, 2),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )
        x = jax.nn.relu(x + layer["bias"][None, None, None])
    pool = jax.nn.relu(_dense(params["features"], x.reshape(len(x), -1)))
    return {"pool": pool, "logits": _dense(params["logits"], pool)}


def _dense(layer: dict[str, Any], x: Float[Array, "b i"]) -> Float[Array, "b o"]:
    return jnp.matmul(x, layer["kernel"], precision=lax.Precision.HIGHEST) + layer["bias"][None]
