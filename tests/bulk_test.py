"""Bulk writing: what appears, what a kill leaves, what is refused."""

import collections
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from maskgil_jax import bulk, processes, workdir
from maskgil_jax.data.token_dataset import TokenDataset, TokenizerOrigin, TokenRecord
from maskgil_jax.data.token_records import TokenRecordSource

SHAPE, GRID = (4, 6, 3), (2, 3)
LABELS = np.repeat(np.arange(5, dtype=np.int32), 2)
SETTINGS = {"seed": 3, "sampler": {"num_steps": 8}, "labels": [0, 1, 2, 3, 4]}


def make_images(first, labels):
    """Stands for a generator: image i depends on i and its label."""
    rng = [np.random.default_rng((first + i, int(label))) for i, label in enumerate(labels)]
    return np.stack([one.integers(0, 256, SHAPE, np.uint8) for one in rng])


def make_codes(first, labels):
    """Stands for a generator of codes."""
    return make_images(first, labels)[:, : GRID[0], : GRID[1], 0].astype(np.int32)


def make_job(out, **changes):
    """Return a job: of token records if `out` is named `r`."""
    fields = {"out": out, "labels": LABELS, "shape": SHAPE, "chunk_size": 4}
    if out.name == "r":
        fields |= {"shape": GRID, "records": make_dataset(num_shards=3)}
    return bulk.Job(**fields | {"settings": SETTINGS} | changes)


def make_dataset(**changes):
    fields = {
        "tokenizer": TokenizerOrigin(
            family="vq",
            path="vq",
            fingerprint="0" * 64,
            codebook_size=256,
            downsample_factor=2,
            dtype="float32",
        ),
        "source": "samples",
        "source_records": len(LABELS),
        "num_classes": 5,
        "has_captions": False,
        "image_size": (4, 6),
        "crops": ("whole",),
        "batch_size": 4,
        "num_shards": 1,
    }
    return TokenDataset(**fields | changes)


# What makes the items of a job, by the name of its output.
MAKE = {"x.npz": make_images, "x": make_images, "r": make_codes}


