import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from goldens_lib import load_golden

from maskgil_jax.evals import metrics_from_features
from maskgil_jax.evals.frechet import Statistics, frechet_distance
from maskgil_jax.evals.manifold import compare_manifolds, precision_recall
from maskgil_jax.evals.scores import inception_score, kernel_distance


def draw(count, width=6, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


GENERATED, REAL = draw(60), draw(50, seed=1) + 0.3
HUGE = np.float64(1e200)
ALL = ["kid", "coverage", "density", "recall", "precision", "is", "sfid", "fid"]


def test_the_goldens():
    golden = load_golden("metric_features").arrays
    found = metrics_from_features(golden["a"], golden["b"], metrics=["fid", "precision", "recall"])
    expected = {"fid": 39.96299676342886, "precision": 0.2516666650772095, "recall": 0.102}
    assert found == pytest.approx(expected, rel=1e-7)
    near = metrics_from_features(golden["a"], golden["a_near"])
    assert near == pytest.approx(
        {"fid": 0.01186126322409109, "precision": 1, "recall": 1}, rel=1e-6
    )
    # The logits are of 500 images.
    with pytest.warns(UserWarning, match="is: a split of 50 images"):
        score = metrics_from_features(
            golden["b"], golden["a"], golden["logits"], metrics=["is"], split_size=50
        )
    assert score == pytest.approx({"is": 4.619621332394192, "is_std": 0.4014912089685954}, rel=1e-9)


def test_every_metric_is_that_of_its_room():
    logits, ours, theirs = draw(60, 9, seed=2), draw(60, 4, seed=3), draw(50, 4, seed=4)
    found = metrics_from_features(
        GENERATED,
        REAL,
        logits,
        metrics=ALL,
        generated_spatial=ours,
        real_spatial=theirs,
        neighbours=2,
        density_neighbours=4,
        split_size=20,
        kid_subsets=3,
        kid_subset_size=30,
    )
    frechet = [
        frechet_distance(Statistics.of_features(x), Statistics.of_features(y))
        for x, y in ((GENERATED, REAL), (ours, theirs))
    ]
    score = inception_score(logits, split_size=20)
    manifolds = compare_manifolds(REAL, GENERATED, k=2, density_k=4)
    kid = kernel_distance(GENERATED, REAL, subset_size=30, subsets=3)
    assert found == pytest.approx(
        {"fid": frechet[0], "sfid": frechet[1], "is": score.mean, "is_std": score.std}
        | vars(manifolds)
        | {"kid": kid.mean, "kid_std": kid.std},
        rel=1e-9,
    )
    assert list(found)[:3] == ["fid", "sfid", "is"]
    assert {type(value) for value in found.values()} == {float}


def test_what_is_measured_by_default_follows_what_is_given():
    logits = draw(60, 9, seed=2)
    assert list(metrics_from_features(GENERATED, REAL)) == ["fid", "precision", "recall"]
    assert "is" in metrics_from_features(GENERATED, REAL, logits)
    with_spatial = metrics_from_features(
        GENERATED, REAL, generated_spatial=GENERATED, real_spatial=REAL
    )
    assert with_spatial["sfid"] == with_spatial["fid"]
    with pytest.raises(ValueError, match="sfid needs spatial features of both sets"):
        metrics_from_features(GENERATED, REAL, real_spatial=REAL)


def test_statistics_stand_in_for_real_features_where_they_can():
    statistics = Statistics.of_features(REAL)
    arrays = metrics_from_features(GENERATED, REAL, metrics=["fid"])
    assert metrics_from_features(GENERATED, statistics, metrics=["fid"]) == arrays
    for name in ("precision", "density", "kid"):
        with pytest.raises(ValueError, match=f"{name} needs the features of the real images"):
            metrics_from_features(GENERATED, statistics, metrics=[name])


def test_one_pair_alone_needs_only_its_own_neighbours():
    few = draw(4, seed=5)
    found = metrics_from_features(few, REAL, metrics=["precision"])
    assert found == {"precision": precision_recall(REAL, few).precision}
    both = compare_manifolds(REAL, GENERATED)
    assert metrics_from_features(GENERATED, REAL, metrics=["density", "coverage"]) == {
        "density": both.density,
        "coverage": both.coverage,
    }
    with pytest.raises(ValueError, match="too few for k = 5"):
        metrics_from_features(few, few, metrics=["density"])


def test_jax_arrays_are_taken_in_any_precision():
    expected = metrics_from_features(GENERATED, REAL)
    assert metrics_from_features(jnp.asarray(GENERATED), jnp.asarray(REAL)) == expected
    halves = metrics_from_features(GENERATED.astype(np.float16), REAL.astype(np.float16))
    assert halves == pytest.approx(expected, rel=0.02)
    assert halves != expected


def test_a_biased_distance_is_told_with_its_count_and_returned():
    with pytest.warns(UserWarning, match="fid: generated: 5 images are too few .* 6 features"):
        found = metrics_from_features(GENERATED[:5], REAL)
    assert found["fid"] > metrics_from_features(GENERATED, REAL)["fid"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics_from_features(GENERATED[:5], REAL, metrics=["precision"])


def test_a_split_of_fewer_images_than_classes_is_told():
    logits = draw(60, 9)
    with pytest.warns(UserWarning, match="is: a split of 4 images cannot score above 4, .* 9 cl"):
        metrics_from_features(GENERATED, None, logits, metrics=["is"], split_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics_from_features(GENERATED, None, logits, metrics=["is"], split_size=10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generated": GENERATED[:1]}, "1 generated image; .* at least 2"),
        ({"real": REAL[:1], "metrics": ["fid"]}, "at least 2 images"),
        ({"real": REAL[:, :5]}, "generated has 6 features per row, real 5"),
        ({"generated": GENERATED * np.nan}, "generated holds NaN or infinity in 60 of 60"),
        ({"real": np.where(REAL > 2, np.inf, REAL)}, "real holds NaN or infinity"),
        ({"generated": GENERATED.astype(str)}, "generated has .* dtype <U"),
        ({"real": REAL[0]}, r"real has shape \(6,\)"),
        ({"metrics": ["fids"]}, "unknown metric 'fids'; did you mean 'fid'"),
        ({"metrics": "fid"}, "give a list"),
        ({"metrics": []}, "give a list"),
        ({"metrics": ["is"]}, "needs logits"),
        ({"logits": draw(59)}, "logits has 59 rows for 60 generated images"),
        (
            {"generated_spatial": draw(59), "real_spatial": draw(50)},
            "generated_spatial has 59 rows for 60",
        ),
        (
            {"generated_spatial": draw(60), "real_spatial": draw(49)},
            "real has 50 images, real_spatial 49",
        ),
        ({"metrics": ["kid"]}, "too few for subsets of kid_subset_size 1000"),
        ({"metrics": ["svm"]}, "unknown metric 'svm'; There are fid, sfid"),
        ({"metrics": ["FID"]}, "unknown metric 'FID'; did you mean 'fid'"),
        ({"metrics": ["fid", "fid"]}, "metrics 'fid, fid': name each once"),
        ({"generated": HUGE * GENERATED}, "fid: generated: features .*e.200 .* overflows"),
        ({"real": HUGE * REAL}, "fid: real: features up to .*e.200 .* overflows"),
        ({"real": REAL[:3], "metrics": ["recall"]}, "real: 3 features are too few for k = 3"),
    ],
)
def test_bad_input_is_refused(changes, message):
    arguments = {"generated": GENERATED, "real": REAL} | changes
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fid: real: 1 images")
        with pytest.raises(ValueError, match=message):
            metrics_from_features(**arguments)
