"""What samples are compared with: statistics, images or both, checked against the protocol.

Files of `tools/make_fid_stats.py` carry a record of how they were made, and are refused where that
is not what is asked for; the ADM evaluator's carry none and serve its protocol only.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maskgil_jax import __version__
from maskgil_jax.checkpoints import file_sha256
from maskgil_jax.evals.features import as_features
from maskgil_jax.evals.frechet import Statistics, load_array, load_record, load_statistics
from maskgil_jax.evaluation.image_sets import DigitImages, ImageSet, list_arrays, open_images
from maskgil_jax.evaluation.nets import FeatureNet, describe_net
from maskgil_jax.evaluation.protocols import NEED_REAL_IMAGES, Protocol

RECORD_FORMAT = "maskgil_jax reference 1"
# Array of a reference file with pooled features of some images.
FEATURES = "pool"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """An opened reference; features of its images are not computed yet.

    Attributes:
        settings: what it is, for JSON.
        image_shape: (H, W, c) of its images, as far as known.
        statistics: of pooled features, or `None`.
        spatial_statistics: of spatial ones, or `None`.
        features: [n, d] pooled features of single images, or `None`.
        images: the images themselves, or `None`.
        notes: what has to be said of it.
    """

    settings: Mapping[str, Any]
    image_shape: tuple[int, ...] | None
    statistics: Statistics | None = None
    spatial_statistics: Statistics | None = None
    features: np.ndarray | None = None
    images: ImageSet | None = None
    notes: tuple[str, ...] = ()

    def missing(self, metrics: Sequence[str]) -> list[str]:
        """Return those metrics that the reference is not enough for."""
        single = self.images is not None or self.features is not None
        spatial = self.images is not None or self.spatial_statistics is not None
        lacking = {name: not single for name in NEED_REAL_IMAGES} | {"sfid": not spatial}
        return [name for name in metrics if lacking.get(name, False)]

    def wanted_features(self, metrics: Sequence[str]) -> tuple[str, ...]:
        """Return the features of its images that metrics need and no file has."""
        if self.images is None:
            return ()
        pool = set(metrics) & set(NEED_REAL_IMAGES) and self.features is None
        pool = pool or ("fid" in metrics and self.statistics is None)
        spatial = "sfid" in metrics and self.spatial_statistics is None
        return (*(("pool",) if pool else ()), *(("spatial",) if spatial else ()))


def open_reference(
    protocol: Protocol,
    net: FeatureNet,
    path: str | os.PathLike[str] | None,
    *,
    image_size: int | None = None,
    convert: bool = False,
) -> Reference:
    """Open the reference of a protocol, and check that it is one.

    Args:
        protocol: the protocol.
        net: what features are compared of.
        path: `.npz` of statistics, of images (`arr_0`) or of both, or a folder of images; `None`
            for digits.
        image_size: side to which images of a folder are cropped.
        convert: whether greyscale, CMYK and transparent files of a folder become RGB.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if it is of another protocol or net, holds neither statistics nor images, or the
            protocol has no use for one, or cannot do without.
    """
    if protocol.split is not None:
        if path is not None:
            raise ValueError(
                f"--reference {path}: protocol {protocol.name} compares with {protocol.reference}, "
                "which come with the package"
            )
        digits = DigitImages(protocol.split)
        return Reference(
            settings={**digits.settings, "count": len(digits)},
            image_shape=digits.image_shape,
            images=digits,
        )
    if path is None:
        raise ValueError(f"protocol {protocol.name} needs --reference: {protocol.reference}")
    path = pathlib.Path(path)
    if path.is_dir() or "mu" not in list_arrays(path):
        images = open_images(path, image_size=image_size, convert=convert)
        net.check_shape(str(path), images.image_shape)
        return Reference(
            settings={**images.settings, "count": len(images)},
            image_shape=images.image_shape,
            images=images,
            notes=(
                f"the reference is a set of {len(images)} images, taken to be that of protocol "
                f"{protocol.name}",
            ),
        )
    if image_size is not None or convert:
        raise ValueError(
            f"--reference {path} holds statistics; --image_size and --convert_to_rgb are for "
            "folders"
        )
    return _open_statistics(protocol, net, path)


def _open_statistics(protocol: Protocol, net: FeatureNet, path: pathlib.Path) -> Reference:
    statistics, spatial = load_statistics(path)
    record = load_record(path)
    _check_record(protocol, net, path, record)
    if statistics.width != net.widths["pool"]:
        raise ValueError(
            f"{path} has statistics of {statistics.width} features, but {net.name} has "
            f"{net.widths['pool']}: it is of another net"
        )
    names = list_arrays(path)
    images = open_images(path) if "arr_0" in names else None
    features = load_array(path, FEATURES)
    if features is not None:
        as_features(f"{FEATURES} of {path}", features)
    if features is not None and features.shape[1] != statistics.width:
        raise ValueError(
            f"{path} has statistics of {statistics.width} features, but single images of "
            f"{features.shape[1]}: make it again"
        )
    notes: tuple[str, ...] = ()
    if record is None:
        notes = (
            "the reference does not say how it was made; it is taken to be of protocol "
            f"{protocol.name}",
        )
    shape = None
    if images is not None:
        shape = images.image_shape
        net.check_shape(str(path), shape)
    elif record is not None:
        shape = tuple(record["image_shape"])
    return Reference(
        settings={
            "kind": "statistics",
            "sha256": file_sha256(path),
            "count": statistics.count,
            "images": None if images is None else len(images),
            "features": None if features is None else len(features),
            "record": record,
        },
        image_shape=shape,
        statistics=statistics,
        spatial_statistics=spatial,
        features=features,
        images=images,
        notes=notes,
    )


def _check_record(
    protocol: Protocol, net: FeatureNet, path: pathlib.Path, record: Mapping[str, Any] | None
) -> None:
    if record is None:
        if protocol.name == "adm":
            return
        raise ValueError(
            f"{path} does not say of which protocol it is, and {protocol.name} is asked for; make "
            f"it with tools/make_fid_stats.py --protocol {protocol.name}, or take --protocol adm "
            "for the ADM evaluator's"
        )
    if record.get("format") != RECORD_FORMAT:
        raise ValueError(
            f"{path} has a record of format {record.get('format')!r}; this code reads "
            f"{RECORD_FORMAT!r}: make it again"
        )
    if wrong := _find_wrong(record):
        raise ValueError(
            f"the record of {path} lacks {wrong}, or what it has there is none: it was changed "
            "after tools/make_fid_stats.py; make it again"
        )
    if record["protocol"] != protocol.name:
        raise ValueError(
            f"{path} is a reference from another protocol: {record['protocol']}, not "
            f"{protocol.name}; give --protocol {record['protocol']} or another reference"
        )
    if record["net"]["fingerprint"] != net.fingerprint:
        raise ValueError(
            f"{path} is a reference from another net: {record['net']['name']} with fingerprint "
            f"{record['net']['fingerprint'][:12]}…, but samples are seen by {net.name} with "
            f"{net.fingerprint[:12]}…; make it again with these weights"
        )


def _find_wrong(record: Mapping[str, Any]) -> str:
    """Return which part of a record is missing or of another type; empty if all are there."""
    net, shape = record.get("net"), record.get("image_shape")
    if not isinstance(record.get("protocol"), str):
        return "protocol"
    for name in ("name", "fingerprint"):
        if not isinstance(net, Mapping) or not isinstance(net.get(name), str):
            return f"net.{name}"
    if not isinstance(shape, list) or [type(side) for side in shape] != [int] * 3:
        return "image_shape"
    return ""


def make_record(protocol: str, net: FeatureNet, images: ImageSet) -> dict[str, Any]:
    """Return what a reference file says of how it was made."""
    return {
        "format": RECORD_FORMAT,
        "protocol": protocol,
        "net": describe_net(net),
        "images": dict(images.settings),
        "image_shape": list(images.image_shape),
        "count": len(images),
        "maskgil_jax": __version__,
    }