def contents(path):
    """All files under a path, with their bytes."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_an_npz_is_what_numpy_would_write(tmp_path):
    assert bulk.write(make_job(tmp_path / "new" / "x.npz"), make_images) == 0
    images = make_images(0, LABELS)
    with open(tmp_path / "numpy.npz", "wb") as file:
        np.savez(file, arr_0=images, labels=LABELS)
    assert contents(tmp_path / "new/x.npz") == contents(tmp_path / "numpy.npz")
    assert os.listdir(tmp_path / "new") == ["x.npz"]


def test_a_folder_has_one_picture_per_image(tmp_path):
    (tmp_path / "x").mkdir()
    bulk.write(make_job(tmp_path / "x"), make_images)
    names = sorted(os.listdir(tmp_path / "x"))
    assert names == [f"{i:06}_label{label}.png" for i, label in enumerate(LABELS)]
    for name, image in zip(names, make_images(0, LABELS), strict=True):
        with Image.open(tmp_path / "x" / name) as picture:
            np.testing.assert_array_equal(np.asarray(picture), image)
    assert os.listdir(tmp_path) == ["x"]


def test_records_are_those_of_an_extraction(tmp_path):
    (tmp_path / "r").mkdir()
    assert bulk.write(make_job(tmp_path / "r"), make_codes) == 0
    assert os.listdir(tmp_path) == ["r"]
    names = [f"tokens-{i:05}-of-00003.array_record" for i in range(3)]
    assert sorted(os.listdir(tmp_path / "r")) == ["dataset.json", *names]
    source = TokenRecordSource(tmp_path / "r")
    assert [shard.count for shard in source.dataset.shards] == [3, 3, 4]
    assert dataclasses.replace(source.dataset, shards=()) == make_dataset(num_shards=3)
    codes = make_codes(0, LABELS)
    for index, record in enumerate(map(source.read, range(10))):
        assert (record.index, record.label, record.captions) == (index, LABELS[index], ())
        assert record.tokens.dtype == np.uint16
        np.testing.assert_array_equal(record.tokens, codes[index : index + 1])


def test_records_that_do_not_fit_are_refused_and_leave_no_output(tmp_path):
    for change, message in (
        ({"shape": (3, 3)}, r"are \(1, \(2, 3\), 10\); the job's are \(1, \(3, 3\), 10\)"),
        ({"labels": LABELS[:9]}, r"\(1, \(2, 3\), 10\); the job's are \(1, \(2, 3\), 9\)"),
        ({"records": make_dataset(crops=("a", "b"))}, r"are \(2, \(2, 3\), 10\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make_job(tmp_path / "r", **change)
    with pytest.raises(ValueError, match=r"x.npz is a file; token records need a directory"):
        make_job(tmp_path / "x.npz", shape=GRID, records=make_dataset())
    with pytest.raises(ValueError, match="label 4; allowed"):
        bulk.write(make_job(tmp_path / "r", records=make_dataset(num_classes=4)), make_codes)
    assert os.listdir(tmp_path) == [".r.work"]
    # Pixels and records of one name are two jobs.
    other = make_job(tmp_path / "r", records=None, shape=SHAPE, settings={"records": False})
    with pytest.raises(ValueError, match="records: null there, false now"):
        bulk.write(other, make_images)


@pytest.mark.parametrize("name", MAKE)
def test_an_interrupted_job_makes_only_what_is_missing(tmp_path, name):
    make_items = MAKE[name]
    bulk.write(make_job(tmp_path / "whole" / name), make_items)
    for boundary in (4, 8):
        made = []

        def interrupted(first, labels, boundary=boundary):
            if first == boundary:
                raise KeyboardInterrupt
            return make_items(first, labels)

        def counted(first, labels, made=made):
            made.append((first, len(labels)))
            return make_items(first, labels)

        out = tmp_path / str(boundary) / name
        with pytest.raises(KeyboardInterrupt):
            bulk.write(make_job(out), interrupted)
        assert not out.exists()
        assert bulk.write(make_job(out), counted) == boundary
        assert made == [(4, 4), (8, 2)][boundary // 4 - 1 :]
        assert contents(out) == contents(tmp_path / "whole" / name)
        assert os.listdir(out.parent) == [name]


# Kills itself at the n-th step that changes the file system, for every n, and starts again. With
# "fail", the job that is killed makes nothing and is on its way out, beside an older output.
KILL = """
import contextlib, os, signal, sys, pathlib
sys.path.insert(0, {tests!r})
import bulk_test
from maskgil_jax import bulk

root, name, fails = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "fail"
make_items = bulk_test.MAKE[name]

def interrupt(first, labels):
    raise KeyboardInterrupt

def run(out, last, make):
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    left = [last]
    def fatal(call):
        def step(*args, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)
        return step
    for call in ("mkdir", "replace", "rename", "unlink", "rmdir", "fsync"):
        setattr(os, call, fatal(getattr(os, call)))
    with contextlib.suppress(KeyboardInterrupt):
        bulk.write(bulk_test.make_job(out), make)
    os._exit(0)

assert run(root / "whole" / name, 0, make_items) == 0
whole = bulk_test.contents(root / "whole" / name)
finished = 0
for step in range(1, 1000):
    out = root / str(step) / name
    if fails:
        out.parent.mkdir()
        out.write_text("older")
    status = run(out, step, interrupt if fails else make_items)
    if status == 0:
        break
    assert status == signal.SIGKILL, status
    if fails:
        assert out.read_text() == "older", step
    else:
        assert not out.exists() or bulk_test.contents(out) == whole, step
    try:
        bulk.check_out(out)
        assert run(out, 0, make_items) == 0, step
    except FileExistsError:  # killed at the lock or the empty folder: the output is finished
        finished += 1
    assert bulk_test.contents(out) == whole, step
    assert os.listdir(out.parent) == [name], step
