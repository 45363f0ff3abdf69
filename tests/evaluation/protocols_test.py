"""Protocols are fixed, and what is changed of one is said."""

import dataclasses

import pytest

from maskgil_jax.evaluation.measure import SVM_FIGURES
from maskgil_jax.evaluation.protocols import COLUMNS, PROTOCOLS, describe_changes, find_protocol


def test_the_protocol_of_published_figures():
    adm = find_protocol("adm")
    assert (adm.num_images, adm.labels, adm.neighbours, adm.split_size) == (
        50_000,
        "balanced",
        3,
        5000,
    )
    assert adm.metrics == ("fid", "sfid", "is", "precision", "recall")
    assert set(adm.features) == {"pool", "logits", "spatial"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        adm.num_images = 3


def test_features_are_those_that_the_metrics_need():
    assert find_protocol("adm", metrics=("fid", "kid")).features == ("pool",)
    assert find_protocol("adm", metrics=("is",)).features == ("logits",)
    assert find_protocol("digits", metrics=("svm", "recall")).features == ("pool", "pixels")


def test_all_columns_of_the_svm_are_known_as_such():
    assert set(SVM_FIGURES) == {name for name, source in COLUMNS.items() if source == "svm"}


def test_what_differs_from_the_protocol_is_noted():
    assert describe_changes(find_protocol("val", metrics=("fid",))) == []
    notes = describe_changes(find_protocol("val", num_images=10_000, labels="random"))
    assert len(notes) == 2
    assert notes[0].startswith("num_images is 10000, not the 50000 of protocol val: figures are")
    assert "labels is random, not the balanced" in notes[1]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("adn", {}, "protocol 'adn' is unknown; allowed: adm, val, .* Did you mean 'adm'"),
        ("adm", {"metrics": ("fdi",)}, "metric 'fdi' is unknown; .* Did you mean 'fid'"),
        ("adm", {"metrics": ("svm",)}, "metric 'svm' is none of protocol adm; allowed: fid, sfid"),
        ("digits", {"metrics": ("sfid",)}, "metric 'sfid' is none of protocol digits"),
        ("digits", {"metrics": ("agreement",)}, "metric 'agreement' comes with 'svm'"),
        ("adm", {"metrics": ("agreement",)}, "metric 'agreement' is unknown"),
        ("adm", {"metrics": ("is_std",)}, "metric 'is_std' comes with 'is'"),
        ("adm", {"metrics": ("FID",)}, "metric 'FID' is unknown; did you mean 'fid'"),
        ("adm", {"metrics": ("fid", "fid")}, "name one or more, each once"),
        ("adm", {"metrics": ()}, "name one or more"),
        ("adm", {"labels": "sorted"}, "labels 'sorted' is unknown; allowed: balanced, random"),
        ("adm", {"num_images": 1}, "num_images 1 is too few: a distribution needs at least 2"),
    ],
)
def test_what_no_protocol_allows_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        find_protocol(name, **changes)


def test_all_protocols_say_what_they_compare_with():
    assert {"adm", "val", "train", "digits", "digits_train"} == set(PROTOCOLS)
    assert all(len(protocol.reference) > 20 for protocol in PROTOCOLS.values())
