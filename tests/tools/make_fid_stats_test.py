"""Reference files: what they hold, the same however often they were begun."""

import io
import json
import os
import shutil

import jax
import numpy as np
import pytest
from fake_evaluation import FakeNet, make_pixels
from fake_tfds import write_dataset
from PIL import Image

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


def begin(files, monkeypatch, *arguments):
    """Start, and stop after the first of four blocks; return the working folder."""
    extract, calls = FakeNet.extract, []

    def fail_later(net, images, names):
        calls.append(len(images))
        if sum(calls) > 20:
            raise KeyboardInterrupt
        return extract(net, images, names)

    with monkeypatch.context() as patch:
        patch.setattr(FakeNet, "extract", fail_later)
        with pytest.raises(KeyboardInterrupt):
            make(files, *arguments)
    return files / ".x.npz.work"


def test_other_settings_do_not_continue_what_was_begun(files, capsys, monkeypatch):
    begin(files, monkeypatch)
    assert make(files, "--features=3")[0] == 1
    assert "features: 0 there, 3 now" in capsys.readouterr().err
    assert make(files)[0] == 0


def test_what_changes_the_last_digits_does_not_continue_what_was_begun(files, capsys, monkeypatch):
    begin(files, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 8)
        patch.setattr(np, "__version__", "9.9.9")
        assert make(files)[0] == 1
    error = capsys.readouterr().err
    assert "devices: 4 there, 8 now" in error
    assert f'numpy: "{np.__version__}" there, "9.9.9" now' in error
    assert make(files)[0] == 0


def test_a_damaged_state_is_named_and_never_used(files, capsys, monkeypatch):
    make(files, "--features=9", name="whole.npz")
    whole = (files / "whole.npz").read_bytes()
    work = begin(files, monkeypatch, "--features=9")
    shutil.copytree(work, files / "copy")
    content = (work / "state.npz").read_bytes()
    flipped = []
    for place in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        flipped.append(bytes(damaged))
    cut = [content[:size] for size in (0, 1, len(content) // 2, len(content) - 1)]
    capsys.readouterr()
    refused = 0
    for damaged in cut + flipped:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(files / "copy", work)
        (work / "state.npz").write_bytes(damaged)
        status, out = make(files, "--features=9")
        error = capsys.readouterr().err
        if status == 0:  # a bit that nothing reads, such as one of a time
            assert out.read_bytes() == whole
            out.unlink()
            continue
        refused += 1
        assert f"{work / 'state.npz'} is damaged (" in error
        assert f"remove {work} to begin anew" in error
        assert not out.exists()
    assert refused >= len(cut) + len(flipped) // 2


@pytest.mark.parametrize("lacking", ["count", "pool", "mu_s"])
def test_a_state_that_lacks_an_array_is_named(files, capsys, monkeypatch, lacking):
    state = begin(files, monkeypatch) / "state.npz"
    with np.load(state) as stored:
        arrays = {name: stored[name] for name in stored.files}
    np.savez(state, **{name: x for name, x in arrays.items() if not name.startswith(lacking)})
    assert make(files)[0] == 1
    assert f"{state} is damaged (" in capsys.readouterr().err


def test_a_prepared_dataset_gives_what_its_images_in_a_folder_give(tmp_path, capsys):
    """Real records in several shards, read and cropped as the pictures are."""
    pictures = make_pixels(37, shape=(10, 12, 3))

    def encode(index):
        file = io.BytesIO()
        Image.fromarray(pictures[index]).save(file, "PNG")
        return file.getvalue()

    (tmp_path / "pictures").mkdir()
    for index in range(37):
        (tmp_path / f"pictures/{index:02}.png").write_bytes(encode(index))
    splits = {"train": (2,), "validation": (20, 17)}
    write_dataset(tmp_path / "tfds", encode=encode, image_key="image", splits=splits)
    common = ["--protocol=val", "--image_size=8", "--features=6", "--batch_size=5"]
    ours = [*common, "--tfds=shapes", f"--data_dir={tmp_path / 'tfds'}", "--num_images=37"]
    for name, arguments in (
        ("tfds", ours),
        ("folder", [*common, f"--images={tmp_path / 'pictures'}"]),
    ):
        assert make_fid_stats.main([*arguments, f"--out={tmp_path / name}.npz"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert (printed["images"], printed["size"]) == (37, [8, 8])
    with np.load(tmp_path / "tfds.npz") as found, np.load(tmp_path / "folder.npz") as expected:
        assert set(found.files) == set(expected.files)
        for name in set(found.files) - {"record"}:
            np.testing.assert_array_equal(found[name], expected[name])
    record = load_record(tmp_path / "tfds.npz")
    assert record["images"]["name"] == "shapes/validation"
    reference = open_reference(find_protocol("val"), FakeNet(), tmp_path / "tfds.npz")
    assert reference.settings["count"] == 37
    # Statistics of a split with other images are others.
    assert make_fid_stats.main([*ours, "--split=train", f"--out={tmp_path / 'x.npz'}"]) == 1
    assert "--split train is that of --protocol train" in capsys.readouterr().err
    ours[0], ours[-1] = "--protocol=train", "--num_images=2"
    ours[2] = "--features=2"
    assert make_fid_stats.main([*ours, f"--out={tmp_path / 'x.npz'}"]) == 0
    assert load_statistics(tmp_path / "x.npz")[0].count == 2


def test_a_damaged_picture_of_a_dataset_is_named(tmp_path, capsys):
    write_dataset(tmp_path, encode=lambda i: b"no picture", image_key="image")
    arguments = ["--protocol=val", "--tfds=shapes", f"--data_dir={tmp_path}"]
    assert make_fid_stats.main([*arguments, f"--out={tmp_path / 'x.npz'}"]) == 1
    assert "image 0 of shapes/validation in " in capsys.readouterr().err


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
