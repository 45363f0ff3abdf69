"""Sampling in PyTorch, from labels to pixels: the peers that our generator is measured against.

`TorchSampler` is what a careful user writes: vectorised, guidance as one doubled batch that is left
out where it has no weight, noise drawn where it is used, nothing fetched before the last step. It
runs eagerly, or compiled and in bfloat16. `ReleasedSampler` works as the sampler in the authors'
trainer does. The model is `tools/maskgil_torch.py`'s, the tokenizer `torch_vq`'s.

Reference: MaskGIL section 3.2; the released code, synbol/MaskGIL, `Trainer/vit.py`.
"""

import abc
import os
from typing import Any

import numpy as np
import torch
from benchmarks import torch_peer, torch_vq
from maskgil_torch import TorchMaskGIL, reveal_counts
from torch import nn

from maskgil_jax.models.maskgil import MaskGILConfig
from maskgil_jax.tokenizers.vq import VQConfig

NCHW = "nchw"


class _Generator(abc.ABC):
    """A model and the decoders of a tokenizer with our weights, and one batch of labels.

    Args:
        config: the model.
        params: its parameters, ours.
        vq: the tokenizer.
        vq_params: its parameters, ours.
        labels: classes, one per image.
        settings: `num_steps`, `schedule`, `guidance_scale` (the end of a linear ramp from 1),
            `temperature` (0 takes the most probable code) and `gumbel_temperature`.
        layouts: memory formats of the decoder, of `torch_vq.LAYOUTS`.
        device: `cpu` or `cuda`.
        dtype: type of the parameters.
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
        layouts: tuple[str, ...],
        device: str,
        dtype: torch.dtype = torch.float32,
    ):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        # What JAX's default precision means on a GPU.
        torch.set_float32_matmul_precision("high")
        self._model = torch_peer.make_model(config)
        torch_peer.load_flax_params(self._model, config, params)
        self._model = _cast_parameters(self._model.to(device).eval(), dtype)
        self._decoders: dict[str, Any] = {}
        for layout in layouts:
            decoder = torch_vq.TorchDecoder(vq)
            torch_vq.load_flax_params(decoder, vq_params)
            convert: Any = decoder.eval().to(device, dtype).to  # its stubs do not know the keyword
            self._decoders[layout] = convert(memory_format=torch_vq.LAYOUTS[layout])
        self._device, self._settings = device, settings
        self._labels = torch.tensor(labels, device=device)
        self._nothing = torch.full_like(self._labels, config.null_label)

    @abc.abstractmethod
    def sample_tokens(self) -> torch.Tensor:
        """Return int64 codes [b, gh, gw], on the device."""

    def sample(self, layout: str) -> np.ndarray:
        """Return uint8 images [b, H, W, 3], on the host."""
        return self.decode(self.sample_tokens(), layout)

    @torch.inference_mode()
    def decode(self, tokens: torch.Tensor, layout: str) -> np.ndarray:
        """Turn codes into uint8 images [b, H, W, 3], on the host."""
        pixels = self._decoders[layout](tokens).float() * 127.5 + 127.5
        return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def _masked_tokens(self) -> torch.Tensor:
        shape = len(self._labels), *self._model.config.grid_size
        return torch.full(shape, self._model.config.codebook_size, device=self._device)

    def _counts(self) -> list[int]:
        settings, length = self._settings, self._model.config.seq_len
        return reveal_counts(settings["schedule"], settings["num_steps"], length)


def _cast_parameters(model: TorchMaskGIL, dtype: torch.dtype) -> TorchMaskGIL:
    """Change the type of the parameters alone: rotary tables lose positions in bfloat16."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


class Step(nn.Module):
    """One step of the vectorised sampler; every number that changes is a tensor on the device."""

    def __init__(self, model: TorchMaskGIL, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        guided: bool,
        scale: torch.Tensor,
        count: torch.Tensor,
        noise_weight: torch.Tensor,
    ) -> torch.Tensor:
        """Return the tokens [b, gh, gw] after revealing `count` of each image.

        Args:
            tokens: codes, or the mask token.
            labels: classes [b]; [2b], the latter half "no condition", if `guided`.
            guided: whether both halves are computed.
            scale: of the guidance, a scalar.
            count: how many tokens to reveal, a scalar.
            noise_weight: of the Gumbel noise on the confidence, a scalar.
        """
        mask_id, shape = self.model.config.codebook_size, tokens.shape
        logits = self.model(torch.cat((tokens, tokens)) if guided else tokens, labels)
        # Logits end before the mask token: it can never be drawn.
        logits = logits[..., :mask_id].float()
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + scale * (conditional - unconditional)
        if self.temperature == 0:
            probs = logits.softmax(-1)
            codes = logits.argmax(-1)
        else:
            probs = (logits / self.temperature).softmax(-1)
            # The largest ratio of weight to exponential noise is an exact draw.
            codes = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
        confidence = probs.gather(-1, codes[..., None])[..., 0].log()
        smallest = torch.finfo(confidence.dtype).tiny
        gumbel = -torch.empty_like(confidence).exponential_().clamp_min(smallest).log()
        confidence = confidence + noise_weight * gumbel
        tokens = tokens.flatten(1)
        confidence = confidence.masked_fill(tokens != mask_id, -torch.inf)
        rank = confidence.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return torch.where(rank < count, codes, tokens).view(shape)


