"""Reference files: what they hold, the same however often they were begun."""

import json
import os

import numpy as np
import pytest
from fake_evaluation import FakeNet, make_pixels

from maskgil_jax.evals.frechet import Statistics, load_record, load_statistics
from maskgil_jax.evaluation.protocols import find_protocol
from maskgil_jax.evaluation.references import open_reference
from tools import make_fid_stats

COUNT = 50


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(make_fid_stats, "open_net", lambda family, weights: FakeNet())
    monkeypatch.setattr(make_fid_stats, "BLOCK_ROWS", 16)


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "real.npz", make_pixels(COUNT))
    return tmp_path


def make(files, *arguments, name="x.npz"):
    out = files / name
    status = make_fid_stats.main(
        ["--protocol=val", f"--images={files / 'real.npz'}", f"--out={out}", *arguments]
    )
    return status, out


def test_statistics_are_those_of_all_features(files, capsys):
    status, out = make(files, "--features=5", "--batch_size=7")
    assert status == 0
    assert json.loads(capsys.readouterr().out)["images"] == COUNT
    features = FakeNet().extract(make_pixels(COUNT), ("pool", "spatial"))
    for found, name in zip(load_statistics(out), ("pool", "spatial"), strict=True):
        expected = Statistics.of_features(features[name])
        assert found.count == COUNT
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
        np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-9, atol=1e-12)
    with np.load(out) as stored:
        np.testing.assert_array_equal(stored["pool"], features["pool"][[0, 12, 24, 37, 49]])
    record = load_record(out)
    assert (record["protocol"], record["count"], record["image_shape"]) == ("val", 50, [8, 6, 3])
    assert record["net"]["fingerprint"] == "f" * 64
    assert sorted(os.listdir(files)) == ["real.npz", "x.npz"]
    assert open_reference(find_protocol("val"), FakeNet(), out).missing(("recall", "sfid")) == []


def test_kills_change_no_byte(files, monkeypatch):
    make(files, name="whole.npz")
    extract, seen = FakeNet.extract, []
    for stop_at in (0, 20, 4, 20):

        def interrupted(net, images, names, stop_at=stop_at):
            seen.append(len(images))
            if sum(seen) > stop_at:
                raise KeyboardInterrupt
            return extract(net, images, names)

        seen.clear()
        monkeypatch.setattr(FakeNet, "extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(files, "--batch_size=64")
        assert not (files / "x.npz").exists()
        assert (files / ".x.npz.work").exists() == (stop_at > 0)
    monkeypatch.setattr(FakeNet, "extract", extract)
    assert make(files, "--batch_size=64")[0] == 0
    assert (files / "x.npz").read_bytes() == (files / "whole.npz").read_bytes()
    assert sorted(os.listdir(files)) == ["real.npz", "whole.npz", "x.npz"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol=adm"], "--protocol 'adm' is unknown; allowed: val, train"),
        (["--tfds=x"], "give the images: one of --images and --tfds"),
        (["--data_dir=x"], "--data_dir is for --tfds"),
        (["--split=train"], "--split is for --tfds"),
        (["--num_images=49"], "--num_images 49, but there are 50 images"),
        (["--features=51"], "--features 51: allowed are 0 to 50, all images"),
        (["--image_size=8"], "--image_size and --convert_to_rgb are for folders"),
        (["--image_size=0"], "--image_size 0 must be at least 1"),
        (["--batch_size=0"], "--batch_size 0 must be at least 1"),
    ],
)
def test_bad_requests_are_refused(files, capsys, arguments, message):
    assert make(files, *arguments)[0] == 1
    assert message in capsys.readouterr().err
    assert os.listdir(files) == ["real.npz"]


def test_other_settings_do_not_continue_what_was_begun(files, capsys, monkeypatch):
    extract = FakeNet.extract
    calls = []

    def fail_later(net, images, names):
        calls.append(len(images))
        if sum(calls) > 20:
            raise KeyboardInterrupt
        return extract(net, images, names)

    monkeypatch.setattr(FakeNet, "extract", fail_later)
    with pytest.raises(KeyboardInterrupt):
        make(files)
    monkeypatch.setattr(FakeNet, "extract", extract)
    assert make(files, "--features=3")[0] == 1
    assert "features: 0 there, 3 now" in capsys.readouterr().err
    assert make(files)[0] == 0


def test_a_split_of_the_other_protocol_is_refused():
    assert [make_fid_stats.find_split(name, None) for name in ("val", "train")] == [
        "validation",
        "train",
    ]
    assert make_fid_stats.find_split("val", "test") == "test"
    assert make_fid_stats.find_split("train", "train[:10%]") == "train[:10%]"
    for protocol, split in (("val", "train[:5%]"), ("train", "validation")):
        with pytest.raises(ValueError, match="is that of --protocol"):
            make_fid_stats.find_split(protocol, split)
