"""Figures of one set of samples, and what has to be said with them."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.evals.digits import NEIGHBOURS, digits_report
from maskgil_jax.evals.metrics import FewImagesWarning, metrics_from_features
from maskgil_jax.evaluation.nets import FeatureNet
from maskgil_jax.evaluation.protocols import NEED_REAL_IMAGES, SVM, Protocol
from maskgil_jax.evaluation.references import Reference

Features = Mapping[str, np.ndarray]
# Figures of the SVM beside those of the net's features, and what `digits_report` calls them.
SVM_FIGURES = {
    "agreement": "agreement",
    "pixel_precision": "precision",
    "pixel_recall": "recall",
    "novelty": "novelty",
    "svm_accuracy": "svm_accuracy",
}
_NO_LABELS = (
    f"metric {SVM} needs the classes of the samples: array labels of an .npz, file names such as "
    "000000_label3.png; or leave it out of metrics"
)


def check_measurable(
    protocol: Protocol, net: FeatureNet, reference: Reference, *, labelled: bool
) -> None:
    """Refuse what `measure` could not do, before a sample is made.

    Args:
        protocol: whose metrics will be measured, of its number of samples.
        net: what features are compared of.
        reference: what samples will be compared with.
        labelled: whether the classes of the samples are known.

    Raises:
        ValueError: if samples or images of the reference are too few for a metric, the reference
            lacks what one needs or has features of another width, or the SVM has no labels.
    """
    metrics = set(protocol.metrics)
    if missing := reference.missing(protocol.metrics):
        raise ValueError(
            f"the reference does not suffice for {', '.join(missing)}: it has no images, only "
            "statistics; make one with tools/make_fid_stats.py --features N, give a folder or "
            ".npz of images, or leave these out of metrics"
        )
    if SVM in metrics and not labelled:
        raise ValueError(_NO_LABELS)
    statistics, spatial = reference.statistics, reference.spatial_statistics
    if "sfid" in metrics and statistics is not None and spatial is None:
        raise ValueError(
            "the reference has statistics (mu, sigma), but no spatial ones (mu_s, sigma_s): sfid "
            "would be against other images than fid; make it with tools/make_fid_stats.py, give "
            "the images without statistics, or leave sfid out of metrics"
        )
    widths = {
        ("pool", "statistics of"): None if statistics is None else statistics.width,
        ("pool", "single"): None if reference.features is None else reference.features.shape[1],
        ("spatial", "spatial statistics of"): None if spatial is None else spatial.width,
    }
    if "sfid" not in metrics:
        del widths["spatial", "spatial statistics of"]
    for (name, words), width in widths.items():
        if width not in (None, net.widths[name]):
            raise ValueError(
                f"the reference has {words} {width} features, but {net.name} has "
                f"{net.widths[name]}: it is of another net, make it anew with this one"
            )
    _check_counts(protocol, reference)


def _check_counts(protocol: Protocol, reference: Reference) -> None:
    single = reference.features if reference.features is not None else reference.images
    images = None if single is None else len(single)
    gathered = images if reference.statistics is None else reference.statistics.count
    near, dense = protocol.neighbours + 1, protocol.density_neighbours + 1
    subset = protocol.kid_subset_size
    # Of each metric the fewest samples, and the fewest images of the reference with their number.
    least: dict[str, tuple[int, int, int | None]] = {
        **dict.fromkeys(("fid", "sfid"), (2, 2, gathered)),
        **dict.fromkeys(("precision", "recall"), (near, near, images)),
        **dict.fromkeys(("density", "coverage"), (2, dense, images)),
        "kid": (subset, subset, images),
        SVM: (NEIGHBOURS + 1, 0, None),
    }
    for metric in protocol.metrics:
        samples, real, there = least.get(metric, (2, 0, None))
        for name, count, needed in (
            ("num_images", protocol.num_images, samples),
            ("the reference's number of images", there, real),
        ):
            if count is not None and count < needed:
                raise ValueError(
                    f"{name} {count} is too few: {metric} needs at least {needed}; give more, or "
                    "leave it out of metrics"
                )


def check_labels(labels: np.ndarray | None, protocol: Protocol) -> None:
    """Refuse classes that a protocol does not have, where it knows its own.

    Args:
        labels: classes of the samples, where known.
        protocol: by which they are measured.

    Raises:
        ValueError: and names those that are wrong.
    """
    classes = protocol.num_classes
    if labels is None or classes is None:
        return
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        named = ", ".join(map(str, np.unique(wrong)[:5]))
        raise ValueError(
            f"{wrong.size:,} of the {len(labels):,} samples have a class such as {named}; the "
            f"{classes:,} classes of protocol {protocol.name} are 0 to {classes - 1}: mend the "
            "labels, or leave them out"
        )


def measure(
    protocol: Protocol,
    samples: Features,
    labels: np.ndarray | None,
    image_shape: tuple[int, int, int],
    reference: Reference,
    real: Features,
) -> tuple[dict[str, float], list[str]]:
    """Return the figures of a protocol by name, and notes on them.

    The spread of an inception score of one split is not known and left out.

    Args:
        protocol: whose metrics are measured.
        samples: features of the samples, [n, width] each.
        labels: classes of the samples, where known.
        image_shape: (H, W, c) of the samples.
        reference: what they are compared with.
        real: features of its images, as far as they were computed.

    Raises:
        ValueError: if sets are too small for a metric, hold NaN, or the SVM has no labels.
    """
    figures: dict[str, float] = {}
    notes: list[str] = []
    metrics = set(protocol.metrics)
    single = reference.features if reference.features is not None else real.get("pool")
    pool = reference.statistics if reference.statistics is not None else single
    spatial = reference.spatial_statistics
    generated = samples["pool"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FewImagesWarning)
        if "fid" in metrics:
            figures |= metrics_from_features(generated, _given(pool), metrics=["fid"])
        if "sfid" in metrics:
            figures |= metrics_from_features(
                generated,
                pool,
                metrics=["sfid"],
                generated_spatial=samples["spatial"],
                real_spatial=spatial if spatial is not None else real["spatial"],
            )
        if "is" in metrics:
            figures |= metrics_from_features(
                generated,
                generated,
                samples["logits"],
                metrics=["is"],
                split_size=protocol.split_size,
            )
            if math.isnan(figures["is_std"]):
                del figures["is_std"]  # JSON has no NaN
                notes.append(
                    f"is: all {len(generated)} images are one split, of which the spread is not "
                    f"known; splits have {protocol.split_size}"
                )
        if neighbourly := [name for name in NEED_REAL_IMAGES if name in metrics]:
            figures |= metrics_from_features(
                generated,
                _given(single),
                metrics=neighbourly,
                neighbours=protocol.neighbours,
                density_neighbours=protocol.density_neighbours,
                kid_subsets=protocol.kid_subsets,
                kid_subset_size=protocol.kid_subset_size,
            )
    for warning in caught:
        if issubclass(warning.category, FewImagesWarning):
            notes.append(str(warning.message))
        else:  # not of ours, and for whoever looks at warnings
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    if SVM in metrics:
        figures |= _read_by_svm(samples["pixels"], labels, image_shape)
    if "is" in metrics and labels is not None:
        notes += _describe_order(labels, protocol.split_size)
    return figures, list(dict.fromkeys(notes))


def _given(value: Any) -> Any:
    assert value is not None, "the reference was asked for what its metrics need"
    return value


def _read_by_svm(
    pixels: np.ndarray, labels: np.ndarray | None, image_shape: tuple[int, int, int]
) -> dict[str, float]:
    if labels is None:
        raise ValueError(_NO_LABELS)
    report = digits_report(
        pixels.reshape(-1, *image_shape),
        labels,
        train=digits_arrays("train"),
        heldout=digits_arrays("test"),
    )
    return {ours: report[theirs] for ours, theirs in SVM_FIGURES.items()}


def _describe_order(labels: np.ndarray, split_size: int) -> list[str]:
    """Return a note if splits of the inception score lack classes that others have."""
    classes = len(set(labels.tolist()))
    splits = [labels[start : start + split_size] for start in range(0, len(labels), split_size)]
    whole = [split for split in splits if len(split) == min(split_size, len(labels))]
    fewest = min(len(set(split.tolist())) for split in whole)
    # A split cannot hold more classes than images.
    if fewest >= 0.5 * min(classes, split_size):
        return []
    return [
        f"is: the samples are sorted by class, a split of {split_size} has as few as {fewest} of "
        f"the {classes} classes, and so the inception score is too low; shuffle them"
    ]
