"""An evaluation is the same however often it was killed, and refuses what would mislead."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import unittest.mock
import warnings

import numpy as np
import pytest
import tiny
from fake_evaluation import FakeImages, FakeNet, make_pixels
from PIL import Image

from maskgil_jax import bulk, workdir
from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.data.errors import ImageReadError
from maskgil_jax.evals import metrics_from_features
from maskgil_jax.evals.frechet import Statistics
from maskgil_jax.evaluation import extraction, job, measure
from maskgil_jax.evaluation.image_sets import open_images
from maskgil_jax.evaluation.nets import open_net
from maskgil_jax.evaluation.protocols import find_protocol
from maskgil_jax.evaluation.references import Reference, open_reference

METRICS = ("fid", "sfid", "is", "precision", "recall", "density", "coverage")


def make_reference(count=40):
    images = FakeImages(count, seed=9)
    return Reference(
        settings={**images.settings, "count": count},
        image_shape=images.image_shape,
        images=images,
    )


def make_job(out, samples=None, **changes):
    samples = [FakeImages(30)] if samples is None else samples
    fields = {
        "protocol": find_protocol("val", metrics=METRICS, num_images=30),
        "net": FakeNet(),
        "reference": make_reference(),
        "samples": samples,
        "out": out,
        "batch_size": 8,
    }
    return job.Evaluation(**fields | changes)


def make_sweep(out, stop_at=None, values=(1.0, 2.0, 3.0)):
    samples = [FakeImages(30, seed=int(v), sampler={"guidance_scale": v}) for v in values]
    samples[1].stop_at = stop_at
    return make_job(
        out,
        samples,
        points=[{"guidance_scale": v} for v in values],
        sweep={"guidance_scale": list(values)},
    )


def test_a_report_says_what_its_figures_depend_on(tmp_path):
    report = job.run(make_job(tmp_path / "new" / "x.json", command="a command"))
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == report
    # The spread over splits of a single one is not known.
    assert set(report["figures"]) == set(METRICS)
    assert any("is: all 30 images are one split" in note for note in report["notes"])
    assert report["counts"] == {"samples": 30, "reference": 40}
    assert report["protocol"]["name"] == "val"
    assert report["net"]["fingerprint"] == "f" * 64
    assert report["command"] == "a command"
    assert set(report["versions"]) == {"maskgil_jax", "jax", "numpy", "platform", "devices"}
    assert "num_images is 30, not the 50000 of protocol val" in report["notes"][0]
    assert os.listdir(tmp_path / "new") == ["x.json"]


def test_figures_are_those_of_the_features(tmp_path):
    report = job.run(make_job(tmp_path / "x.json"))
    net, names = FakeNet(), ("pool", "spatial", "logits")
    ours, theirs = (net.extract(make_pixels(n, seed=s), names) for n, s in ((30, 0), (40, 9)))
    expected = metrics_from_features(
        ours["pool"],
        theirs["pool"],
        ours["logits"],
        metrics=METRICS,
        generated_spatial=ours["spatial"],
        real_spatial=theirs["spatial"],
    )
    del expected["is_std"]
    assert report["figures"] == pytest.approx(expected, rel=1e-12)


def test_five_kills_change_no_byte(tmp_path):
    job.run(make_job(tmp_path / "whole.json"))
    out = tmp_path / "x.json"
    for stop_at in (0, 8, 8, 17, 29):
        images = FakeImages(30, stop_at=stop_at)
        with pytest.raises(KeyboardInterrupt):
            job.run(make_job(out, [images]))
        assert not out.exists()
    images = FakeImages(30)
    job.run(make_job(out, [images]))
    assert images.reads == [(24, 30)]
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["whole.json", "x.json"]


# Where in the directory of an archive a bit asks for what is not there, from its beginning.
WISHES = {"password": (8, 1), "compression": (10, 1)}


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "partial", "place", *WISHES])
def test_a_damaged_shard_is_made_again(tmp_path, damage):
    job.run(make_job(tmp_path / "whole.json"))
    out = tmp_path / "x.json"
    with pytest.raises(KeyboardInterrupt):
        job.run(make_job(out, [FakeImages(30, stop_at=16)]))
    shard = tmp_path / ".x.json.work" / "samples" / "0000" / "000000008.npz"
    data = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[150] ^= 64
        shard.write_bytes(data)
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "place":  # the directory's, at the end: behind the end of the file
        data[-5] ^= 64
        shard.write_bytes(data)
    elif damage in WISHES:
        offset, mask = WISHES[damage]
        data[data.index(b"PK\1\2") + offset] ^= mask
        shard.write_bytes(data)
    else:  # killed while it was written
        shard.rename(shard.with_suffix(".123.partial"))
    images = FakeImages(30)
    job.run(make_job(out, [images]))
    assert images.reads[0] == (8, 16)
    assert len(images.reads) == 3
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()


# The n-th time that features are stored, the process kills itself.
KILL = """
import os, pathlib, signal, sys
sys.path.insert(0, "tests")
from evaluation.job_test import make_sweep
from maskgil_jax.evaluation import extraction, job

