"""The paper's formulas in float64 NumPy, one loop at a time, against which the package is held."""

import math

import jax
import numpy as np
from flax import linen as nn

from maskgil_jax.models.maskgil import MaskGILConfig

TINY = dict(
    num_layers=2,
    width=32,
    num_heads=2,
    mlp_width=48,
    codebook_size=29,
    num_classes=5,
    grid_size=(3, 5),
)


def tiny_config(**changes):
    return MaskGILConfig(**TINY | changes)


def boxed_params(config):
    """Shapes and logical axes of a model's parameters; nothing is allocated."""
    gh, gw = config.grid_size
    tokens, labels = np.zeros((1, gh, gw), np.int32), np.zeros(1, np.int32)
    module = config.make_module()
    return jax.eval_shape(module.init, jax.random.key(0), tokens, labels)["params"]


def random_params(config, seed=0):
    """Every parameter random, the head and the norms included, so that none can be ignored."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape)
        centre, spread = (1.0, 0.3) if path[-1].key == "scale" else (0.0, 0.2)
        return (centre + spread * values).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(boxed_params(config)))


def random_inputs(config, batch=2, seed=1):
    """Tokens, a third of them masked, and labels, the last of them "no condition"."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.codebook_size, (batch, *config.grid_size))
    tokens = np.where(rng.random(tokens.shape) < 1 / 3, config.mask_token_id, tokens)
    labels = rng.integers(0, config.num_classes, batch)
    labels[-1] = config.null_label
    return tokens.astype(np.int32), labels.astype(np.int32)


def softmax(z):
    weights = np.exp(z - z.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def norm(x, scale, kind, eps):
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotations(config, gh, gw):
    """One unit complex number per position and pair of channels; 0 where a row is zero."""
    pairs, image = config.head_dim // 2, []
    for position in range(gh * gw):
        row, column = divmod(position, gw)
        if config.rope == "2d":
            half = pairs // 2
            turns = [row * config.rope_base ** (-p / half) for p in range(half)]
            turns += [column * config.rope_base ** (-p / half) for p in range(half)]
        else:
            turns = [position * config.rope_base ** (-p / pairs) for p in range(pairs)]
        image.append(np.exp(1j * np.array(turns)))
    if config.cond_rope == "table":
        return np.array([np.zeros(pairs), *image])
    condition = np.full(pairs, 1.0 if config.cond_rope == "identity" else 0.0)
    return np.array([condition, *image] if config.condition == "first" else [*image, condition])


def rotate(x, turns):
    """Rotate the channel pairs (0, 1), (2, 3), … of x [b l h d]."""
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turns[None, :, None, :]
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def forward(config, params, tokens, labels):
    """Logits [b, gh·gw, K+1] of a MaskGIL."""
    x = residual_stream(config, params, tokens, labels)
    scale, kernel = params["transformer"]["final_norm"]["scale"], params["head"]["kernel"]
    x = norm(x, scale, "rms", config.norm_eps)
    return (x[:, 1:] if config.condition == "first" else x[:, :-1]) @ kernel


def residual_stream(config, params, tokens, labels):
    """Output of the last layer [b, 1 + gh·gw, e], before the final norm."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    b, gh, gw = tokens.shape
    table = params["token_embed"]["embedding"]
    image = table[tokens.reshape(b, -1)]
    if config.embeddings == "shared":
        condition = table[config.codebook_size + 1 + labels]
    else:
        condition = params["label_embed"]["embedding"][labels]
    parts = [condition[:, None], image]
    x = np.concatenate(parts if config.condition == "first" else parts[::-1], axis=1)
    turns = rotations(config, gh, gw)
    for n in range(config.num_layers):
        layer = jax.tree.map(lambda p, n=n: p[n], params["transformer"]["layers"])
        x = x + post(config, layer, "attention", attention(config, layer, x, turns))
        x = x + post(config, layer, "mlp", swiglu(config, layer, x))
    return x


def post(config, layer, name, y):
    if config.post_norm == "none":
        return y
    return norm(y, layer[f"{name}_post_norm"]["scale"], config.post_norm, config.norm_eps)


def attention(config, layer, x, turns):
    x = norm(x, layer["attention_norm"]["scale"], "rms", config.norm_eps)
    weights = layer["attention"]
    q, k, v = (np.einsum("ble,ehd->blhd", x, weights["qkv"]["kernel"][:, i]) for i in range(3))
    if config.qk_norm != "none":
        q = norm(q, weights["q_norm"]["scale"], config.qk_norm, config.norm_eps)
        k = norm(k, weights["k_norm"]["scale"], config.qk_norm, config.norm_eps)
    q, k = rotate(q, turns), rotate(k, turns)
    scores = np.einsum("blhd,bshd->bhls", q, k) / math.sqrt(config.head_dim)
    y = np.einsum("bhls,bshd->blhd", softmax(scores), v)
    return np.einsum("blhd,hde->ble", y, weights["out"]["kernel"])


def swiglu(config, layer, x):
    x = norm(x, layer["mlp_norm"]["scale"], "rms", config.norm_eps)
    gate, up = (x @ layer["mlp"]["gate_up"]["kernel"][:, i] for i in range(2))
    return (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"]["kernel"]


def cross_entropy(logits, targets, smoothing):
    """Cross-entropy against (1 - ε)·one-hot + ε/v."""
    z = np.asarray(logits, np.float64)
    wanted = (1 - smoothing) * np.eye(z.shape[-1])[targets] + smoothing / z.shape[-1]
    return -(wanted * np.log(softmax(z))).sum(-1)


CURVES = {
    "root": lambda r: 1 - math.sqrt(r),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r * r,
    "cosine": lambda r: math.cos(math.pi * r / 2),
    "arccos": lambda r: math.acos(r) / (math.pi / 2),
}


def mask_ratio_counts(schedule, num_steps, unknown):
    """Tokens revealed per step when ⌈f((i+1)/T)·N⌉ stay masked after step i."""
    counts, masked = [], unknown
    for i in range(num_steps):
        share = CURVES[schedule]((i + 1) / num_steps)
        # f(1) = 0 holds exactly; cos(pi/2) in floating point does not.
        left = math.ceil(round(share * unknown, 9)) if i + 1 < num_steps else 0
        counts.append(masked - left)
        masked = left
    return counts


def adamw(params, grads, moments, step, *, rate, betas, epsilon, decay):
    """One AdamW update of a list of arrays; `step` counts from 1."""
    result = []
    for p, g, m in zip(params, grads, moments, strict=True):
        m["first"] = betas[0] * m["first"] + (1 - betas[0]) * g
        m["second"] = betas[1] * m["second"] + (1 - betas[1]) * g**2
        first = m["first"] / (1 - betas[0] ** step)
        second = m["second"] / (1 - betas[1] ** step)
        result.append(p - rate * (first / (np.sqrt(second) + epsilon) + decay * p))
    return result
