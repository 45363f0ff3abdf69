"""How good samples of handwritten digits are: right digit, real-looking, varied, and not copies.

Everything is measured on 8×8 pixels, the resolution the digits were scanned at. Last stage of the
digits run; takes arrays only.
"""

import numpy as np
from jax import Array
from jaxtyping import Float
from sklearn.svm import SVC

from maskgil_jax.evals.manifold import nearest_distances, precision_recall

SIDE = 8
NEIGHBOURS = 3

LabelledImages = tuple[Array | np.ndarray, Array | np.ndarray]


def digits_report(
    samples: Array | np.ndarray,
    labels: Array | np.ndarray,
    *,
    train: LabelledImages,
    heldout: LabelledImages,
) -> dict[str, float]:
    """Judge samples (uint8 [b H W c]) made for `labels` (int [b]) against real digits.

    `train` and `heldout` are (images, labels) of the same form; H and W are multiples of 8.

    Returns:
      `agreement`: share of samples that an SVM fitted on `train` recognises as their label.
      `precision`, `recall`: k = 3, real = `heldout`, generated = samples.
      `novelty`: median distance of the samples to their nearest training digit over the same
        median for held-out digits; 0 for copies, about 1 for new real digits.
      `svm_accuracy`: of that SVM on `heldout`; below 0.97 `agreement` means little.

    Raises:
      ValueError: images are not uint8 or not [b H W c] with H, W multiples of 8 (so neither floats
        nor NaN pass), image shapes differ between the sets, labels do not match their images, a
        set has fewer than 4 images, or every held-out digit is also a training digit.
    """
    samples, labels = _as_labelled("samples", samples, labels)
    train_images, train_labels = _as_labelled("train", *train)
    heldout_images, heldout_labels = _as_labelled("heldout", *heldout)
    sets = {"samples": samples, "train": train_images, "heldout": heldout_images}
    shapes = {name: images.shape[1:] for name, images in sets.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"image shapes differ: {shapes}; all sets must have the same")

    generated, known, unseen = (_box_average(images) for images in sets.values())
    svm = SVC().fit(known / 255, train_labels)
    # Averages of 8-bit pixels are often equally far away, which float64 tells exactly.
    manifolds = precision_recall(unseen, generated, k=NEIGHBOURS, dtype=np.float64)
    return {
        "agreement": float(np.mean(svm.predict(generated / 255) == labels)),
        "precision": manifolds.precision,
        "recall": manifolds.recall,
        "novelty": _measure_novelty(generated, known, unseen),
        "svm_accuracy": float(np.mean(svm.predict(unseen / 255) == heldout_labels)),
    }


def _measure_novelty(
    generated: Float[np.ndarray, "m d"],
    known: Float[np.ndarray, "n d"],
    unseen: Float[np.ndarray, "r d"],
) -> float:
    usual = np.median(nearest_distances(unseen, known))
    if usual == 0:
        raise ValueError(
            "novelty is undefined: most held-out digits are copies of training digits; "
            "give disjoint sets"
        )
    return float(np.median(nearest_distances(generated, known)) / usual)


def _box_average(images: np.ndarray) -> Float[np.ndarray, "b 64"]:
    """Average [b H W c] over channels and boxes to 8×8 pixels (0..255), flattened."""
    b, height, width, _ = images.shape
    boxes = images.reshape(b, SIDE, height // SIDE, SIDE, width // SIDE, -1)
    return boxes.mean((2, 4, 5), dtype=np.float64).reshape(b, SIDE * SIDE)


def _as_labelled(
    name: str, images: Array | np.ndarray, labels: Array | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8:
        raise ValueError(f"{name}: images are {images.dtype}; expected uint8 pixels, 0..255")
    if images.ndim != 4 or 0 in images.shape or images.shape[1] % SIDE or images.shape[2] % SIDE:
        raise ValueError(
            f"{name}: images have shape {images.shape}; expected [b H W c], H and W multiples of 8"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: labels have shape {labels.shape} and dtype {labels.dtype}; "
            f"expected one integer for each of the {len(images)} images"
        )
    if len(images) < NEIGHBOURS + 1:
        raise ValueError(
            f"{name}: {len(images)} images are too few, "
            f"k = {NEIGHBOURS} needs at least {NEIGHBOURS + 1}"
        )
    return images, labels
