"""Stand-ins for nets and images of an evaluation, small and exact."""

import numpy as np

from maskgil_jax.evaluation.protocols import INCEPTION

SHAPE = (8, 6, 3)


class FakeNet:
    """Features are fixed projections of the pixels, in float64 rounded to float32."""

    name = INCEPTION
    resize = "none"
    notes = ()

    def __init__(self, fingerprint="f" * 64, batch_size=1):
        self.batch_size = batch_size
        self.widths = {"pool": 4, "logits": 3, "spatial": 5}
        self.fingerprint = fingerprint
        self.broken = None  # number of an image, counted over calls, whose features are NaN
        self._seen = 0
        self.calls = []  # images of each

    def check_shape(self, name, shape):
        if shape[2] != 3:
            raise ValueError(f"{name}: not RGB")

    def extract(self, images, names):
        flat = images.reshape(len(images), -1).astype(np.float64) / 255
        features = {}
        for name in names:
            rng = np.random.default_rng((self.widths[name], flat.shape[1]))
            projection = rng.standard_normal((flat.shape[1], self.widths[name]))
            features[name] = (flat @ projection).astype(np.float32)
        if self.broken is not None and self._seen <= self.broken < self._seen + len(images):
            features["pool"][self.broken - self._seen] = np.nan
        self._seen += len(images)
        self.calls.append(len(images))
        return features


def make_pixels(count, *, seed=0, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


class FakeImages:
    """Noise; reading stops with KeyboardInterrupt at the image `stop_at`."""

    def __init__(self, count, *, seed=0, labels=None, stop_at=None, sampler=None):
        self._pixels = make_pixels(count, seed=seed)
        self.image_shape = SHAPE
        self.labels = labels
        self.settings = {"kind": "fake", "seed": seed} | (
            {} if sampler is None else {"sampler": sampler}
        )
        self.stop_at = stop_at
        self.reads = []

    def __len__(self):
        return len(self._pixels)

    def read(self, first, stop):
        if self.stop_at is not None and first <= self.stop_at < stop:
            raise KeyboardInterrupt
        self.reads.append((first, stop))
        return self._pixels[first:stop]
