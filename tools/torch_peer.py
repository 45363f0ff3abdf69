"""The same Bidirectional LLaMA in PyTorch: the peer that `tools/bench.py` measures us against.

Written the way a careful PyTorch user writes it (fused projections, scaled-dot-product attention,
fused AdamW) and checked against our model by a test, so that a ratio compares two implementations
of one function. Class token first, 2D RoPE on interleaved pairs, RMSNorm, SwiGLU, no biases.

Reference: MaskGIL section 3.1 and Table 2.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from maskgil_jax.models.maskgil import MaskGILConfig

IGNORED = -100  # the target that cross_entropy leaves out

# What the peer implements; a config that differs is refused instead of being measured as another.
_LAYOUT = {
    "condition": "first",
    "rope": "2d",
    "cond_rope": "identity",
    "embeddings": "separate",
    "qk_norm": "none",
    "post_norm": "none",
    "embedding_dropout": 0.0,
}


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the interleaved channel pairs of x [b, h, l, d] by a table [l, d/2] each."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class Block(nn.Module):
    """One layer: attention and MLP, each pre-normalised, with dropout on its output."""

    def __init__(self, config: MaskGILConfig):
        super().__init__()
        e, f = config.width, config.mlp_width
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.attention_norm = nn.RMSNorm(e, eps=config.norm_eps)
        self.qkv = nn.Linear(e, 3 * e, bias=False)
        self.out = nn.Linear(e, e, bias=False)
        self.mlp_norm = nn.RMSNorm(e, eps=config.norm_eps)
        self.gate_up = nn.Linear(e, 2 * f, bias=False)
        self.down = nn.Linear(f, e, bias=False)

    def attend(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Attend from every position to all of them."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.out(y.transpose(1, 2).flatten(2))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the gated MLP."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return the residual stream [b, l, e] behind this layer."""
        y = self.attend(self.attention_norm(x), cos, sin)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.feed_forward(self.mlp_norm(x))
        return x + F.dropout(y, self.dropout, self.training)


class TorchMaskGIL(nn.Module):
    """MaskGIL in the paper's layout.

    Raises:
        ValueError: if the config asks for an option that the peer does not have.
    """

    def __init__(self, config: MaskGILConfig):
        super().__init__()
        wrong = [
            f"{name} {getattr(config, name)!r} (only {value!r})"
            for name, value in _LAYOUT.items()
            if getattr(config, name) != value
        ]
        if wrong:
            raise ValueError(f"the PyTorch peer does not implement {', '.join(wrong)}")
        rows = config.codebook_size + 1
        self.token_embed = nn.Embedding(rows, config.width)
        self.label_embed = nn.Embedding(config.num_classes + 1, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, rows, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        table = torch.from_numpy(config.rope_table())
        self.register_buffer("cos", table[..., 0].contiguous(), persistent=False)
        self.register_buffer("sin", table[..., 1].contiguous(), persistent=False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return logits [b, gh·gw, K+1] for tokens [b, gh, gw] and labels [b]."""
        x = torch.cat((self.label_embed(labels)[:, None], self.token_embed(tokens.flatten(1))), 1)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.head(self.norm(x)[:, 1:])


def load_flax_params(model: TorchMaskGIL, params: Mapping[str, Any]) -> None:
    """Copy the parameters of our Flax model (a nested dict of arrays) into the peer."""
    stack = params["transformer"]["layers"]
    state = {
        "token_embed.weight": params["token_embed"]["embedding"],
        "label_embed.weight": params["label_embed"]["embedding"],
        "norm.weight": params["transformer"]["final_norm"]["scale"],
        "head.weight": np.asarray(params["head"]["kernel"]).T,
    }
    kernels = {
        "qkv": stack["attention"]["qkv"]["kernel"],
        "gate_up": stack["mlp"]["gate_up"]["kernel"],
        "down": stack["mlp"]["down"]["kernel"],
    }
    for i in range(len(model.layers)):
        for name in ("attention_norm", "mlp_norm"):
            state[f"layers.{i}.{name}.weight"] = stack[name]["scale"][i]
        for name, kernel in kernels.items():
            kernel = np.asarray(kernel[i])
            state[f"layers.{i}.{name}.weight"] = kernel.reshape(kernel.shape[0], -1).T
        out = np.asarray(stack["attention"]["out"]["kernel"][i])
        state[f"layers.{i}.out.weight"] = out.reshape(-1, out.shape[-1]).T
    model.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in state.items()})


def make_optimizer(model: TorchMaskGIL, **settings: Any) -> torch.optim.Optimizer:
    """Return AdamW over all parameters, in one fused pass."""
    return torch.optim.AdamW(model.parameters(), fused=True, **settings)


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    *,
    smoothing: float,
    clip_norm: float,
) -> torch.Tensor:
    """Update the model on one batch and return the loss, on masked tokens only.

    Args:
        model: in training mode.
        optimizer: of the model's parameters.
        tokens: masked tokens' ids [b, gh, gw], int64.
        labels: [b], int64.
        mask: bool [b, gh, gw], true where the token is hidden from the model.
        smoothing: label smoothing.
        clip_norm: largest norm of the gradient.
    """
    config = model
    inputs = tokens.masked_fill(mask, config.mask_token_id)
    targets = tokens.masked_fill(~mask, IGNORED).flatten()
    logits = model(inputs, labels)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets, label_smoothing=smoothing)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss.detach()
