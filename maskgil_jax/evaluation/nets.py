"""Nets whose features are compared, behind one face; a figure names its net's fingerprint."""

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import UInt8

from maskgil_jax.build.models import resolve_path
from maskgil_jax.checkpoints import read_model_dir
from maskgil_jax.evals import digit_net
from maskgil_jax.evals.extractor import FeatureExtractor, default_batch_size, local_mesh
from maskgil_jax.evals.inception import INPUT_SIDE, Inception
from maskgil_jax.evaluation.protocols import DIGIT_NET, INCEPTION
from maskgil_jax.loading import INCEPTION_WEIGHTS, load_inception
from maskgil_jax.tokenizers.base import update_digest


@runtime_checkable
class FeatureNet(Protocol):
    """From images to features.

    Attributes:
        name: family of the net, as protocols name it.
        fingerprint: of its weights.
        resize: what it does to images of other sizes than its own, in words.
        widths: values of each feature: `pool` and `logits`, and `spatial` or `pixels`.
        batch_size: images that it computes at once; fewer in a call are filled up to as many.
        notes: what has to be said of figures on its features.
    """

    @property
    def name(self) -> str:
        """Family of the net."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its weights."""
        ...

    @property
    def resize(self) -> str:
        """What happens to images of other sizes."""
        ...

    @property
    def widths(self) -> Mapping[str, int]:
        """Values of each feature."""
        ...

    @property
    def batch_size(self) -> int:
        """Images that it computes at once."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be said of figures on its features."""
        ...

    def check_shape(self, name: str, shape: tuple[int, int, int]) -> None:
        """Raise a `ValueError` unless the net takes images (H, W, c) of the set `name`."""
        ...

    def extract(
        self, images: UInt8[np.ndarray, "b H W c"], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Return some of the features, each [b, width].

        However images are batched, they are the same up to the rounding of float32.
        """
        ...


def describe_net(net: FeatureNet) -> dict[str, str]:
    """Return what a report says of a net."""
    return {"name": net.name, "fingerprint": net.fingerprint, "resize": net.resize}


class DigitNet:
    """The small net that reads digits, with the weights that the package ships.

    Beside its features it gives the `pixels`, for what is measured on them.
    """

    name = DIGIT_NET
    resize = "none: images must have its 32×32 pixels"
    batch_size = 256
    notes: tuple[str, ...] = ()
    widths: Mapping[str, int] = {**digit_net.WIDTHS, "pixels": digit_net.SIDE**2 * 3}

    def __init__(self) -> None:
        self._params = read_model_dir(resolve_path("asset:digit_net")).params
        self._run = jax.jit(digit_net.read_digits)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of family and weights."""
        digest = hashlib.sha256(self.name.encode())
        update_digest(digest, self._params)
        return digest.hexdigest()

    def check_shape(self, name: str, shape: tuple[int, int, int]) -> None:
        """Refuse all but 32×32 RGB."""
        wanted = (digit_net.SIDE, digit_net.SIDE, 3)
        if shape != wanted:
            raise ValueError(
                f"{name}: images have {shape[0]}×{shape[1]} pixels, {shape[2]} channels; protocols "
                f"of digits compare images of {wanted[0]}×{wanted[1]} pixels and 3 channels"
            )

    def extract(
        self, images: UInt8[np.ndarray, "b H W c"], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Return some of `pool`, `logits` and `pixels`."""
        parts = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            # One size of batch: compiled once, and the same sums for the same image.
            room = [(0, self.batch_size - len(batch))] + [(0, 0)] * 3
            found = self._run(self._params, np.pad(batch, room))
            parts.append({name: np.asarray(x)[: len(batch)] for name, x in found.items()})
        features = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        features["pixels"] = images.reshape(len(images), -1)
        return {name: features[name] for name in names}


class InceptionNet:
    """The InceptionV3 of FID; see `evals.inception`.

    Args:
        inception: the net with its weights.
    """

    name = INCEPTION
    resize = f"to {INPUT_SIDE}×{INPUT_SIDE} pixels, bilinear as TensorFlow 1, nothing averaged"

    def __init__(self, inception: Inception):
        self._inception = inception
        self._extractors: dict[tuple[str, ...], FeatureExtractor] = {}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of shape and weights."""
        return self._inception.fingerprint

    @property
    def widths(self) -> Mapping[str, int]:
        """Values of each feature."""
        return self._inception.config.widths()

    @property
    def batch_size(self) -> int:
        """Images that all devices of this process compute at once."""
        return default_batch_size(local_mesh())

    @property
    def notes(self) -> tuple[str, ...]:
        """A note if the weights are others than the published ones."""
        if self._inception.is_published:
            return ()
        return (
            "the weights of Inception are not from the published file: no figure is comparable "
            "with one that was published",
        )

    def check_shape(self, name: str, shape: tuple[int, int, int]) -> None:
        """Refuse all but RGB; any size is resized."""
        if shape[2] != 3:
            raise ValueError(f"{name}: images have {shape[2]} channels; Inception takes RGB")

    def extract(
        self, images: UInt8[np.ndarray, "b H W c"], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Return some of `evals.inception.FEATURES`; the net runs no further than they need."""
        key = tuple(names)
        if key not in self._extractors:
            self._extractors[key] = FeatureExtractor(self._inception, features=key)
        return self._extractors[key](images)


def open_net(family: str, weights: str | os.PathLike[str] | None) -> FeatureNet:
    """Return the net of a protocol.

    Args:
        family: as a `Protocol` names it.
        weights: file or directory of its weights; digits need none.

    Raises:
        ValueError: if weights are missing, or given where there is no use for them.
    """
    if family == DIGIT_NET:
        if weights is not None:
            raise ValueError(
                "--inception is for protocols on Inception's features; those of digits use a net "
                "that comes with the package"
            )
        return DigitNet()
    if weights is None:
        raise ValueError(
            f"protocols on Inception's features need --inception: {INCEPTION_WEIGHTS}; "
            "--protocol digits needs no weights"
        )
    return InceptionNet(load_inception(weights))
