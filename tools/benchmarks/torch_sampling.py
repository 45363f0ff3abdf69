"""Sampling in PyTorch, from labels to pixels: the peer that our generator is measured against.

The sampler is `tools/maskgil_torch.py`'s, vectorised over the batch; the tokenizer is `torch_vq`'s.
"""

import os
from typing import Any

import torch
from benchmarks import torch_peer, torch_vq
from maskgil_torch import generate

from maskgil_jax.models.maskgil import MaskGILConfig
from maskgil_jax.tokenizers.vq import VQConfig


class TorchSampler:
    """The peer generating one batch, float32, with our weights.

    Args:
        config: the model.
        params: its parameters, ours.
        vq: the tokenizer.
        vq_params: its parameters, ours.
        labels: classes, one per image.
        settings: arguments of `maskgil_torch.generate`.
        layout: memory format of the tokenizer, `nchw` or `channels_last`.
        device: `cpu` or `cuda`.
    """

    def __init__(
        self,
        config: MaskGILConfig,
        params: Any,
        vq: VQConfig,
        vq_params: Any,
        *,
        labels: list[int],
        settings: dict[str, Any],
        layout: str,
        device: str,
    ):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_float32_matmul_precision("high")
        model = torch_peer.make_model(config)
        torch_peer.load_flax_params(model, config, params)
        self._model = model.to(device).eval()
        decoder = torch_vq.TorchDecoder(vq)
        torch_vq.load_flax_params(decoder, vq_params)
        convert: Any = decoder.eval().to(device).to  # its stubs do not know the keyword
        self._decoder = convert(memory_format=torch_vq.LAYOUTS[layout])
        self._labels = torch.tensor(labels, device=device)
        self._settings = settings

    def sample(self) -> Any:
        """Return uint8 images [b, H, W, 3], on the host."""
        with torch.inference_mode():
            tokens, _ = generate(self._model, self._labels, **self._settings)
            return self.decode(tokens)

    def decode(self, tokens: torch.Tensor) -> Any:
        """Turn codes into uint8 images [b, H, W, 3], on the host."""
        with torch.inference_mode():
            pixels = self._decoder(tokens) * 127.5 + 127.5
            return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
