"""LlamaGen in PyTorch, token by token with a static cache: the peer of our autoregressive decoder.

Written the way a careful PyTorch user writes it: keys and values of all positions are allocated
once, guidance is one doubled batch, what is drawn stays on the device, and nothing is fetched
before the last token. Eager code may read the filled part of the cache as a view, or, as
LlamaGen's does, all of it under a mask; both are here. Without randomness a test holds its codes
against ours.

Reference: Sun et al., 2024, "Autoregressive Model Beats Diffusion"; LlamaGen
`autoregressive/models/generate.py`.
"""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
import torch
from maskgil_torch import Block, Config, load_weights, make_norm, rope_table, rotate
from torch import nn
from torch.nn import functional as F  # noqa: N812

from maskgil_jax import convert
from maskgil_jax.models.llamagen import LlamaGenConfig

# How much of the cache attention reads: what is filled, or all of it under a mask.
READS = ("filled_cache", "whole_cache")


class CachedBlock(Block):
    """A layer that reads one token of every sequence, with those before it in a cache."""

    def step(
        self,
        x: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor],
        cache: torch.Tensor,
        position: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the residual stream [b, e] behind this layer.

        Args:
            x: residual stream [b, e] at one position.
            turn: cos and sin [d/2] of that position.
            cache: keys and values [2, b, h, l, d]; those of the position are put in.
            position: its number.
            mask: what to add to the scores [1, l]; only filled positions are read if `None`.
        """
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k = rotate(qkv[:, :2], *turn).unbind(1)
        cache[0, :, :, position] = k
        cache[1, :, :, position] = qkv[:, 2]
        keys, values = cache if mask is not None else cache[:, :, :, : position + 1]
        y = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask)
        x = x + self.out(y.flatten(1))
        return x + self.feed_forward(self.mlp_norm(x))


class TorchLlamaGen(nn.Module):
    """A class-conditional LlamaGen; its parts are named as `maskgil_torch.load_weights` expects."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.codebook_size, config.width)
        self.label_embed = nn.Embedding(config.num_classes + 1, config.width)
        self._blocks = [CachedBlock(config) for _ in range(config.num_layers)]
        self.layers = nn.ModuleList(self._blocks)
        self.norm = make_norm("rms", config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)
        table = rope_table(config)
        self.register_buffer("cos", table[..., 0].contiguous(), persistent=False)
        self.register_buffer("sin", table[..., 1].contiguous(), persistent=False)

    def step(
        self,
        x: torch.Tensor,
        caches: torch.Tensor,
        position: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return float32 logits [b, K] of the next token.

        Args:
            x: embedded token [b, e].
            caches: of all layers, [layers, 2, b, h, l, d].
            position: of the token in the sequence, the condition's is 0.
            mask: as `CachedBlock.step` takes it.
        """
        turn = self.cos[position], self.sin[position]
        for layer, cache in zip(self._blocks, caches, strict=True):
            x = layer.step(x, turn, cache, position, mask)
        return self.head(self.norm(x)).float()


def make_model(config: LlamaGenConfig, params: Any) -> TorchLlamaGen:
    """Return the peer of a model of ours, with its parameters.

    Raises:
        ValueError: the config has norms that LlamaGen has not.
    """
    if (norms := (config.qk_norm, config.post_norm)) != ("none", "none"):
        raise ValueError(
            f"the PyTorch peer does not implement qk_norm {norms[0]!r} and post_norm {norms[1]!r} "
            "(only 'none')"
        )
    names = [f.name for f in dataclasses.fields(Config) if hasattr(config, f.name)]
    model: Any = TorchLlamaGen(Config(**{name: getattr(config, name) for name in names}))
    state = convert.export_state_dict(config.family, config, jax.tree.map(np.asarray, params))
    load_weights(model, {key: torch.tensor(value) for key, value in state.items()})
    return model


class TorchCausalSide:
    """The peer drawing the codes of one batch, eager; on a CPU, with all cores of this process.

    Args:
        config: shape and options of the model.
        params: its parameters, ours.
        labels: classes, one per image.
        settings: `guidance_scale` and `temperature` (0 takes the most probable code).
        device: `cpu` or `cuda`.
    """

    def __init__(
        self,
        config: LlamaGenConfig,
        params: Any,
        *,
        labels: np.ndarray,
        settings: dict[str, Any],
        device: str,
    ):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        # What JAX's default precision means on a GPU.
        torch.set_float32_matmul_precision("high")
        dtype = getattr(torch, config.dtype)
        self._model = make_model(config, params).to(device).eval()
        for parameter in self._model.parameters():
            parameter.data = parameter.data.to(dtype)
        self._config, self._settings, self._device = config, settings, device
        self._labels = torch.from_numpy(labels).long().to(device)
        self._guided = settings["guidance_scale"] != 1
        if self._guided:
            nothing = torch.full_like(self._labels, config.null_label)
            self._labels = torch.cat((self._labels, nothing))
        length, rows = config.seq_len, len(self._labels)
        shape = config.num_layers, 2, rows, config.num_heads, length, config.head_dim
        self._caches = torch.zeros(shape, dtype=dtype, device=device)
        hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        self._masks = torch.zeros(length, 1, length, dtype=dtype, device=device)
        self._masks.masked_fill_(hidden[:, None], -torch.inf)

    @torch.inference_mode()
    def sample_tokens(self, reads: str) -> np.ndarray:
        """Return int64 codes [b, gh, gw], on the host.

        Args:
            reads: one of `READS`.
        """
        drawn: list[torch.Tensor] = []
        x = self._model.label_embed(self._labels)
        for position in range(self._config.seq_len):
            mask = self._masks[position] if reads == "whole_cache" else None
            token = self._draw(self._model.step(x, self._caches, position, mask))
            drawn.append(token)
            x = self._model.token_embed(token.repeat(2) if self._guided else token)
        return torch.stack(drawn, 1).unflatten(1, self._config.grid_size).cpu().numpy()

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Return codes [b] drawn from logits [b, K], or [2b, K] with guidance."""
        if self._guided:
            conditional, unconditional = logits.chunk(2)
            scale = self._settings["guidance_scale"]
            logits = unconditional + scale * (conditional - unconditional)
        if self._settings["temperature"] == 0:
            return logits.argmax(-1)
        probs = (logits / self._settings["temperature"]).softmax(-1)
        # The largest ratio of weight to exponential noise is an exact draw.
        return (probs / torch.empty_like(probs).exponential_()).argmax(-1)
