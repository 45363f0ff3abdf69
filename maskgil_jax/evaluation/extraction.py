"""Features of a set of images, in shards on disk: a kill costs one shard.

A shard is an `.npz` with the features of some images, named by the number of the first. It appears
whole or not at all, and its checksums are looked at before it is trusted.
"""

import os
import pathlib
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from maskgil_jax.bulk import Progress
from maskgil_jax.evaluation.image_sets import ImageSet
from maskgil_jax.evaluation.nets import FeatureNet

_SPARE_BYTES = 1 << 20


def extract(
    images: ImageSet,
    net: FeatureNet,
    names: Sequence[str],
    folder: pathlib.Path,
    *,
    chunk_size: int,
    label: str = "",
) -> dict[str, np.ndarray]:
    """Return features of all images, each [n, width]; only shards that are missing are computed.

    Args:
        images: the set.
        net: what they are features of.
        names: which features.
        folder: of the shards; it is made. That its shards are of this set and net is the caller's
            to know.
        chunk_size: images of a shard, made and held at a time.
        label: put before what is said on the way.

    Raises:
        ValueError: if an image cannot be read, or features are not finite.
        OSError: if the disk has too little space, before anything is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob("*.partial"):
        partial.unlink()
    starts = range(0, len(images), chunk_size)
    found: dict[int, Mapping[str, np.ndarray]] = {}
    for first in starts:
        shard = _load(_path(folder, first), names)
        if shard is not None:
            found[first] = shard
    missing = [first for first in starts if first not in found]
    counts = {first: min(chunk_size, len(images) - first) for first in missing}
    _check_space(folder, sum(counts.values()) * sum(4 * net.widths[name] for name in names))
    progress = Progress(sum(counts.values()), label)
    for first in missing:
        pixels = images.read(first, first + counts[first])
        features = net.extract(pixels, names)
        check_finite(features, first)
        _store(_path(folder, first), features)
        found[first] = features
        progress.add(counts[first])
    return {name: np.concatenate([found[first][name] for first in starts]) for name in names}


def collect(
    images: ImageSet, net: FeatureNet, names: Sequence[str], *, chunk_size: int
) -> dict[str, np.ndarray]:
    """Return features of all images, each [n, width], without a trace on disk.

    Args:
        images: the set.
        net: what they are features of.
        names: which features.
        chunk_size: images made and held at a time.

    Raises:
        ValueError: if an image cannot be read, or features are not finite.
    """
    parts = []
    for first in range(0, len(images), chunk_size):
        stop = min(first + chunk_size, len(images))
        features = net.extract(images.read(first, stop), names)
        check_finite(features, first)
        parts.append(features)
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def check_finite(features: Mapping[str, np.ndarray], first: int) -> None:
    """Refuse features with NaN or infinity.

    Args:
        features: of some images.
        first: number of the first one.

    Raises:
        ValueError: and names the image.
    """
    for name, values in features.items():
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"feature {name!r} of image {first + int(np.argmin(finite))} is NaN or infinite: "
                "the net's weights are damaged; nothing is measured"
            )


def _path(folder: pathlib.Path, first: int) -> pathlib.Path:
    return folder / f"{first:09}.npz"


def _load(path: pathlib.Path, names: Sequence[str]) -> Mapping[str, np.ndarray] | None:
    """Return a shard; `None` if there is none, or it is damaged, and has to be made again."""
    try:
        # Opened here: where numpy finds damage, it leaves the closing to chance.
        with open(path, "rb") as file, np.load(file) as stored:
            return {name: stored[name] for name in names}
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _store(path: pathlib.Path, features: Mapping[str, np.ndarray]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with open(partial, "wb") as file:
        np.savez(file, **features)  # type: ignore[arg-type] # numpy's stub takes a flag there
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _check_space(folder: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise OSError(
            f"features in {folder} need {needed / 1e6:,.1f} MB on a disk with {free / 1e6:,.1f} MB "
            "free; make room, choose another disk for --out, or take fewer images"
        )
