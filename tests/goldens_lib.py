"""Golden vectors of the original PyTorch implementations, for tests.

Outputs are stored; weights and images are rebuilt, each a pure function of its name and shape.
"""

import dataclasses
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "goldens"


@dataclasses.dataclass(frozen=True)
class Golden:
    """One golden: what was run, its weights under their published names, inputs and outputs."""

    name: str
    config: dict[str, Any] | None
    notes: str
    state_dict: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]


def load_golden(name: str) -> Golden:
    """Load a golden from tests/goldens and rebuild its weights; usage buffers are left out."""
    described = json.loads((FOLDER / f"{name}.json").read_text())
    rule = RULES.get(name, fill)
    state_dict = {
        key: rule(key, tuple(shape))
        for key, (shape, dtype) in described.get("state_dict", {}).items()
        if dtype.startswith("float") and "codebook_used" not in key
    }
    with np.load(FOLDER / f"{name}.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    return Golden(name, described.get("config"), described["notes"], state_dict, arrays)


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 weights of a tensor: about unit gain for matrices, norms near one."""
    values = _generator(name).standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return values / np.float32(math.sqrt(math.prod(shape[1:])))
    centre = 1.0 if name.endswith("weight") and "norm" in name.lower() else 0.0
    return (centre + 0.1 * values).astype(np.float32)


def fill_inception(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 weights of a tensor of the Inception net, whose ReLUs halve the gain."""
    values = _generator(name).standard_normal(shape, dtype=np.float32)
    if name.endswith("running_var"):
        return (1.0 + 0.1 * np.abs(values)).astype(np.float32)
    if len(shape) > 1:
        return values * np.float32(math.sqrt(2.0 / math.prod(shape[1:])))
    return ((1.0 if name.endswith("bn.weight") else 0.0) + 0.1 * values).astype(np.float32)


def fill_gemma(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 weights of a tensor of Gemma, whose norms multiply by 1 + weight."""
    values = _generator(name).standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return values / np.float32(math.sqrt(math.prod(shape[1:])))
    return np.float32(0.1) * values


def fill_chameleon_lm(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 weights of a tensor of Chameleon, whose norms of heads are matrices."""
    values = _generator(name).standard_normal(shape, dtype=np.float32)
    if "norm" in name:
        return ((1.0 if name.endswith("weight") else 0.0) + 0.1 * values).astype(np.float32)
    if len(shape) > 1:
        return values / np.float32(math.sqrt(math.prod(shape[1:])))
    return np.float32(0.1) * values


RULES = {
    "inception_fid": fill_inception,
    "chameleon_lm_tiny": fill_chameleon_lm,
    "gemma_tiny": fill_gemma,
    "gemma2_tiny": fill_gemma,
}


def golden_image(shape: tuple[int, int, int, int], tag: str) -> np.ndarray:
    """Return the float32 NHWC image in [-1, 1] that the golden `tag` was given: noisy 8x8 tiles."""
    generator = _generator(f"image:{tag}")
    batch, height, width, channels = shape
    tiles = generator.uniform(-1, 1, size=(batch, height // 8, width // 8, channels))
    smooth = tiles.astype(np.float32).repeat(8, axis=1).repeat(8, axis=2)
    noise = generator.standard_normal(shape, dtype=np.float32)
    return np.clip(smooth + 0.1 * noise, -1, 1).astype(np.float32)


def _generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
