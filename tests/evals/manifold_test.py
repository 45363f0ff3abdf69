import jax
import numpy as np
import pytest

from maskgil_jax.evals import manifold
from maskgil_jax.evals.manifold import compare_manifolds, nearest_distances, precision_recall


def reference(real, generated, k, density_k):
    """The definitions, pair by pair, in float64."""

    def radius(point, others, k):
        return sorted(np.linalg.norm(point - other) for other in others)[k]  # [0] is itself

    def share(points, centres):
        radii = [radius(c, centres, k) for c in centres]
        inside = [
            any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True))
            for p in points
        ]
        return np.mean(inside)

    balls = [[np.linalg.norm(g - r) < radius(r, real, density_k) for g in generated] for r in real]
    return {
        "precision": share(generated, real),
        "recall": share(real, generated),
        "density": np.sum(balls) / density_k / len(generated),
        "coverage": np.mean([any(ball) for ball in balls]),
    }


@pytest.mark.parametrize(("k", "density_k"), [(3, 5), (5, 3)])
def test_agrees_with_the_definition_for_every_block_size(k, density_k):
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(40, 3)), rng.normal(size=(31, 3)) + 1.5
    expected = reference(real, generated, k, density_k)
    assert len(set(expected.values())) == 4
    assert min(expected.values()) > 0
    assert max(expected.values()) < 1
    for block_rows, dtype in ((3, np.float32), (7, np.float64), (1000, np.float32)):
        found = compare_manifolds(
            real, generated, k=k, density_k=density_k, block_rows=block_rows, dtype=dtype
        )
        assert vars(found) == pytest.approx(expected, rel=1e-12)
        pair = precision_recall(real, generated, k=k, block_rows=block_rows)
        assert vars(pair) == {name: expected[name] for name in ("precision", "recall")}


def test_float32_finds_what_float64_finds_far_from_the_origin():
    rng = np.random.default_rng(3)
    real = rng.normal(size=(300, 512))
    generated = np.concatenate([rng.normal(size=(200, 512)) * 0.98, real[:50] + 1e-3])
    expected = compare_manifolds(real, generated, dtype=np.float64)
    assert 0.3 < expected.precision < 1
    for offset in (0, 100):
        found = compare_manifolds(
            (real + offset).astype(np.float32), (generated + offset).astype(np.float32)
        )
        assert vars(found) == pytest.approx(vars(expected), abs=1e-2)


@pytest.mark.parametrize("distance", [300, 3000])
def test_clusters_far_apart_are_told_from_one_another_and_within(distance):
    """Rounding of float32 would take the distances within a cluster for 0."""
    rng = np.random.default_rng(7)
    real, generated = (
        scale * rng.normal(size=(300, 64)) + distance * rng.choice([-1, 1], (300, 1))
        for scale in (1, 1.3)
    )
    exact = compare_manifolds(real, generated, dtype=np.float64)
    assert exact.precision < 0.2
    assert exact.coverage > 0.05
    assert compare_manifolds(real, generated) == exact


def test_ties_with_the_radius_lie_inside_for_precision_and_outside_for_density():
    real = np.arange(8.0)[:, None] * 2  # every second neighbour of an inner point is 2 away
    found = compare_manifolds(real, real + 2, k=1, density_k=1)
    assert found.precision == 1
    assert found.density == 7 / 8  # only their centres lie inside
    assert found.coverage == 7 / 8


def test_copies_lie_in_balls_of_radius_zero():
    points = np.random.default_rng(4).normal(size=(20, 256)) * 10 + 3
    real, generated = np.repeat(points, 5, axis=0), np.tile(points, (4, 1))
    for dtype in (np.float32, np.float64):
        found = compare_manifolds(real, generated, density_k=3, dtype=dtype)
        assert (found.precision, found.recall) == (1, 1)
        assert (found.density, found.coverage) == (0, 0)  # no point is nearer than 0


def test_the_distance_of_copies_is_zero_wherever_they_stand():
    points = np.random.default_rng(4).normal(size=(40, 300)).astype(np.float32) * 10 + 3
    mean = points.mean(0, dtype=np.float64)
    one, other = (
        manifold._Cut("points", rows, mean, 64, np.dtype(np.float32))[0]
        for rows in (points, points[::-1])
    )
    squared = np.asarray(manifold._squared_distances(one, other))[:40, :40]
    assert (np.diagonal(squared[::-1]) == 0).all()
    assert (squared == 0).sum() == 40


def test_the_device_holds_blocks_not_sets(monkeypatch):
    held = []
    rows, width, block_rows = 1000, 40, 50

    def watch(name):
        original = getattr(manifold, name)

        def watched(*arguments):
            result = original(*arguments)
            held.append(sum(array.nbytes for array in jax.live_arrays()) - before)
            return result

        monkeypatch.setattr(manifold, name, watched)

    for name in ("_nearest_within", "_nearest_between", "_meet"):
        watch(name)
    features = np.random.default_rng(5).normal(size=(2, rows, width)).astype(np.float32)
    before = sum(array.nbytes for array in jax.live_arrays())
    compare_manifolds(*features, block_rows=block_rows)
    assert len(held) == 2 * 20 * 21 / 2 + 20 * 20
    neighbours = rows * 5 * 4 * 2
    assert max(held) < neighbours + 6 * block_rows * (width + block_rows) * 4 < features.nbytes


def test_collapse_keeps_precision_and_loses_recall():
    real = np.random.default_rng(1).normal(size=(200, 4))
    collapsed = precision_recall(real, real[0] + np.eye(4) * 1e-3)
    assert collapsed.precision == 1
    assert collapsed.recall < 0.2
    far = precision_recall(real, real + 100)
    assert (far.precision, far.recall) == (0, 0)


def test_radius_excludes_the_point_but_not_its_duplicates():
    line = np.array([[0.0], [1.0], [3.0], [3.0], [10.0]])
    for block_rows in (2, 8):
        cut = manifold._Cut("line", line, None, block_rows, np.dtype(np.float32))
        assert manifold._nearest_squared(cut, 1).tolist() == [[1], [1], [0], [0], [49]]
        assert manifold._nearest_squared(cut, 3)[:, 2].tolist() == [9, 4, 9, 9, 81]


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


def test_settings_must_be_possible():
    points = np.eye(7)
    for settings, message in (
        ({"k": 0}, "k = 0"),
        ({"density_k": 0}, "k = 0"),
        ({"density_k": 7}, "real: 7 features are too few for k = 7"),
        ({"block_rows": 0}, "block_rows = 0"),
        ({"dtype": np.float16}, "float32 or float64"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_manifolds(points, points, **settings)
    with pytest.raises(
        ValueError, match="real: features as large as 8.57e\\+24 overflow .*float32"
    ):
        compare_manifolds(points * 1e25, points)
    huge = compare_manifolds(points * 1e25, points * 1e25, dtype=np.float64)
    assert huge.precision == 1