class TorchSampler(_Generator):
    """The careful peer.

    Args:
        *args: the model and the tokenizer, with our parameters.
        dtype: type of the parameters and of the computation.
        compiler: backend of `torch.compile` for step and decoder, which must be one graph each;
            eager if `None`.
        **options: labels, settings, layouts and device.
    """

    def __init__(self, *args: Any, dtype: str = "float32", compiler: str | None = None, **options):
        super().__init__(*args, dtype=getattr(torch, dtype), **options)
        settings, num_steps = self._settings, self._settings["num_steps"]
        ramp = np.linspace(0, 1, num_steps) if num_steps > 1 else np.ones(1)
        fade = np.linspace(1, 0, num_steps) if num_steps > 1 else np.zeros(1)
        scales = 1 + (settings["guidance_scale"] - 1) * ramp
        self._guided = [bool(scale != 1) for scale in scales]
        self._numbers = [
            torch.tensor(values, dtype=kind, device=self._device)
            for values, kind in (
                (scales, torch.float32),
                (self._counts(), torch.int64),
                (settings["gumbel_temperature"] * fade, torch.float32),
            )
        ]
        self._both = torch.cat((self._labels, self._nothing))
        self._step: Any = Step(self._model, settings["temperature"])
        if compiler is not None:
            self._step = torch.compile(self._step, fullgraph=True, backend=compiler)
            self._decoders = {
                layout: torch.compile(decoder, fullgraph=True, backend=compiler)
                for layout, decoder in self._decoders.items()
            }

    @torch.inference_mode()
    def sample_tokens(self) -> torch.Tensor:
        """Return int64 codes [b, gh, gw], on the device."""
        tokens = self._masked_tokens()
        for i, guided in enumerate(self._guided):
            labels = self._both if guided else self._labels
            tokens = self._step(tokens, labels, guided, *(table[i] for table in self._numbers))
        return tokens


class ReleasedSampler(_Generator):
    """The peer that works as the released trainer: half precision, and the host in every step.

    Both passes run in every step, the Gumbel noise is drawn by NumPy and copied, how many tokens
    are left is fetched, and a Python loop over the images marks what was revealed. The tokenizer
    decodes in float32, outside autocast.

    Args:
        *args: the model and the tokenizer, with our parameters.
        autocast: whether the model computes in float16; in float32 if not.
        **options: labels, settings, layouts and device.
    """

    def __init__(self, *args: Any, autocast: bool = True, **options):
        super().__init__(*args, **options)
        self._autocast = torch.autocast(self._device, torch.float16, autocast)
        self._rng = np.random.default_rng(0)

    @torch.no_grad()
    def sample_tokens(self) -> torch.Tensor:
        """Return int64 codes [b, gh, gw], on the device."""
        settings, last = self._settings, max(self._settings["num_steps"] - 1, 1)
        tokens = self._masked_tokens()
        masked = torch.ones(len(tokens), self._model.config.seq_len, device=self._device)
        for i, count in enumerate(self._counts()):
            if masked.sum() < count:
                count = int(masked.sum().item())
            if masked.sum() == 0:
                break
            probs, codes = self._draw(tokens, (settings["guidance_scale"] - 1) * i / last)
            weight = settings["gumbel_temperature"] * (1 - i / last)
            noise = weight * self._rng.gumbel(size=tuple(masked.shape))
            confidence = probs.gather(-1, codes[..., None])[..., 0].log()
            confidence = confidence + torch.from_numpy(noise).to(self._device)
            confidence[~masked.bool()] = -torch.inf
            least, chosen = confidence.topk(count, dim=-1)
            revealed = masked.bool() & (confidence >= least[:, -1:])
            tokens.flatten(1)[revealed] = codes[revealed]
            for row, places in zip(masked, chosen, strict=True):
                row[places] = 0
        return tokens

    def _draw(self, tokens: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probabilities [b, l, k] and codes drawn from them, after both passes."""
        with self._autocast:
            labels = torch.cat((self._labels, self._nothing))
            # The released model returns float32 logits, autocast or not.
            both = self._model(torch.cat((tokens, tokens)), labels).float()
            conditional, unconditional = both.chunk(2)
            logits = (1 + weight) * conditional - weight * unconditional
        logits = logits[..., : self._model.config.codebook_size]
        if self._settings["temperature"] == 0:
            return logits.softmax(-1), logits.argmax(-1)
        probs = (logits / self._settings["temperature"]).softmax(-1)
        return probs, torch.distributions.Categorical(probs=probs).sample()
