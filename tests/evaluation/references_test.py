"""A reference is taken where it belongs, and for what it suffices."""

import re

import numpy as np
import pytest
from fake_evaluation import SHAPE, FakeImages, FakeNet, make_pixels

from maskgil_jax.evals.frechet import Statistics, save_statistics
from maskgil_jax.evaluation.protocols import find_protocol
from maskgil_jax.evaluation.references import make_record, open_reference

NET = FakeNet()
VAL, ADM = find_protocol("val"), find_protocol("adm")


def make_file(path, *, protocol="val", net=NET, spatial=True, **options):
    images = FakeImages(12)
    features = NET.extract(images.read(0, 12), ("pool", "spatial"))
    record = None if protocol is None else make_record(protocol, net, images)
    save_statistics(
        path,
        Statistics.of_features(features["pool"]),
        Statistics.of_features(features["spatial"]) if spatial else None,
        record=record,
        **options,
    )
    return path


def test_statistics_serve_the_protocol_they_were_made_for(tmp_path):
    reference = open_reference(VAL, NET, make_file(tmp_path / "x.npz"))
    assert reference.settings["count"] == 12
    assert reference.settings["record"]["protocol"] == "val"
    assert tuple(reference.image_shape) == SHAPE
    assert reference.notes == ()
    assert reference.missing(VAL.metrics) == ["precision", "recall"]
    assert reference.wanted_features(VAL.metrics) == ()
    features = NET.extract(make_pixels(5), ("pool",))["pool"]
    reference = open_reference(VAL, NET, make_file(tmp_path / "y.npz", features=features))
    np.testing.assert_array_equal(reference.features, features)
    assert reference.missing(VAL.metrics) == []
    reference = open_reference(VAL, NET, make_file(tmp_path / "z.npz", spatial=False))
    assert reference.missing(("fid", "sfid", "kid")) == ["sfid", "kid"]


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ("train", {}, "is a reference from another protocol: val, not train; give --protocol val"),
        ("adm", {}, "is a reference from another protocol: val, not adm"),
        ("val", {"net": FakeNet("a" * 64)}, "is a reference from another net: .* aaaaaaaaaaaa…"),
        ("val", {"protocol": None}, "does not say of which protocol it is, and val is asked for"),
    ],
)
def test_a_reference_from_elsewhere_is_refused(tmp_path, asked, options, message):
    path = make_file(tmp_path / "x.npz", **options)
    with pytest.raises(ValueError, match=message):
        open_reference(find_protocol(asked), NET, path)


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"protocol": None}, "protocol"),
        ({"net": None}, "net.name"),
        ({"net": {"name": "inception-fid"}}, "net.fingerprint"),
        ({"net": "inception-fid"}, "net.name"),
        ({"image_shape": None}, "image_shape"),
        ({"image_shape": [8, "6", 3]}, "image_shape"),
        ({"image_shape": 8}, "image_shape"),
    ],
)
def test_an_incomplete_record_is_named(tmp_path, changes, lacking):
    record = make_record("val", NET, FakeImages(12)) | changes
    record = {name: value for name, value in record.items() if value is not None}
    features = NET.extract(make_pixels(12), ("pool",))["pool"]
    save_statistics(tmp_path / "x.npz", Statistics.of_features(features), record=record)
    message = rf"the record of .*x\.npz lacks {lacking}, .*make it again"
    with pytest.raises(ValueError, match=message):
        open_reference(VAL, NET, tmp_path / "x.npz")


def test_single_features_of_another_width_are_refused(tmp_path):
    path = make_file(tmp_path / "x.npz", features=np.ones((5, 3), np.float32))
    with pytest.raises(ValueError, match=r"statistics of 4 features, but single images of 3"):
        open_reference(VAL, NET, path)


def test_damaged_single_features_are_named(tmp_path):
    features = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    path = make_file(tmp_path / "x.npz", features=features)
    content = bytearray(path.read_bytes())
    place = content.index(features.tobytes())
    content[place + 100] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npz cannot be read .*pool.*; copy or make it anew"):
        open_reference(VAL, NET, path)


def test_the_adm_file_has_statistics_and_images(tmp_path):
    path = make_file(tmp_path / "x.npz", protocol=None)
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, arr_0=make_pixels(7, shape=(4, 4, 3)), **arrays)
    reference = open_reference(ADM, NET, path)
    assert reference.missing(ADM.metrics) == []
    assert reference.wanted_features(ADM.metrics) == ("pool",)  # of precision and recall
    assert reference.wanted_features(("fid", "sfid")) == ()
    assert (reference.settings["images"], reference.image_shape) == (7, (4, 4, 3))
    assert "does not say how it was made; it is taken to be of protocol adm" in reference.notes[0]


def test_images_alone_are_a_reference(tmp_path):
    np.savez(tmp_path / "x.npz", make_pixels(7))
    reference = open_reference(VAL, NET, tmp_path / "x.npz")
    assert reference.wanted_features(VAL.metrics) == ("pool", "spatial")
    assert "a set of 7 images, taken to be that of protocol val" in reference.notes[0]


def test_the_classes_of_a_reference_are_not_looked_at(tmp_path):
    np.savez(tmp_path / "x.npz", make_pixels(7), labels=["cat"] * 7)
    assert len(open_reference(VAL, NET, tmp_path / "x.npz").images) == 7


def test_what_is_no_reference_is_refused(tmp_path):
    cases = [
        ({"arr_1": make_pixels(3)}, "holds arr_1 and no arr_0"),
        ({"mu": np.zeros(4)}, "lacks sigma"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "statistics of 9 features, but inception-fid"),
    ]
    for arrays, message in cases:
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            open_reference(ADM, NET, tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError):
        open_reference(ADM, NET, tmp_path / "none.npz")
    with pytest.raises(ValueError, match=re.escape("needs --reference: the reference file of")):
        open_reference(ADM, NET, None)
    with pytest.raises(ValueError, match="come with the package"):
        open_reference(find_protocol("digits"), NET, tmp_path / "x.npz")
    with pytest.raises(ValueError, match="holds statistics; --image_size"):
        open_reference(VAL, NET, make_file(tmp_path / "y.npz"), image_size=8)
