import numpy as np
import pytest

from maskgil_jax.evals.manifold import nearest_distances, neighbour_radii, precision_recall


def reference(real, generated, k):
    """The definition, pair by pair."""

    def radius(point, others):
        return sorted(np.linalg.norm(point - other) for other in others)[k]  # [0] is itself

    def share(points, centres):
        radii = [radius(c, centres) for c in centres]
        inside = [
            any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True))
            for p in points
        ]
        return np.mean(inside)

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("k", [1, 3])
def test_agrees_with_the_definition_for_every_block_size(k):
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(40, 3)), rng.normal(size=(31, 3)) + 1.5
    precision, recall = reference(real, generated, k)
    assert 0 < precision != recall
    assert max(precision, recall) < 1
    for block_rows in (1, 7, 1000):
        result = precision_recall(real, generated, k=k, block_rows=block_rows)
        assert (result.precision, result.recall) == (precision, recall)


def test_collapse_keeps_precision_and_loses_recall():
    real = np.random.default_rng(1).normal(size=(200, 4))
    collapsed = precision_recall(real, real[0] + np.eye(4) * 1e-3)
    assert collapsed.precision == 1
    assert collapsed.recall < 0.2
    far = precision_recall(real, real + 100)
    assert (far.precision, far.recall) == (0, 0)


def test_radius_excludes_the_point_but_not_its_duplicates():
    line = np.array([[0.0], [1.0], [3.0], [3.0], [10.0]])
    assert neighbour_radii(line, k=1).tolist() == [1, 1, 0, 0, 7]
    assert neighbour_radii(line, k=3).tolist() == [3, 2, 3, 3, 9]


def test_nearest_distance_of_a_copy_is_exactly_zero():
    points = np.random.default_rng(2).normal(size=(50, 64)) * 1e3
    assert (nearest_distances(points[::-1], points, block_rows=8) == 0).all()
    np.testing.assert_allclose(nearest_distances(points + 0.5, points), 4.0)


@pytest.mark.parametrize(
    ("real", "generated", "match"),
    [
        (np.zeros((3, 2)), np.zeros((9, 2)), "3 features are too few for k = 3.*k \\+ 1 = 4"),
        (np.zeros((9, 2)), np.zeros((3, 2)), "3 features are too few"),
        (np.zeros((9, 2)), np.zeros((9, 3)), "real has 2 features per row, generated 3"),
        (np.zeros(9), np.zeros((9, 1)), r"real has shape \(9,\)"),
        (np.zeros((9, 2)), np.zeros((0, 2)), r"generated has shape \(0, 2\)"),
        (np.zeros((9, 2)), np.full((9, 2), "x"), "generated has .* dtype <U1"),
        (np.zeros((9, 2)), np.diag([1.0, np.nan]), "NaN or infinity in 1 of 2 rows.* row 1"),
    ],
)
def test_unusable_features_are_refused(real, generated, match):
    with pytest.raises(ValueError, match=match):
        precision_recall(real, generated)


def test_k_and_block_must_be_positive():
    points = np.eye(5)
    with pytest.raises(ValueError, match="k = 0"):
        precision_recall(points, points, k=0)
    with pytest.raises(ValueError, match="block_rows = 0"):
        neighbour_radii(points, block_rows=0)
