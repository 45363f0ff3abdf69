"""The same Bidirectional LLaMA in PyTorch: the peer that `tools/bench.py` measures us against.

Written the way a careful PyTorch user writes it (fused projections, scaled-dot-product attention,
fused AdamW). A test holds its logits, loss and gradients against ours, so that a ratio compares two
implementations of one function.

Reference: MaskGIL section 3.1 and Table 2.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from maskgil_jax.models.maskgil import MaskGILConfig
from maskgil_jax.training.optimizer import OptimizerConfig

IGNORED = -100  # the target that cross_entropy leaves out

# What the peer implements; a config that differs is refused instead of being measured as another.
_LAYOUT = {
    "condition": "first",
    "rope": "2d",
    "cond_rope": "identity",
    "embeddings": "separate",
    "embedding_dropout": 0.0,
}


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """Return a norm with a scale and no bias; `none` is the identity."""
    if kind == "none":
        return nn.Identity()
    return nn.RMSNorm(width, eps=eps) if kind == "rms" else nn.LayerNorm(width, eps, bias=False)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the interleaved channel pairs of x [b, h, l, d] by a table [l, d/2] each."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class Block(nn.Module):
    """One layer: attention and MLP, each pre-normalised, optionally post-normalised."""

    def __init__(self, config: MaskGILConfig):
        super().__init__()
        e, f, eps = config.width, config.mlp_width, config.norm_eps
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.attention_norm = make_norm("rms", e, eps)
        self.qkv = nn.Linear(e, 3 * e, bias=False)
        self.q_norm = make_norm(config.qk_norm, config.head_dim, eps)
        self.k_norm = make_norm(config.qk_norm, config.head_dim, eps)
        self.out = nn.Linear(e, e, bias=False)
        self.attention_post_norm = make_norm(config.post_norm, e, eps)
        self.mlp_norm = make_norm("rms", e, eps)
        self.mlp_post_norm = make_norm(config.post_norm, e, eps)
        self.gate_up = nn.Linear(e, 2 * f, bias=False)
        self.down = nn.Linear(f, e, bias=False)

    def attend(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Attend from every position to all of them."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.out(y.transpose(1, 2).flatten(2))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the gated MLP."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return the residual stream [b, l, e] behind this layer."""
        y = self.attention_post_norm(self.attend(self.attention_norm(x), cos, sin))
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp_post_norm(self.feed_forward(self.mlp_norm(x)))
        return x + F.dropout(y, self.dropout, self.training)


class TorchMaskGIL(nn.Module):
    """MaskGIL with the class token first, 2D RoPE and separate embeddings.

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
        self.config = config
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
    norms = {name: leaf for name, leaf in stack.items() if name.endswith("_norm")}
    norms |= {name: leaf for name, leaf in stack["attention"].items() if name.endswith("_norm")}
    for i in range(len(model.layers)):
        for name, leaf in norms.items():
            state[f"layers.{i}.{name}.weight"] = leaf["scale"][i]
        for name, kernel in kernels.items():
            kernel = np.asarray(kernel[i])
            state[f"layers.{i}.{name}.weight"] = kernel.reshape(kernel.shape[0], -1).T
        out = np.asarray(stack["attention"]["out"]["kernel"][i])
        state[f"layers.{i}.out.weight"] = out.reshape(-1, out.shape[-1]).T
    model.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in state.items()})


def make_optimizer(model: TorchMaskGIL, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW over all parameters in one fused pass, without warm-up."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def draw_mask(tokens: torch.Tensor) -> torch.Tensor:
    """Draw bool [b, gh, gw], true for a share arccos(r)/(π/2) of each sequence, r uniform."""
    b, length = tokens.shape[0], tokens[0].numel()
    share = torch.acos(torch.rand(b, 1, device=tokens.device)) / (torch.pi / 2)
    rank = torch.rand(b, length, device=tokens.device).argsort(-1).argsort(-1)
    return (rank < (share * length).ceil()).view_as(tokens)


def masked_loss(
    model: nn.Module,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    *,
    mask_token_id: int,
    smoothing: float,
) -> torch.Tensor:
    """Return the mean cross-entropy of the masked tokens, in nats.

    Args:
        model: tokens and labels → logits.
        tokens: codes [b, gh, gw].
        labels: classes [b].
        mask: bool [b, gh, gw], true where the model sees the mask token.
        mask_token_id: id of the mask token.
        smoothing: label smoothing in [0, 1).
    """
    logits = model(tokens.masked_fill(mask, mask_token_id), labels)
    targets = tokens.masked_fill(~mask, IGNORED).flatten()
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, label_smoothing=smoothing
    )


def update(
    model: TorchMaskGIL, optimizer: torch.optim.Optimizer, loss: torch.Tensor, clip_norm: float
) -> None:
    """Apply one update of a loss, the gradient clipped to a norm of at most `clip_norm`."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()


class TorchSide:
    """The peer in training: bfloat16 means autocast over float32 weights.

    Args:
        config: shape and options of the model.
        optimizer: settings of AdamW and clipping.
        smoothing: label smoothing in [0, 1).
        condition_dropout: share of labels replaced by the null label.
        batch: `tokens` and `label`, NumPy.
        device: `cpu` or `cuda`.
        compiled: whether the model goes through `torch.compile`.
    """

    def __init__(
        self,
        config: MaskGILConfig,
        optimizer: OptimizerConfig,
        *,
        smoothing: float,
        condition_dropout: float,
        batch: Mapping[str, np.ndarray],
        device: str,
        compiled: bool,
    ):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        # What JAX's default precision means on a GPU.
        torch.set_float32_matmul_precision("high")
        self._config, self._clip_norm, self._device = config, optimizer.clip_norm, device
        self._smoothing, self._condition_dropout = smoothing, condition_dropout
        self._weights = TorchMaskGIL(config).to(device)
        self._model: Any = torch.compile(self._weights) if compiled else self._weights
        self._optimizer = make_optimizer(self._weights, optimizer)
        self._tokens = torch.from_numpy(batch["tokens"]).long().to(device)
        self._labels = torch.from_numpy(batch["label"]).long().to(device)
        self._autocast = torch.autocast(device, torch.bfloat16, config.dtype == "bfloat16")

    def forward(self) -> None:
        """Compute the logits of the batch."""
        self._model.eval()
        with torch.inference_mode(), self._autocast:
            self._model(self._tokens, self._labels)
        self._wait()

    def train(self) -> None:
        """Update the model once, with masks, dropped labels and dropout drawn anew."""
        self._model.train()
        mask = draw_mask(self._tokens)
        dropped = torch.rand(len(self._labels), device=self._device) < self._condition_dropout
        labels = self._labels.masked_fill(dropped, self._config.null_label)
        with self._autocast:
            loss = masked_loss(
                self._model,
                self._tokens,
                labels,
                mask,
                mask_token_id=self._config.mask_token_id,
                smoothing=self._smoothing,
            )
        update(self._weights, self._optimizer, loss, self._clip_norm)
        self._wait()

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
