"""Figures of one set of samples, and what has to be said with them."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.evals.digits import digits_report
from maskgil_jax.evals.metrics import metrics_from_features
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


def measure(
    protocol: Protocol,
    samples: Features,
    labels: np.ndarray | None,
    image_shape: tuple[int, int, int],
    reference: Reference,
    real: Features,
) -> tuple[dict[str, float], list[str]]:
    """Return the figures of a protocol by name, and notes on them.

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
    metrics = set(protocol.metrics)
    single = reference.features if reference.features is not None else real.get("pool")
    pool = reference.statistics if reference.statistics is not None else single
    spatial = reference.spatial_statistics
    generated = samples["pool"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
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
    notes = [str(warning.message) for warning in caught]
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
        raise ValueError(
            f"metric {SVM} needs the classes of the samples: array labels of an .npz, file names "
            "such as 000000_label3.png; or leave it out of --metrics"
        )
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
