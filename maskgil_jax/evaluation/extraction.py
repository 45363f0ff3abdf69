"""Features of a set of images, in shards on disk: a kill costs one shard.

A shard is an `.npz` with the features of some images, named by the number of the first. It appears
whole or not at all, and its checksums are looked at before it is trusted.
"""

import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from maskgil_jax.bulk import Progress, say
from maskgil_jax.evals.archives import name_damage
from maskgil_jax.evals.features import BLOCK_ROWS
from maskgil_jax.evals.frechet import Statistics
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
        chunk_size: images read, or made, at a time. A shard has as many, or a multiple of it that
            fills a batch of the net.
        label: put before what is said on the way.

    Raises:
        ValueError: if an image cannot be read, or features are not finite.
        OSError: if the disk has too little space, before anything is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob("*.partial"):
        partial.unlink()
    parts = _split(len(images), chunk_size, net)
    found: dict[str, np.ndarray] = {}
    missing = []
    for part in parts:
        shard = _load(_path(folder, part.start), names, part, net)
        if shard is None:
            missing.append(part)
        else:
            _place(found, shard, part.start, len(images))
    to_come = sum(len(part) for part in missing)
    _check_space(folder, to_come * sum(4 * net.widths[name] for name in names))
    if missing:
        kept = len(images) - to_come
        before = f"kept {kept:,} of {len(images):,} from an earlier start, " if kept else ""
        say(f"{label}{before}{to_come:,} images to come; compiling may take a minute")
    progress = Progress(to_come, label)
    for part in missing:
        features = _compute(images, net, names, part, chunk_size, progress.add)
        _store(_path(folder, part.start), features)
        _place(found, features, part.start, len(images))
    return found


def collect(
    images: ImageSet, net: FeatureNet, names: Sequence[str], *, chunk_size: int
) -> dict[str, np.ndarray]:
    """Return features of all images, each [n, width], without a trace on disk.

    Args:
        images: the set.
        net: what they are features of.
        names: which features.
        chunk_size: images read, or made, at a time.

    Raises:
        ValueError: if an image cannot be read, or features are not finite.
    """
    found: dict[str, np.ndarray] = {}
    first = 0
    for features in stream(images, net, names, range(len(images)), chunk_size=chunk_size):
        first += _place(found, features, first, len(images))
    return found


def collect_statistics(
    images: ImageSet, net: FeatureNet, names: Sequence[str], *, chunk_size: int
) -> dict[str, Statistics]:
    """Return the statistics of features of all images, the same as those of `collect`'s arrays.

    Memory does not grow with the images; arguments and errors as there.
    """
    found: dict[str, Statistics] = {}
    for first in range(0, len(images), BLOCK_ROWS):
        part = range(first, min(first + BLOCK_ROWS, len(images)))
        parts = list(stream(images, net, names, part, chunk_size=chunk_size))
        for name in names:
            add_statistics(found, name, np.concatenate([features[name] for features in parts]))
    return found


def add_statistics(found: dict[str, Statistics], name: str, rows: np.ndarray) -> None:
    """Add features of more images, `BLOCK_ROWS` of them but at the end, to the statistics."""
    part = Statistics.of_features(rows)
    found[name] = found[name].merge(part) if name in found else part


def stream(
    images: ImageSet, net: FeatureNet, names: Sequence[str], part: range, *, chunk_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield features of some of the images, each [b, width], as many at a time as suit the net.

    Args:
        images: the set.
        net: what they are features of.
        names: which features.
        part: numbers of the images, one after another.
        chunk_size: images read, or made, at a time.

    Raises:
        ValueError: if an image cannot be read, or features are not finite.
    """
    for span in _split(len(part), chunk_size, net):
        yield _compute(images, net, names, part[span.start : span.stop], chunk_size)


def _split(count: int, chunk_size: int, net: FeatureNet) -> list[range]:
    """Return the numbers of images that are given to the net together.

    Whole chunks, as many as its batch has room for: where it pads what it is given, a net on many
    devices would compute padding for the most part. A part is the same however often it is made.
    """
    size = chunk_size * max(1, net.batch_size // chunk_size)
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _compute(
    images: ImageSet,
    net: FeatureNet,
    names: Sequence[str],
    part: range,
    chunk_size: int,
    count: Callable[[int], None] = lambda _: None,
) -> dict[str, np.ndarray]:
    """Return features of a part; `count` is told how many images were read, chunk by chunk."""
    chunks = []
    for first in range(part.start, part.stop, chunk_size):
        chunks.append(images.read(first, min(first + chunk_size, part.stop)))
        count(len(chunks[-1]))
    features = net.extract(chunks[0] if len(chunks) == 1 else np.concatenate(chunks), names)
    check_finite(features, part.start)
    return features


def _place(
    found: dict[str, np.ndarray], features: Mapping[str, np.ndarray], first: int, count: int
) -> int:
    """Put features of images from the number `first` on into arrays of all; return how many."""
    rows = 0
    for name, values in features.items():
        rows = len(values)
        # Made once in full: joined at the end, features would be held twice.
        if name not in found:
            found[name] = np.empty((count, *values.shape[1:]), values.dtype)
        found[name][first : first + rows] = values
    return rows


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


def _load(
    path: pathlib.Path, names: Sequence[str], part: range, net: FeatureNet
) -> Mapping[str, np.ndarray] | None:
    """Return a shard; `None` if there is none, or it is damaged, and has to be made again."""
    try:
        # Opened here: where numpy finds damage, it leaves the closing to chance.
        with name_damage(str(path)), open(path, "rb") as file, np.load(file) as stored:
            features = {name: stored[name] for name in names}
    except (FileNotFoundError, ValueError, KeyError):
        return None
    fits = all(x.shape == (len(part), net.widths[name]) for name, x in features.items())
    return features if fits else None


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