last, store = int(sys.argv[2]), extraction._store
def fatal(path, features):
    global last
    last -= 1
    if last == 0:
        path.with_suffix(".7.partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    store(path, features)
extraction._store = fatal
job.run(make_sweep(pathlib.Path(sys.argv[1])))
"""


def test_a_killed_process_is_continued_by_another(tmp_path):
    out = tmp_path / "x.json"
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(out), "11"],
        env=tiny.environment(devices=4),
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    assert not out.exists()
    evaluation = make_sweep(out)
    job.run(evaluation)
    # The reference's five shards and the first point's four were there, and one of the second.
    assert [images.reads for images in evaluation.samples] == [
        [],
        [(8, 16), (16, 24), (24, 30)],
        [(0, 8), (8, 16), (16, 24), (24, 30)],
    ]
    job.run(make_sweep(tmp_path / "whole.json"))
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_sweep_keeps_its_finished_points(tmp_path):
    out, said = tmp_path / "x.json", []
    with pytest.raises(KeyboardInterrupt):
        job.run(make_sweep(out, stop_at=20), say=said.append)
    assert [point["swept"] for point in said] == [{"guidance_scale": 1.0}]
    evaluation = make_sweep(out)
    report = job.run(evaluation)
    assert evaluation.samples[0].reads == []
    assert evaluation.samples[1].reads == [(16, 24), (24, 30)]
    assert [point["swept"]["guidance_scale"] for point in report["points"]] == [1.0, 2.0, 3.0]
    assert len({point["figures"]["fid"] for point in report["points"]}) == 3
    assert "figures" not in report
    assert report["sweep"] == {"guidance_scale": [1.0, 2.0, 3.0]}
    job.run(make_sweep(tmp_path / "whole.json"))
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_what_varies_keeps_its_order(tmp_path):
    def make(names, stop_at=None):
        points = [dict(zip(names, (a, b), strict=True)) for a in (1, 2) for b in (1, 2)]
        samples = [
            FakeImages(30, seed=i, stop_at=stop_at, sampler=point) for i, point in enumerate(points)
        ]
        sweep = {name: [1, 2] for name in names}
        return make_job(tmp_path / "x.json", samples, points=points, sweep=sweep)

    with pytest.raises(KeyboardInterrupt):
        job.run(make(["num_steps", "guidance_scale"], stop_at=9))
    with pytest.raises(ValueError, match="sweep_order"):
        job.run(make(["guidance_scale", "num_steps"]))


def test_a_spatial_distance_needs_nothing_else(tmp_path):
    protocol = find_protocol("val", metrics=("sfid",), num_images=30)
    report = job.run(make_job(tmp_path / "x.json", protocol=protocol))
    whole = job.run(make_job(tmp_path / "all.json"))
    assert report["figures"] == {"sfid": whole["figures"]["sfid"]}


def test_more_classes_than_a_split_holds_are_no_error(tmp_path):
    split = dataclasses.replace(make_job(tmp_path / "x.json").protocol, split_size=10)
    labels = np.arange(30)
    report = job.run(make_job(tmp_path / "x.json", [FakeImages(30, labels=labels)], protocol=split))
    assert not any("sorted by class" in note for note in report["notes"])
    labels = np.repeat(np.arange(6), 5)
    report = job.run(make_job(tmp_path / "y.json", [FakeImages(30, labels=labels)], protocol=split))
    assert any("sorted by class" in note for note in report["notes"])


def test_what_happens_is_said_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bulk, "PROGRESS_SECONDS", 0)
    net = FakeNet(batch_size=16)  # progress is told between the chunks of a batch too
    with pytest.raises(KeyboardInterrupt):
        job.run(make_job(tmp_path / "x.json", [FakeImages(30, stop_at=16)], net=net))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "reference: 40 images to come; compiling may take a minute",
        "reference: 8 of 40 images",
    ]
    assert lines[2].startswith("reference: 16 of 40 images, ")
    job.run(make_job(tmp_path / "x.json", net=net))
    assert capsys.readouterr().err.splitlines() == [
        "samples: kept 16 of 30 from an earlier start, 14 images to come; compiling may take a "
        "minute",
        "samples: 8 of 14 images",
        f"samples: measuring {', '.join(METRICS)}",
    ]


def test_a_folder_that_cannot_be_made_is_named_as_out(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--out .*file/x.json cannot be written: .*Not a directory"):
        job.run(make_job(tmp_path / "file" / "x.json"))


def test_a_finished_report_is_not_measured_again(tmp_path, capsys):
    out = tmp_path / "x.json"
    report = job.run(make_job(out))
    images, said = FakeImages(30), []
    capsys.readouterr()
    assert job.run(make_job(out, [images]), say=said.append) == report
    printed = f"{out} is finished already; nothing is measured again\n"
    assert capsys.readouterr().err == printed
    assert images.reads == []
    assert said == [report]


def test_a_finished_report_is_replaced_by_none_of_other_settings(tmp_path):
    out = tmp_path / "x.json"
    job.run(make_job(out))
    data = out.read_bytes()
    for other, message in (
        (make_job(out, [FakeImages(30, seed=1)]), r"finished report .*\n  samples.seed: 0 there"),
        (make_job(out, batch_size=4), "batch_size: 8 there, 4 now\nChoose another --out"),
        (make_sweep(out), "sweep.guidance_scale: null there"),
    ):
        with pytest.raises(ValueError, match=message):
            job.run(other)
        assert all(images.reads == [] for images in other.samples)
        assert out.read_bytes() == data
    for text in ("half of a rep", "{}"):
        out.write_text(text)
        with pytest.raises(ValueError, match="is there and no report of an evaluation"):
            job.run(make_job(out))
        assert out.read_text() == text
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (np.arange(30) % 3, "balanced (10 of each of 3 classes)"),
        (np.arange(30) % 4, "uneven (7 to 8 of each of 4 classes)"),
        (None, "unknown"),
    ],
)
def test_classes_of_given_samples_are_counted(tmp_path, labels, found):
    report = job.run(make_job(tmp_path / "x.json", [FakeImages(30, labels=labels)]))
    assert report["protocol"]["labels"] == found
    note = f"the classes of the samples are {found}, but protocol val takes them balanced"
    assert (note in report["notes"]) == (not found.startswith("balanced"))


def test_only_warnings_of_ours_become_notes(tmp_path, monkeypatch):
    whole = measure.metrics_from_features

    def warn(*args, **options):
        warnings.warn("of a library", RuntimeWarning, stacklevel=1)
        return whole(*args, **options)

    monkeypatch.setattr(measure, "metrics_from_features", warn)
    few = find_protocol("val", metrics=("fid",), num_images=4)
    with pytest.warns(RuntimeWarning, match="of a library"):
        report = job.run(make_job(tmp_path / "x.json", [FakeImages(4)], protocol=few))
    assert "of a library" not in report["notes"]
    assert any("4 images are too few" in note for note in report["notes"])


def test_a_begun_evaluation_is_not_continued_with_other_settings(tmp_path):
    out = tmp_path / "x.json"
    with pytest.raises(KeyboardInterrupt):
        job.run(make_job(out, [FakeImages(30, stop_at=20)]))
    for changes, name in (
        ({"samples": [FakeImages(30, seed=3)]}, "samples.seed: 0 there, 3 now"),
        ({"net": FakeNet("e" * 64)}, "net.fingerprint"),
        ({"batch_size": 4}, "batch_size: 8 there, 4 now"),
    ):
        with pytest.raises(ValueError, match=name) as caught:
            job.run(make_job(out, **changes))
        assert "holds a part of an evaluation with other settings" in str(caught.value)
    with workdir.lock(tmp_path / ".x.json.work"), pytest.raises(ValueError, match="is in use by"):
        job.run(make_job(out))
    images = FakeImages(30)
    job.run(make_job(out, [images]))
    assert images.reads == [(16, 24), (24, 30)]


def test_other_metrics_of_the_same_features_keep_the_samples(tmp_path):
    def ask(*metrics, stop_at=None):
        images = FakeImages(30, stop_at=stop_at)
        protocol = find_protocol("val", metrics=metrics, num_images=30)
        return make_job(tmp_path / "x.json", [images], protocol=protocol), images

    with pytest.raises(KeyboardInterrupt):
        job.run(ask("fid", stop_at=20)[0])
    with pytest.raises(ValueError, match=r"features: \[\"pool\"\] there, \[\"pool\", \"logits\"\]"):
        job.run(ask("fid", "is")[0])
    evaluation, images = ask("precision", "fid")
    report = job.run(evaluation)
    assert images.reads == [(16, 24), (24, 30)]
    assert set(report["figures"]) == {"precision", "fid"}
    assert report["protocol"]["metrics"] == ["precision", "fid"]


def test_finished_points_of_other_metrics_are_measured_anew(tmp_path):
    def make(metrics, stop_at=None):
        evaluation = make_sweep(tmp_path / "x.json", stop_at)
        protocol = dataclasses.replace(evaluation.protocol, metrics=metrics)
        return dataclasses.replace(evaluation, protocol=protocol)

    with pytest.raises(KeyboardInterrupt):
        job.run(make(("fid",), stop_at=20))
    report = job.run(make(("recall",)))
    assert [set(point["figures"]) for point in report["points"]] == [{"recall"}] * 3


def make_statistics(count, *, pool=4, spatial=5, features=None, images=None):
    rng = np.random.default_rng(1)

    def gather(width):
        return None if width is None else Statistics.of_features(rng.normal(size=(count, width)))

    return Reference(
        settings={"kind": "statistics", "count": count},
        image_shape=None,
        statistics=gather(pool),
        spatial_statistics=gather(spatial),
        features=None if features is None else rng.normal(size=features),
        images=images,
    )


REFUSALS = {
    "kid of few samples": (("kid",), 1000, make_reference(1000), "num_images 30 is too few: kid"),
    "kid of few images": (("kid",), 20, make_reference(19), "number of images 19 .* at least 20"),
    "precision": (("precision",), 20, make_reference(3), "images 3 is too few: precision .* 4;"),
    "density": (("density",), 20, make_reference(5), "images 5 is too few: density .* least 6;"),
    "few features": (
        ("recall",),
        20,
        make_statistics(40, features=(3, 4)),
        "images 3 is too few: recall",
    ),
    "fid of one image": (("fid",), 20, make_reference(1), "images 1 is too few: fid .* least 2;"),
    "single images": (("recall",), 20, make_statistics(40), "does not suffice for recall"),
    "spatial width": (
        ("sfid",),
        20,
        make_statistics(40, spatial=7),
        "spatial statistics of 7 features, but inception-fid has 5",
    ),
    "width of single features": (
        ("recall",),
        20,
        make_statistics(40, features=(9, 6)),
        "single 6 features, but inception-fid has 4",
    ),
    "no spatial statistics": (
        ("fid", "sfid"),
        20,
        make_statistics(40, spatial=None, images=FakeImages(9)),
        "no spatial ones .* other images than fid",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_measured_is_refused_before_a_sample_is_made(tmp_path, case):
    metrics, subset, reference, message = REFUSALS[case]
    protocol = find_protocol("val", metrics=metrics, num_images=30)
    protocol = dataclasses.replace(protocol, kid_subset_size=subset)
    images = FakeImages(30)
    with pytest.raises(ValueError, match=message):
        make_job(tmp_path / "x.json", [images], protocol=protocol, reference=reference)
    assert images.reads == []


def test_the_least_that_can_be_measured_is(tmp_path):
    for metric, count in (("precision", 4), ("coverage", 6), ("kid", 20), ("fid", 2)):
        protocol = find_protocol("val", metrics=(metric,), num_images=30)
        protocol = dataclasses.replace(protocol, kid_subset_size=20, kid_subsets=2)
        reference = make_reference(count)
        out = tmp_path / f"{metric}.json"
        report = job.run(make_job(out, protocol=protocol, reference=reference))
        assert np.isfinite(report["figures"][metric])


def test_classes_that_the_protocol_has_not_are_refused(tmp_path):
    for name, last in (("digits", 9), ("adm", 999)):
        protocol = find_protocol(name, metrics=("is",), num_images=30)
        labels = np.full(30, last)
        make_job(tmp_path / "x.json", [FakeImages(30, labels=labels)], protocol=protocol)
        for wrong in (-1, last + 1):
            labels[7] = wrong
            message = f"1 of the 30 samples have a class such as {wrong}; .* are 0 to {last}"
            with pytest.raises(ValueError, match=message):
                make_job(tmp_path / "x.json", [FakeImages(30, labels=labels)], protocol=protocol)


def test_an_svm_without_classes_is_refused_before_a_sample_is_read(tmp_path):
    protocol, net = find_protocol("digits", metrics=("svm",), num_images=30), FakeNet()
    with pytest.raises(ValueError, match="metric svm needs the classes of the samples"):
        make_job(tmp_path / "x.json", protocol=protocol, net=net)


def test_pictures_that_changed_meanwhile_are_not_mixed_with_the_others(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, pixels in enumerate(make_pixels(30)):
        Image.fromarray(pixels).save(folder / f"{number:02}.bmp")  # all of one size
    images = open_images(folder)
    images.read = unittest.mock.Mock(side_effect=[images.read(0, 8), KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        job.run(make_job(tmp_path / "x.json", [images]))
    (folder / "00.bmp").write_bytes((folder / "29.bmp").read_bytes())
    work = tmp_path / ".x.json.work"
    remedy = f"The files of samples have changed since then, .* or remove {work} to begin anew"
    with pytest.raises(
        ValueError,
        match=f'samples.sha256: "[0-9a-f]{{64}}" there, "[0-9a-f]{{64}}" now\n{remedy}',
    ):
        job.run(make_job(tmp_path / "x.json", [open_images(folder)]))


def test_a_damaged_picture_leaves_nothing_that_refuses_the_mended_folder(tmp_path):
    folder, names = tmp_path / "pictures", ["pictures"]
    folder.mkdir()
    for number, pixels in enumerate(make_pixels(30)):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    whole = (folder / "29.png").read_bytes()
    (folder / "29.png").write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"cannot read image .*29.png"):
        job.run(make_job(tmp_path / "x.json", [open_images(folder)]))
    assert os.listdir(tmp_path) == names
    (folder / "29.png").write_bytes(whole)
    images = open_images(folder)
    with unittest.mock.patch.object(images, "read") as read:
        # Of the disk or the network: the same files may be read another time.
        read.side_effect = [make_pixels(8), passing_error()]
        with pytest.raises(ValueError, match="cannot read image"):
            job.run(make_job(tmp_path / "x.json", [images]))
    assert sorted(os.listdir(tmp_path)) == [".x.json.work", *names]
    job.run(make_job(tmp_path / "x.json", [open_images(folder)]))
    assert sorted(os.listdir(tmp_path)) == [*names, "x.json"]


def passing_error():
    error = ImageReadError("cannot read image a.png: Input/output error")
    error.__cause__ = OSError(errno.EIO, "Input/output error")
    return error


def test_what_failed_before_the_first_shard_leaves_nothing(tmp_path):
    reference = make_reference()
    reference.images.stop_at = 0
    with pytest.raises(KeyboardInterrupt):
        job.run(make_job(tmp_path / "new" / "x.json", reference=reference))
    assert os.listdir(tmp_path) == []
    (tmp_path / ".x.json.work").mkdir()
    (tmp_path / ".x.json.work" / "letter").write_text("mine")
    with pytest.raises(ValueError, match="holds files but no settings.json"):
        job.run(make_job(tmp_path / "x.json"))


def test_features_that_are_no_numbers_are_refused(tmp_path):
    net = FakeNet()
    net.broken = 40 + 13  # after the reference's
    with pytest.raises(ValueError, match="feature 'pool' of image 13 is NaN or infinite"):
        job.run(make_job(tmp_path / "x.json", net=net))
    assert not (tmp_path / "x.json").exists()
    job.run(make_job(tmp_path / "x.json"))  # continues with a sound net


def test_too_few_images_are_noted_or_refused(tmp_path):
    few = find_protocol("val", metrics=("fid",), num_images=4)
    report = job.run(make_job(tmp_path / "x.json", [FakeImages(4)], protocol=few))
    assert "fid: generated: 4 images are too few for a covariance of 4" in report["notes"][-1]
    for count in (29, 31):
        with pytest.raises(ValueError, match=f"there are {count} samples, but 30 are asked for"):
            make_job(tmp_path / "y.json", [FakeImages(count)])
    with pytest.raises(ValueError, match="1 image: a distribution needs at least 2"):
        make_job(tmp_path / "y.json", [FakeImages(1)])
    with pytest.raises(ValueError, match=r"--out .*y.txt is no FILE.json"):
        make_job(tmp_path / "y.txt")


def test_other_sizes_and_sorted_classes_are_noted(tmp_path):
    protocol = find_protocol("val", metrics=("fid", "is"), num_images=30)
    protocol = dataclasses.replace(protocol, split_size=10)
    reference = dataclasses.replace(make_reference(), image_shape=(64, 64, 3))
    labels = np.repeat(np.arange(5), 6)
    notes = job.run(
        make_job(
            tmp_path / "x.json",
            [FakeImages(30, labels=labels)],
            protocol=protocol,
            reference=reference,
        )
    )["notes"]
    assert any("samples have 8×6 pixels, the reference 64×64" in note for note in notes)
    assert any("sorted by class, a split of 10 has as few as 2 of the 5" in note for note in notes)
    mixed = FakeImages(30, labels=np.arange(30) % 5)
    notes = job.run(make_job(tmp_path / "y.json", [mixed], protocol=protocol))["notes"]
    assert len(notes) == 1


def test_a_full_disk_is_seen_before_anything_is_made(tmp_path, monkeypatch):
    usage = extraction.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(extraction.shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(OSError, match="on a disk with 0.0 MB free"):
        job.run(make_job(tmp_path / "x.json"))
    assert os.listdir(tmp_path) == []


def test_digits_are_compared_with_held_out_digits(tmp_path):
    """Copies of real digits and averages of two of them are told apart."""
    images, labels = digits_arrays("train")
    blended = ((images[:400].astype(int) + images[400:800]) // 2).astype(np.uint8)
    protocol, net, figures = (
        find_protocol("digits", num_images=400),
        open_net("digit-net", None),
        {},
    )
    for name, pixels in (("real", images[:400]), ("blended", blended)):
        np.savez(tmp_path / f"{name}.npz", pixels, labels=labels[:400])
        evaluation = job.Evaluation(
            protocol=protocol,
            net=net,
            reference=open_reference(protocol, net, None),
            samples=[open_images(tmp_path / f"{name}.npz", labelled=True)],
            out=tmp_path / f"{name}.json",
        )
        figures[name] = job.run(evaluation)["figures"]
    real, blended = figures["real"], figures["blended"]
    assert real["novelty"] == 0  # copies
    assert real["agreement"] > 0.99
    assert real["precision"] > 0.8 > blended["precision"]
    assert 1.5 * real["fid"] < blended["fid"]
    assert blended["is"] < real["is"] < 10
    assert blended["novelty"] > 0.5
    assert real["svm_accuracy"] == blended["svm_accuracy"] > 0.97
