import numpy as np
import pytest

from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.evals.digits import digits_report

TRAIN, HELDOUT = digits_arrays("train"), digits_arrays("test")


def report(images, labels, train=TRAIN):
    return digits_report(images, labels, train=train, heldout=HELDOUT)


def test_copies_of_the_training_set_are_good_but_not_new():
    result = report(*TRAIN)
    assert result["svm_accuracy"] == pytest.approx(0.9966, abs=0.004)
    assert result["agreement"] > 0.99
    assert result["precision"] == pytest.approx(0.904, abs=0.01)
    assert result["recall"] == pytest.approx(0.882, abs=0.01)
    assert result["novelty"] == 0


def test_new_real_digits_are_good_and_new():
    """What a perfect generator would get: real digits that the SVM and novelty have not seen."""
    order = np.random.default_rng(2).permutation(1500)
    unseen, known = order[:750], order[750:]
    result = report(TRAIN[0][unseen], TRAIN[1][unseen], (TRAIN[0][known], TRAIN[1][known]))
    assert result["agreement"] == pytest.approx(0.976, abs=0.01)
    assert result["precision"] == pytest.approx(0.900, abs=0.01)
    assert result["recall"] == pytest.approx(0.902, abs=0.01)
    assert result["novelty"] == pytest.approx(1.014, abs=0.02)


def test_wrong_labels_cost_agreement_alone():
    right, wrong = report(*TRAIN), report(TRAIN[0], (TRAIN[1] + 1) % 10)
    assert wrong["agreement"] < 0.01
    assert {**wrong, "agreement": 0} == {**right, "agreement": 0}


def test_noise_costs_precision_and_one_digit_costs_recall():
    noise = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), np.uint8)
    assert report(noise, np.zeros(300, int))["precision"] == 0
    threes = TRAIN[1] == 3
    result = report(TRAIN[0][threes], TRAIN[1][threes])
    assert result["precision"] > 0.85
    assert result["recall"] < 0.2


def test_colours_are_averaged():
    images, labels = HELDOUT
    shift = np.array([-20, 0, 20])
    tinted = (images // 2 + 64 + shift).astype(np.uint8)
    grey = (images // 2 + 64).astype(np.uint8)
    assert report(tinted, labels) == pytest.approx(report(grey, labels))


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (HELDOUT[0] / 255, HELDOUT[1], "samples: images are float64; expected uint8"),
        (HELDOUT[0][..., 0], HELDOUT[1], "samples: images have shape"),
        (HELDOUT[0][:, :30], HELDOUT[1], "multiples of 8"),
        (HELDOUT[0][:, :16, :16], HELDOUT[1], "image shapes differ"),
        (HELDOUT[0], HELDOUT[1][:-1], r"labels have shape \(296,\).*each of the 297"),
        (HELDOUT[0], HELDOUT[1] * 1.0, "dtype float64"),
        (HELDOUT[0][:3], HELDOUT[1][:3], "3 images are too few"),
    ],
)
def test_unusable_samples_are_refused(images, labels, match):
    with pytest.raises(ValueError, match=match):
        report(images, labels)


def test_heldout_digits_must_not_be_training_digits():
    with pytest.raises(ValueError, match="novelty is undefined"):
        report(*TRAIN, train=HELDOUT)