assert finished == (0 if name == "x.npz" else 2), finished
print(step)
"""


@pytest.mark.parametrize(
    ("name", "mode", "steps"),
    [("x.npz", "make", 20), ("x", "make", 30), ("r", "make", 30), ("x.npz", "fail", 6)],
)
def test_a_kill_at_any_step_changes_nothing_of_the_result(tmp_path, name, mode, steps):
    script = KILL.format(tests=str(tiny.ROOT / "tests"))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), name, mode],
        env=tiny.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > steps


def interrupt(job, after=4):
    """Leave a job's working folder with the chunks before `after`."""

    def make(first, labels):
        if first >= after:
            raise KeyboardInterrupt
        return make_images(first, labels)

    with pytest.raises(KeyboardInterrupt):
        bulk.write(job, make)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed: 3 there, 4 now"),
        ({"sampler": {"num_steps": 9}}, r"sampler\.num_steps: 8 there, 9 now"),
        ({"labels": list(range(99))}, r"labels: \[0, 1, 2, 3, 4\] there, \[0, 1, .*\.\.\. now"),
        ({"size": [4, 6]}, r"size: null there, \[4, 6\] now"),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path, change, message):
    job = make_job(tmp_path / "x.npz")
    interrupt(job)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){message}.*choose another --out, or remove"):
        bulk.write(dataclasses.replace(job, settings=SETTINGS | change), make_images)
    assert {k: v for k, v in contents(tmp_path).items() if not k.endswith("lock")} == {
        k: v for k, v in before.items() if not k.endswith("lock")
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda work: (work / "settings.json").write_text("{"), "is damaged; remove"),
        (lambda work: (work / "settings.json").write_text("[]"), "holds no settings; remove"),
        (lambda work: (work / "settings.json").rename(work / "mine.txt"), "but no settings.json"),
    ],
)
def test_a_damaged_working_folder_is_refused(tmp_path, damage, message):
    job = make_job(tmp_path / "x")
    interrupt(job)
    damage(job.work)
    with pytest.raises(ValueError, match=message):
        bulk.write(job, make_images)


def test_a_job_in_progress_is_refused(tmp_path):
    job = make_job(tmp_path / "x")
    interrupt(job)
    with (
        workdir.lock(job.work),
        pytest.raises(ValueError, match=f"in use by process {os.getpid()} .*another --out"),
    ):
        bulk.write(job, make_images)


@pytest.mark.parametrize(("name", "factor"), [("x.npz", 2), ("x", 1)])
def test_a_full_disk_is_known_before_the_start(tmp_path, monkeypatch, name, factor):
    usage = collections.namedtuple("usage", "total used free")
    job = make_job(tmp_path / "folder" / name)
    needed = factor * len(LABELS) * int(np.prod(SHAPE)) + (1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, needed - 1))
    with pytest.raises(OSError, match=r"may need 0\.0 MB more on a disk with 1\.\d MB free"):
        bulk.write(job, lambda *_: pytest.fail("something was made"))
    assert not os.listdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, needed))
    bulk.write(job, make_images)


def test_the_space_that_records_take_is_not_underrated(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    labels = np.arange(300, dtype=np.int32) % 5
    dataset = make_dataset(source_records=300, num_shards=2)
    job = make_job(tmp_path / "r", labels=labels, records=dataset, chunk_size=300)
    one = TokenRecord(tokens=np.zeros((1, *GRID), int), index=0, label=0)
    codes = 300 * 6 * 2
    needed = codes + 300 * (len(dataset.layout.encode(one)) + 64) + 2 * 2**18
    free = [needed + (1 << 20) - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, free[0]))
    with pytest.raises(OSError, match=r"may need 0\.6 MB more on a disk with 1\.7 MB free"):
        bulk.write(job, lambda *_: pytest.fail("something was made"))
    assert not os.listdir(tmp_path)
    free[0] += 1
    bulk.write(job, make_codes)
    written = sum(map(len, contents(job.out).values()))
    assert needed / 3 < codes + written <= needed


def test_a_failure_before_the_first_chunk_leaves_nothing(tmp_path):
    def fail(first, labels):
        raise ValueError("bad input")

    for name in ("a/b/x.npz", "a/b/x"):
        with pytest.raises(ValueError, match="bad input"):
            bulk.write(make_job(tmp_path / name), fail)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", MAKE)
def test_the_lock_is_the_last_file_to_go(tmp_path, monkeypatch, name):
    unlink, gone = os.unlink, []

    def record(path, **options):
        unlink(path, **options)
        gone.append(os.path.basename(path))

    monkeypatch.setattr(os, "unlink", record)
    bulk.write(make_job(tmp_path / name), MAKE[name])
    assert gone[-2:] == ["complete.json", "lock"]


@pytest.fixture
def process(monkeypatch):
    """Makes this process one of two, without the other: `process(index)`."""

    @contextlib.contextmanager
    def enter_first(context, what):
        with context if jax.process_index() == 0 else contextlib.nullcontext(False) as given:
            yield bool(given)

    def become(index):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(processes, "enter_first", enter_first)

    return become


