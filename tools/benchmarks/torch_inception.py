"""The InceptionV3 of FID in PyTorch: the peer that feature extraction is measured against.

Modules are named as in the published file, so that it takes its state dict. A test holds its
features against ours.

Reference: mseitzer/pytorch-fid, inception.py; Szegedy et al. 2016.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from benchmarks.torch_vq import LAYOUTS
from torch import nn
from torch.nn import functional as F  # noqa: N812

from maskgil_jax.evals.inception import INPUT_SIDE, InceptionConfig


class Unit(nn.Module):
    """A convolution, its batch norm and the ReLU."""

    def __init__(self, before: int, width: int, kernel: Any, **options: Any):
        super().__init__()
        self.conv = nn.Conv2d(before, width, kernel, bias=False, **options)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return relu(norm(conv(x)))."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """A block: branches side by side, each a chain of units, of which the last may fork.

    Args:
        before: channels of the input.
        branches: lists of units (name, channels, kernel, options). Of two whose names end in `a`
            and `b`, both take the output of the unit before.
        pool: `average` or `max` in front of the unit `branch_pool`, or `halve`.
        pool_width: channels of the unit behind the pool; 0 for none.
    """

    def __init__(self, before: int, branches: list[list[tuple]], pool: str, pool_width: int):
        super().__init__()
        self._chains, self._pool = [], pool
        for chain in branches:
            channels, names = before, []
            for name, width, kernel, options in chain:
                self.add_module(name, Unit(channels, width, kernel, **options))
                channels = channels if name.endswith("a") else width
                names.append(name)
            self._chains.append(names)
        if pool_width:
            self.branch_pool = Unit(before, pool_width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the branches side by side."""
        outputs = []
        for names in self._chains:
            y = x
            for name in names:
                if name.endswith("a"):
                    outputs.append(self.get_submodule(name)(y))
                else:
                    y = self.get_submodule(name)(y)
            outputs.append(y)
        if self._pool == "halve":
            return torch.cat([*outputs, F.max_pool2d(x, 3, 2)], 1)
        if self._pool == "max":
            pooled = F.max_pool2d(x, 3, 1, 1)
        else:
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*outputs, self.branch_pool(pooled)], 1)


def _unit(name: str, width: int, kernel: Any, stride: int = 1) -> tuple:
    """Return a unit, padded so that it keeps the resolution if it does not halve it."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = tuple(side // 2 for side in sides) if stride == 1 else 0
    return name, width, kernel, {"stride": stride, "padding": padding}


class TorchInception(nn.Module):
    """Images uint8 [b, 3, H, W] to the averages [b, 64 · channels] behind the last block."""

    def __init__(self, config: InceptionConfig):
        super().__init__()

        def of(width: int) -> int:
            return width * config.channels // 32

        def unit(name: str, width: int, kernel: Any, stride: int = 1) -> tuple:
            return _unit(name, of(width), kernel, stride)

        self.Conv2d_1a_3x3 = Unit(3, of(32), 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(of(32), of(32), 3)
        self.Conv2d_2b_3x3 = Unit(of(32), of(64), 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(of(64), of(80), 1)
        self.Conv2d_4a_3x3 = Unit(of(80), of(192), 3)
        blocks: dict[str, Mixed] = {}
        for name, before, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            branches = [
                [unit("branch1x1", 64, 1)],
                [unit("branch5x5_1", 48, 1), unit("branch5x5_2", 64, 5)],
                [
                    unit("branch3x3dbl_1", 64, 1),
                    unit("branch3x3dbl_2", 96, 3),
                    unit("branch3x3dbl_3", 96, 3),
                ],
            ]
            blocks[name] = Mixed(of(before), branches, "average", of(pool))
        branches = [
            [unit("branch3x3", 384, 3, 2)],
            [
                unit("branch3x3dbl_1", 64, 1),
                unit("branch3x3dbl_2", 96, 3),
                unit("branch3x3dbl_3", 96, 3, 2),
            ],
        ]
        blocks["6a"] = Mixed(of(288), branches, "halve", 0)
        row, column = (1, 7), (7, 1)
        for name, inner in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            branches = [
                [unit("branch1x1", 192, 1)],
                [
                    unit("branch7x7_1", inner, 1),
                    unit("branch7x7_2", inner, row),
                    unit("branch7x7_3", 192, column),
                ],
                [
                    unit("branch7x7dbl_1", inner, 1),
                    unit("branch7x7dbl_2", inner, column),
                    unit("branch7x7dbl_3", inner, row),
                    unit("branch7x7dbl_4", inner, column),
                    unit("branch7x7dbl_5", 192, row),
                ],
            ]
            blocks[name] = Mixed(of(768), branches, "average", of(192))
        branches = [
            [unit("branch3x3_1", 192, 1), unit("branch3x3_2", 320, 3, 2)],
            [
                unit("branch7x7x3_1", 192, 1),
                unit("branch7x7x3_2", 192, row),
                unit("branch7x7x3_3", 192, column),
                unit("branch7x7x3_4", 192, 3, 2),
            ],
        ]
        blocks["7a"] = Mixed(of(768), branches, "halve", 0)
        row, column = (1, 3), (3, 1)
        for name, before, kind in (("7b", 1280, "average"), ("7c", 2048, "max")):
            branches = [
                [unit("branch1x1", 320, 1)],
                [
                    unit("branch3x3_1", 384, 1),
                    unit("branch3x3_2a", 384, row),
                    unit("branch3x3_2b", 384, column),
                ],
                [
                    unit("branch3x3dbl_1", 448, 1),
                    unit("branch3x3dbl_2", 384, 3),
                    unit("branch3x3dbl_3a", 384, row),
                    unit("branch3x3dbl_3b", 384, column),
                ],
            ]
            blocks[name] = Mixed(of(before), branches, kind, of(192))
        for name, block in blocks.items():
            self.add_module(f"Mixed_{name}", block)
        self.blocks = list(blocks.values())
        self.fc = nn.Linear(of(2048), config.num_logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features that FID is computed from."""
        x = (_resize(images.float(), INPUT_SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


def _resize(x: torch.Tensor, side: int) -> torch.Tensor:
    """Resize bilinearly from the corner, as TensorFlow 1 did; PyTorch has no such function."""
    for axis in (3, 2):
        old = x.shape[axis]
        at = torch.arange(side, dtype=torch.float32, device=x.device) * (old / side)
        low = at.floor().long()
        one, other = (x.index_select(axis, i) for i in (low, (low + 1).clamp(max=old - 1)))
        share = at - low
        x = one + (other - one) * (share if axis == 3 else share[:, None])
    return x


class TorchInceptionSide:
    """The peer on one batch, eager float32; on a CPU, with all cores this process may use.

    Attributes:
        model: the net.

    Args:
        config: shape of the net.
        state_dict: weights under the published names.
        images: uint8 [b, H, W, 3].
        layout: `nchw` or `channels_last`.
        device: `cpu` or `cuda`.
    """

    def __init__(
        self,
        config: InceptionConfig,
        state_dict: Mapping[str, np.ndarray],
        images: np.ndarray,
        *,
        layout: str,
        device: str,
    ):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        memory = LAYOUTS[layout]
        model = TorchInception(config).eval()
        model.load_state_dict({key: torch.tensor(array) for key, array in state_dict.items()})
        convert: Any = model.to(device).to  # its stubs do not know the keyword
        self.model = convert(memory_format=memory)
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
        self._images = batch.contiguous(memory_format=memory)

    def extract(self) -> np.ndarray:
        """Return the features of the batch."""
        with torch.inference_mode():
            return self.model(self._images).cpu().numpy()
