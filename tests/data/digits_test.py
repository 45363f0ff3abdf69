import numpy as np
import pytest
from sklearn.datasets import load_digits

from maskgil_jax.data.digits import DigitsSource, digits_arrays


def test_splits_are_all_the_digits_once():
    (train, train_labels), (test, test_labels) = digits_arrays("train"), digits_arrays("test")
    assert train.shape == (1500, 32, 32, 3)
    assert test.shape == (297, 32, 32, 3)
    assert train.dtype == np.uint8
    assert train_labels.dtype == np.int32

    order = np.random.default_rng(0).permutation(1797)
    together = np.concatenate([train, test])[np.argsort(order)]
    labels = np.concatenate([train_labels, test_labels])[np.argsort(order)]
    digits = load_digits()
    np.testing.assert_array_equal(labels, digits.target)
    # Enlarging and averaging back gives the scan again, up to the bicubic kernel's sharpening.
    small = together[..., 0].reshape(-1, 8, 4, 8, 4).mean((2, 4))
    assert np.abs(small - digits.images * 255 / 16).mean() < 12
    assert np.corrcoef(small.ravel(), digits.images.ravel())[0, 1] > 0.98


def test_images_are_grey_and_use_the_whole_range():
    images, _ = digits_arrays("train")
    assert (images == images[..., :1]).all()
    assert images.min() == 0
    assert images.max() == 255


def test_arrays_cannot_be_changed_by_accident():
    images, labels = digits_arrays("test")
    for array in (images, labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_source_gives_the_arrays_record_by_record():
    source = DigitsSource("test")
    images, labels = digits_arrays("test")
    assert (len(source), source.num_classes, source.name) == (297, 10, "digits/test")
    record = source[np.int64(5)]
    np.testing.assert_array_equal(record["image"], images[5])
    assert record["label"].shape == ()
    assert (record["label"].dtype, int(record["label"])) == (np.int32, labels[5])
    with pytest.raises(IndexError):
        source[297]


def test_unknown_split_names_the_allowed():
    with pytest.raises(ValueError, match=r"'val'.*'train', 'test'"):
        DigitsSource("val")