@pytest.mark.parametrize("name", MAKE)
def test_the_first_process_looks_once_for_all_that_it_waits_for(
    tmp_path, monkeypatch, process, name
):
    job = make_job(tmp_path / name, chunk_size=1)
    open_store, opened = bulk.open_store, []

    def count(job):
        opened.append(job)
        return open_store(job)

    def make_the_others(seconds):
        for first in range(1, 10, 2):
            open_store(job).store(first, MAKE[name](first, LABELS[first : first + 1]))

    process(0)
    monkeypatch.setattr(bulk, "open_store", count)
    monkeypatch.setattr(time, "sleep", make_the_others)
    assert bulk.write(job, MAKE[name]) == 0
    assert len(opened) == 3
    assert len(contents(job.out)) == {"x.npz": 1, "x": 10, "r": 4}[name]


@pytest.mark.parametrize("name", ["x.npz", "x"])
def test_another_process_makes_no_folder_anew(tmp_path, process, name):
    job = make_job(tmp_path / name)
    interrupt(job)

    def make(first, labels):
        if first == 4:
            shutil.rmtree(job.work)
        return make_images(first, labels)

    process(1)
    with pytest.raises(FileNotFoundError):
        bulk.write(job, make)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize("name", ["x.npz", "x"])
def test_another_process_fails_where_the_first_one_gave_up(
    tmp_path, monkeypatch, process, name, is_finished
):
    job = make_job(tmp_path / name)
    interrupt(job)
    if name == "x.npz":
        job.out.write_text("older")

    def end(seconds):
        if is_finished and job.work.exists():
            (job.work / "chunks").replace(job.work / "new")
            if name == "x.npz":
                (job.work / "joined").touch()
                (job.work / "joined").replace(job.out)
            else:
                (job.work / "new").replace(job.out)
        shutil.rmtree(job.work, ignore_errors=True)

    process(1)
    monkeypatch.setattr(time, "sleep", end)
    monkeypatch.setattr(bulk, "_GRACE_SECONDS", 0.1)
    if is_finished:
        assert bulk.write(job, make_images) == 4
    else:
        with pytest.raises(OSError, match=r"process 0 ended without .*its error says why"):
            bulk.write(job, make_images)


@pytest.mark.parametrize("size", [0, 7, 150])
def test_a_chunk_that_a_crash_cut_short_is_made_anew(tmp_path, size):
    job = make_job(tmp_path / "x.npz")
    interrupt(job, after=8)
    os.truncate(job.work / "chunks" / "000000000.npy", size)
    assert bulk.write(job, make_images) == 4
    with np.load(job.out) as stored:
        np.testing.assert_array_equal(stored["arr_0"], make_images(0, LABELS))


def test_outputs_that_hold_something_are_refused(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").touch()
    (tmp_path / "y.npz").mkdir()
    with pytest.raises(FileExistsError, match="not empty; choose another --out"):
        bulk.write(make_job(tmp_path / "x"), make_images)
    with pytest.raises(OSError, match="is a directory; choose another"):
        bulk.write(make_job(tmp_path / "y.npz"), make_images)
    assert sorted(contents(tmp_path)) == ["x/mine.txt"]
    with pytest.raises(ValueError, match="no labels"):
        make_job(tmp_path / "z", labels=LABELS[:0])
    with pytest.raises(ValueError, match="chunk_size 0"):
        make_job(tmp_path / "z", chunk_size=0)


def test_progress_names_speed_and_time_left(tmp_path, monkeypatch, capsys):
    bulk.write(make_job(tmp_path / "quiet.npz", chunk_size=2), make_images)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(bulk, "PROGRESS_SECONDS", 0)
    job = make_job(tmp_path / "x.npz", chunk_size=2)
    interrupt(job)
    capsys.readouterr()
    bulk.write(job, make_images)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == "2 of 6 images"
    assert re.fullmatch(r"4 of 6 images, [\d.]+ images/s, 0 min 00 s left", lines[1])


def test_settings_are_kept_readable(tmp_path):
    job = make_job(tmp_path / "x.npz")
    interrupt(job)
    assert json.loads((job.work / "settings.json").read_text()) == SETTINGS
