"""LlamaGen-VQ in PyTorch: the peer that extraction and sampling are measured against.

Modules are named as the paths of our Flax parameters, so that one rule copies all weights. A test
holds its latents, tokens and images against ours.

Reference: Sun et al. 2024, section 2.1; Esser et al. 2021.
"""

import os
from typing import Any

import numpy as np
import torch
from flax import traverse_util
from torch import nn
from torch.nn import functional as F  # noqa: N812

from maskgil_jax.tokenizers.vq import VQConfig

GROUPS, EPSILON = 32, 1e-6
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Normed(nn.Module):
    """Group norm with the names of our parameters."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [b, c, H, W]."""
        return F.group_norm(x, GROUPS, self.scale, self.bias, EPSILON)


class Residual(nn.Module):
    """Two normalised 3×3 convolutions around a skip."""

    def __init__(self, channels: int, features: int):
        super().__init__()
        self.norm1, self.conv1 = Normed(channels), nn.Conv2d(channels, features, 3, padding=1)
        self.norm2, self.conv2 = Normed(features), nn.Conv2d(features, features, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, features, 1) if channels != features else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input, projected if need be, plus the residual branch."""
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """One head over all positions, around a skip."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Normed(channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input plus what its positions attended to."""
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.out(attended.transpose(1, 2).reshape(x.shape))


class TorchEncoder(nn.Module):
    """Images [b, 3, H, W] in [-1, 1] to tokens [b, gh, gw].

    Raises:
        ValueError: if the codes are not on the unit sphere, which this peer takes for granted.
    """

    def __init__(self, config: VQConfig):
        super().__init__()
        if not config.l2_normalize:
            raise ValueError("the PyTorch peer implements l2_normalize True only")
        channels, last = config.channels, len(config.channel_multipliers) - 1
        layers: dict[str, nn.Module] = {"conv_in": nn.Conv2d(3, channels, 3, padding=1)}
        for level, multiplier in enumerate(config.channel_multipliers):
            for block in range(config.num_res_blocks):
                width = config.channels * multiplier
                layers[f"down_{level}_res_{block}"] = Residual(channels, width)
                channels = width
                if level == last and config.level_attention:
                    layers[f"down_{level}_attn_{block}"] = Attention(channels)
            if level != last:
                layers[f"down_{level}_downsample"] = nn.Conv2d(channels, channels, 3, stride=2)
        layers["mid_res_0"] = Residual(channels, channels)
        layers["mid_attn"] = Attention(channels)
        layers["mid_res_1"] = Residual(channels, channels)
        layers["norm_out"] = Normed(channels)
        layers["conv_out"] = nn.Conv2d(channels, config.latent_channels, 3, padding=1)
        self.encoder = nn.ModuleDict(layers)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.codebook = nn.Parameter(torch.zeros(config.codebook_size, config.embed_dim))

    def latents(self, x: torch.Tensor) -> torch.Tensor:
        """Return the latents [b, gh, gw, z] in front of the quantiser."""
        for name, layer in self.encoder.items():
            if name.endswith("downsample"):
                x = F.pad(x, (0, 1, 0, 1))
            x = layer(F.silu(x) if name == "conv_out" else x)
        return self.quant_conv(x).permute(0, 2, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens: on the unit sphere, the nearest code has the largest product."""
        latents = F.normalize(self.latents(x), dim=-1)
        return (latents @ F.normalize(self.codebook, dim=-1).T).argmax(-1)


class TorchDecoder(nn.Module):
    """Tokens [b, gh, gw] to images [b, 3, H, W], not clipped.

    Raises:
        ValueError: if the codes are not on the unit sphere, which this peer takes for granted.
    """

    def __init__(self, config: VQConfig):
        super().__init__()
        if not config.l2_normalize:
            raise ValueError("the PyTorch peer implements l2_normalize True only")
        widths = [config.channels * m for m in reversed(config.channel_multipliers)]
        channels = widths[0]
        layers: dict[str, nn.Module] = {
            "conv_in": nn.Conv2d(config.latent_channels, channels, 3, padding=1),
            "mid_res_0": Residual(channels, channels),
            "mid_attn": Attention(channels),
            "mid_res_1": Residual(channels, channels),
        }
        for level, width in enumerate(widths):
            for block in range(config.num_res_blocks + 1):
                layers[f"up_{level}_res_{block}"] = Residual(channels, width)
                channels = width
                if level == 0 and config.level_attention:
                    layers[f"up_0_attn_{block}"] = Attention(channels)
            if level != len(widths) - 1:
                layers[f"up_{level}_upsample"] = nn.Conv2d(channels, channels, 3, padding=1)
        layers["norm_out"] = Normed(channels)
        layers["conv_out"] = nn.Conv2d(channels, 3, 3, padding=1)
        self.decoder = nn.ModuleDict(layers)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        self.codebook = nn.Parameter(torch.zeros(config.codebook_size, config.embed_dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the images; they take the memory format of the weights."""
        codes = F.normalize(self.codebook, dim=-1)[tokens].permute(0, 3, 1, 2)
        # What is looked up has its channels innermost, and a convolution keeps its input's format.
        if next(self.decoder["conv_in"].parameters()).is_contiguous():
            codes = codes.contiguous()
        x = self.post_quant_conv(codes)
        for name, layer in self.decoder.items():
            if name.endswith("upsample"):
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = layer(F.silu(x) if name == "conv_out" else x)
        return x


def load_flax_params(model: TorchEncoder | TorchDecoder, params: Any) -> None:
    """Copy the parameters of our tokenizer; those of the other half are left out."""
    state = {"codebook": params["quantizer"]["codebook"]}
    half = ("encoder", "quant_conv")
    if isinstance(model, TorchDecoder):
        half = ("decoder", "post_quant_conv")
    used = {name: params[name] for name in half}
    for path, leaf in traverse_util.flatten_dict(used).items():
        array = np.asarray(leaf)
        if path[-1] == "kernel":
            path, array = (*path[:-1], "weight"), array.transpose(3, 2, 0, 1)
        state[".".join(path)] = array
    model.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in state.items()})


class TorchVQSide:
    """The peer encoding one batch, eager float32; on a CPU, with all cores this process may use.

    Args:
        config: shape of the tokenizer.
        params: our parameters.
        images: float32 [b, H, W, 3] in [-1, 1].
        layout: `nchw` or `channels_last`.
        device: `cpu` or `cuda`.
    """

    def __init__(
        self, config: VQConfig, params: Any, images: np.ndarray, *, layout: str, device: str
    ):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        memory = LAYOUTS[layout]
        model = TorchEncoder(config).eval()
        load_flax_params(model, params)
        convert: Any = model.to(device).to  # its stubs do not know the keyword
        self._model = convert(memory_format=memory)
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
        self._images = batch.contiguous(memory_format=memory)

    def encode(self) -> np.ndarray:
        """Return the tokens of the batch."""
        with torch.inference_mode():
            return self._model(self._images).cpu().numpy()
