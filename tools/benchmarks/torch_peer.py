"""The same Bidirectional LLaMA in PyTorch: the peer that `tools/bench.py` measures us against.

The model is `tools/maskgil_torch.py`, written the way a careful PyTorch user writes it (fused
projections, scaled-dot-product attention); here is its training, with fused AdamW. A test holds its
logits, loss and gradients against ours, so that a ratio compares two implementations of one
function.

Reference: MaskGIL section 3.1 and Table 2.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from maskgil_torch import Config, TorchMaskGIL, load_weights
from torch import nn
from torch.nn import functional as F  # noqa: N812

from maskgil_jax import convert
from maskgil_jax.models.maskgil import MaskGILConfig
from maskgil_jax.training.optimizer import OptimizerConfig

IGNORED = -100  # the target that cross_entropy leaves out


def make_model(config: MaskGILConfig) -> TorchMaskGIL:
    """Return the peer of a model of ours, with random weights.

    Raises:
        ValueError: the config has dropout on the embeddings, which the peer has not.
    """
    if config.embedding_dropout:
        raise ValueError(
            f"the PyTorch peer does not implement embedding_dropout {config.embedding_dropout} "
            "(only 0.0)"
        )
    return TorchMaskGIL(
        Config(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Config)})
    )


def load_flax_params(model: TorchMaskGIL, config: MaskGILConfig, params: Any) -> None:
    """Copy the parameters of our Flax model (a nested dict of arrays) into the peer."""
    family = "maskgil-released" if config.embeddings == "shared" else "maskgil"
    params = jax.tree.map(np.asarray, params)
    # The weights are those of either layout, whatever the options that leave no trace in them.
    layout = dataclasses.replace(config, **dict(convert.find_family(family).layout))
    state = convert.export_state_dict(family, layout, params)
    load_weights(model, {key: torch.tensor(value) for key, value in state.items()})


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
        self._weights = make_model(config).to(device)
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
