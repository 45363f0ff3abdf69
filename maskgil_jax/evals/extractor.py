"""Features of many images, batch by batch: bounded memory, all devices, results on the host."""

import difflib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from maskgil_jax import sharding
from maskgil_jax.evals.inception import FEATURES, Inception, InceptionV3, resize_images

# For each device: a CPU is fastest where the activations of few images stay in its caches.
CPU_BATCH, ACCELERATOR_BATCH = 4, 64
Features = dict[str, Float[np.ndarray, "n _"]]
Images = Array | np.ndarray | Iterable[Array | np.ndarray]


def local_mesh() -> Mesh:
    """Return all devices of this process."""
    return sharding.make_mesh({"data": -1}, jax.local_devices())


def default_batch_size(mesh: Mesh) -> int:
    """Return the images that are computed at once on these devices unless a number is given."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return (CPU_BATCH if on_cpu else ACCELERATOR_BATCH) * sharding.batch_shards(mesh)


class FeatureExtractor:
    """Inception features of uint8 images of any size, float32 whatever the device.

    Images are computed in batches of one size, however they come: the net is compiled once, the
    resizing once for each size of image. Features depend on the batch size and on the number of
    devices only by the rounding of float32.

    Args:
        inception: the net with its weights.
        features: which of `FEATURES` to compute; the net is not run further than they need.
        batch_size: images at a time, on all devices together; by default 4 on each CPU device and
            64 on each other one. An image takes about 20 MB.
        mesh: devices of this process, each of which computes its share of a batch; all if `None`.

    Raises:
        ValueError: an unknown feature or none, a batch that does not split evenly over the devices,
            or devices of other processes.
    """

    def __init__(
        self,
        inception: Inception,
        *,
        features: Sequence[str] = ("pool",),
        batch_size: int | None = None,
        mesh: Mesh | None = None,
    ):
        if mesh is None:
            mesh = local_mesh()
        if set(mesh.devices.flat) - set(jax.local_devices()):
            raise ValueError(
                f"mesh {dict(mesh.shape)} has devices of other processes; give each process its "
                "own images and a mesh of its own devices (jax.local_devices())"
            )
        if batch_size is None:
            batch_size = default_batch_size(mesh)
        sharding.check_batch_size("batch_size", batch_size, mesh)
        self.features = _check_features(features)
        self.batch_size = batch_size
        self._rows = sharding.batch_sharding(mesh)
        self._params = jax.device_put(inception.params, sharding.replicated(mesh))
        self._module = inception.config.make_module()
        self._resize = jax.jit(resize_images, out_shardings=self._rows)

    def __call__(self, images: Images) -> Features:
        """Return name → features [n, d] of all images, in their order.

        Args:
            images: one array uint8 [n H W 3], or any number of them one after another, whose
                lengths and sizes may differ.

        Raises:
            ValueError: images of another type or layout, none at all, or features that are not
                finite, which damaged weights make.
        """
        found = list(self.stream(images))
        if not found:
            raise ValueError("there are no images; give at least one")
        return {name: np.concatenate([part[name] for part in found]) for name in self.features}

    def stream(self, images: Images) -> Iterator[Features]:
        """Yield features of at most `batch_size` images at a time; arguments and errors as above.

        At most three batches are held, whatever the number of images.
        """
        first, running = 0, None
        # The next batch is prepared and started while one is computed.
        for batch in _rebatch(images, self.batch_size):
            following = self._start(batch), len(batch)
            if running is not None:
                yield self._finish(*running, first)
                first += running[1]
            running = following
        if running is not None:
            yield self._finish(*running, first)

    def _start(self, batch: UInt8[np.ndarray, "b H W 3"]) -> dict[str, Array]:
        missing = self.batch_size - len(batch)
        if missing:
            # Zeros, not a smaller batch, which would be compiled anew.
            batch = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), np.uint8)])
        resized = self._resize(jax.device_put(batch, self._rows))
        return _extract(self._module, self.features, self._params, resized)

    def _finish(self, computed: dict[str, Array], count: int, first: int) -> Features:
        found = {name: np.asarray(computed[name])[:count] for name in self.features}
        for name, values in found.items():
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                raise ValueError(
                    f"feature {name!r} of image {first + int(np.argmin(finite))} is not finite; "
                    "the weights are damaged: import them again"
                )
        return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _extract(module: InceptionV3, names: tuple[str, ...], params: Any, x: Array) -> dict:
    features: Any = module.apply({"params": params}, x)
    return {name: features[name] for name in names}


def _check_features(names: Sequence[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        raise ValueError(f"no feature is asked for; choose from {', '.join(FEATURES)}")
    for name in names:
        if name not in FEATURES:
            near = difflib.get_close_matches(str(name), FEATURES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"feature {name!r} is unknown; allowed: {', '.join(FEATURES)}{hint}")
    return tuple(dict.fromkeys(names))


def _rebatch(images: Images, size: int) -> Iterator[UInt8[np.ndarray, "b H W 3"]]:
    """Yield images in their order in batches of `size`; fewer at the end or before another side."""
    arrays = [images] if isinstance(images, Array | np.ndarray) else images
    kept: list[np.ndarray] = []
    count = 0
    for number, array in enumerate(arrays):
        array = check_pixels(array, f"images of batch {number}")
        if kept and array.shape[1:] != kept[0].shape[1:]:
            yield np.concatenate(kept)
            kept, count = [], 0
        while count + len(array) >= size:
            part, array = array[: size - count], array[size - count :]
            yield np.concatenate([*kept, part])
            kept, count = [], 0
        if len(array):
            kept.append(array)
            count += len(array)
    if kept:
        yield np.concatenate(kept)


def check_pixels(images: Any, name: str = "images") -> UInt8[np.ndarray, "b H W 3"]:
    """Return images as a NumPy array if they are uint8 [b H W 3].

    Raises:
        ValueError: another type or layout; the message says what to do.
    """
    if not isinstance(images, Array | np.ndarray):
        raise ValueError(f"{name}: {type(images).__name__} is no array; give uint8 [b H W 3]")
    if images.dtype != np.uint8:
        hint = "give uint8 pixels 0 to 255"
        if np.issubdtype(images.dtype, np.floating):
            hint += "; of images in [-1, 1] these are round(clip(127.5 x + 127.5, 0, 255))"
            if not np.isfinite(images).all():
                hint += " (and these hold NaN or infinity)"
        raise ValueError(f"{name} are {images.dtype}; {hint}")
    if images.ndim != 4:
        hint = "; put a single image into a batch: image[None]" if images.ndim == 3 else ""
        raise ValueError(f"{name} have shape {images.shape}; expected [b H W 3]{hint}")
    channels = images.shape[-1]
    if channels != 3:
        hints = {
            1: "these are grey: repeat the channel three times",
            2: "these are grey with alpha: put them on a background, then repeat the channel",
            4: "these have alpha, or are CMYK: convert them to RGB",
        }
        hint = hints.get(channels, "give RGB in the last axis")
        if images.shape[1] == 3:
            hint = "the channels come first: transpose to [b H W 3]"
        raise ValueError(f"{name} have shape {images.shape}; expected [b H W 3]; {hint}")
    if 0 in images.shape[1:3]:
        raise ValueError(f"{name} have shape {images.shape}: there are no pixels")
    return np.asarray(images)
