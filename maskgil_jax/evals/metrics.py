"""The metrics of generated images by name, from features that anyone extracted.

Last stage of an evaluation; also for people with features of their own. Which extractor, which
images and which reference make the numbers comparable is said in docs/evaluation.md.
"""

import difflib
import warnings
from collections.abc import Sequence

import numpy as np
from jax import Array

from maskgil_jax.evals.features import as_features, check_same_width
from maskgil_jax.evals.frechet import Statistics, describe_bias, frechet_distance
from maskgil_jax.evals.manifold import compare_manifolds
from maskgil_jax.evals.scores import inception_score, kernel_distance

METRICS = ("fid", "sfid", "is", "precision", "recall", "density", "coverage", "kid")
MANIFOLD_METRICS = ("precision", "recall", "density", "coverage")

Features = Array | np.ndarray


class FewImagesWarning(UserWarning):
    """Sets are so small that a figure is far off."""


def metrics_from_features(
    generated: Features,
    real: Features | Statistics | None,
    logits: Features | None = None,
    *,
    metrics: Sequence[str] | None = None,
    generated_spatial: Features | None = None,
    real_spatial: Features | Statistics | None = None,
    neighbours: int = 3,
    density_neighbours: int = 5,
    split_size: int = 5000,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
) -> dict[str, float]:
    """Return the metrics of generated images from their features and those of real images.

    Warns (UserWarning, with the count) where a Fréchet distance is biased because a set has no
    more images than features, and where a split of the inception score has fewer images than there
    are classes.

    Args:
        generated: [m, d].
        real: [n, d] of the same extractor, or their `Statistics`, which suffice for `fid`.
        logits: [m, classes] of the generated images, for `is`; of Inception those without bias.
        metrics: some of `METRICS`. By default `fid`, `precision` and `recall`, and `is` with
            logits, `sfid` with spatial features. What the chosen ones do not need is left unread.
        generated_spatial: [m, s], for `sfid`.
        real_spatial: [n, s] or their `Statistics`, for `sfid`.
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        split_size: images of a split of the inception score.
        kid_subsets: subsets that KID averages over.
        kid_subset_size: images of each.

    Returns:
        A number for each name, in the order of `METRICS`, and beside `is` and `kid` their standard
        deviation over splits or subsets, `is_std` and `kid_std`, NaN if there is but one.

    Raises:
        ValueError: an unknown name, input that a metric needs is missing, has other counts or
            widths, holds NaN or is no array of numbers, fewer than 2 images, or too few for a
            metric's neighbours or subsets.
    """
    spatial_given = generated_spatial is not None or real_spatial is not None
    chosen = _choose(metrics, logits=logits is not None, spatial=spatial_given)
    generated = as_features("generated", generated)
    if len(generated) < 2:
        raise ValueError("1 generated image; a distribution needs at least 2")
    results: dict[str, float] = {}
    if "fid" in chosen:
        results["fid"] = _measure_frechet("fid", generated, real)
    if "sfid" in chosen:
        if generated_spatial is None or real_spatial is None:
            raise ValueError(
                "sfid needs spatial features of both sets: generated_spatial and real_spatial"
            )
        spatial = _as_counted("generated_spatial", generated_spatial, len(generated))
        if real is not None:
            _check_real_counts(real, real_spatial)
        results["sfid"] = _measure_frechet("sfid", spatial, real_spatial)
    if "is" in chosen:
        if logits is None:
            raise ValueError("is (inception score) needs logits of the generated images")
        logits = _as_counted("logits", logits, len(generated))
        score = inception_score(logits, split_size=split_size)
        smallest, classes = len(logits) % split_size or split_size, logits.shape[1]
        if smallest < classes:
            warnings.warn(
                f"is: a split of {smallest} images cannot score above {smallest}, though there are "
                f"{classes} classes: the inception score may be too low; give more images",
                FewImagesWarning,
                stacklevel=2,
            )
        results |= {"is": score.mean, "is_std": score.std}
    if set(MANIFOLD_METRICS) & chosen:
        manifolds = compare_manifolds(
            _as_set("/".join(m for m in MANIFOLD_METRICS if m in chosen), real),
            generated,
            # Where only one pair is asked for, its neighbours alone decide what is too few; density
            # and coverage look at no neighbours among the generated ones.
            k=neighbours if {"precision", "recall"} & chosen else 1,
            density_k=density_neighbours if {"density", "coverage"} & chosen else neighbours,
        )
        results |= {name: getattr(manifolds, name) for name in MANIFOLD_METRICS if name in chosen}
    if "kid" in chosen:
        real = _as_set("kid", real)
        if min(len(generated), len(real)) < kid_subset_size:
            raise ValueError(
                f"kid: {len(generated)} generated and {len(real)} real features are too few for "
                f"subsets of kid_subset_size {kid_subset_size}; give more, or a smaller "
                "kid_subset_size, and state it with the figure"
            )
        score = kernel_distance(generated, real, subset_size=kid_subset_size, subsets=kid_subsets)
        results |= {"kid": score.mean, "kid_std": score.std}
    return results


def _choose(metrics: Sequence[str] | None, *, logits: bool, spatial: bool) -> set[str]:
    if metrics is None:
        given = {"sfid": spatial, "is": logits}
        return {"fid", "precision", "recall"} | {
            name for name, is_given in given.items() if is_given
        }
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics = {metrics!r}; give a list of {', '.join(METRICS)}")
    for name in metrics:
        if name not in METRICS:
            near = difflib.get_close_matches(str(name).lower(), METRICS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown metric {name!r}; {hint}There are {', '.join(METRICS)}")
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"metrics {', '.join(metrics)!r}: name each once")
    return set(metrics)


def _measure_frechet(name: str, generated: np.ndarray, real: Features | Statistics | None) -> float:
    if real is None:
        raise ValueError(f"{name} needs the features of real images, or their statistics")
    width = real.width if isinstance(real, Statistics) else as_features("real", real).shape[1]
    check_same_width(("generated", generated.shape[1]), ("real", width))
    ours = _gather(f"{name}: generated", generated)
    theirs = real if isinstance(real, Statistics) else _gather(f"{name}: real", real)
    for note in describe_bias({"generated": ours, "real": theirs}):
        warnings.warn(f"{name}: {note}", FewImagesWarning, stacklevel=3)
    return frechet_distance(theirs, ours)


def _gather(name: str, features: Features) -> Statistics:
    try:
        return Statistics.of_features(features)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _as_set(name: str, real: Features | Statistics | None) -> Features:
    if real is None:
        raise ValueError(f"{name} needs the features of real images")
    if isinstance(real, Statistics):
        raise ValueError(
            f"{name} needs the features of the real images; statistics tell nothing of neighbours "
            "or single images"
        )
    return real


def _as_counted(name: str, values: Features, count: int) -> np.ndarray:
    values = as_features(name, values)
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} rows for {count} generated images")
    return values


def _check_real_counts(real: Features | Statistics, spatial: Features | Statistics) -> None:
    counts = [s.count if isinstance(s, Statistics) else np.shape(s)[0] for s in (real, spatial)]
    if None not in counts and counts[0] != counts[1]:
        raise ValueError(
            f"real has {counts[0]} images, real_spatial {counts[1]}; both must be of the same"
        )
