import numpy as np
import pytest

from maskgil_jax.data.arrays import ArraySource


def test_records_are_the_rows(tmp_path):
    tokens = np.arange(24, dtype=np.int32).reshape(4, 2, 3)
    np.save(tmp_path / "tokens.npy", tokens)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    labels = np.array([2, 0, 1, 2], np.int32)
    source = ArraySource({"tokens": mapped, "label": labels}, name="cached", num_classes=3)
    assert (len(source), source.num_classes, source.name) == (4, 3, "cached")
    record = source[2]
    np.testing.assert_array_equal(record["tokens"], tokens[2])
    assert (record["label"].shape, int(record["label"])) == ((), 1)
    with pytest.raises(IndexError):
        source[4]


@pytest.mark.parametrize(
    ("arrays", "num_classes", "match"),
    [
        ({}, None, "no arrays"),
        ({"tokens": np.zeros((0, 2))}, None, r"\{'tokens': 0\} rows"),
        ({"tokens": np.zeros((3, 2)), "label": np.zeros(2)}, None, "'tokens': 3, 'label': 2"),
        ({"tokens": np.array([None, None])}, None, "'tokens' has shape .* dtype object"),
        ({"tokens": np.array(3)}, None, r"shape \(\)"),
        ({"tokens": np.zeros((3, 2))}, 10, "no 'label'"),
        ({"label": np.array([0, 10, -1])}, 10, r"2 labels out of range, first 10 in row 1.*0\.\.9"),
    ],
)
def test_unusable_arrays_are_refused(arrays, num_classes, match):
    with pytest.raises(ValueError, match=match):
        ArraySource(arrays, num_classes=num_classes)
