"""Extraction gives the same bytes whatever happens to it, and refuses what would mix them up."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiny
from PIL import Image

import maskgil_jax
from maskgil_jax.data.arrays import ArraySource
from maskgil_jax.data.captions import read_json_lines
from maskgil_jax.data.crops import Crops
from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.data.errors import DatasetError
from maskgil_jax.data.folder import ImageFolderSource
from maskgil_jax.data.token_buckets import open_token_buckets
from maskgil_jax.data.token_dataset import TokenDataset, TokenizerOrigin
from maskgil_jax.data.token_records import TokenRecordSource
from maskgil_jax.data.transforms import to_float

TOOLS = tiny.ROOT / "tools"
TESTS = tiny.ROOT / "tests"


@pytest.fixture(autouse=True)
def _tools_importable(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.make_inputs(folder)
    return folder


def flags(inputs, out, **changes):
    """Return the command line of a small extraction."""
    values = {
        "tokenizer": inputs / "tokenizer",
        "data": "folder",
        "path": inputs / "images",
        "image_size": 16,
        "crops": "center_flip",
        "batch_size": 8,
        "num_shards": 10,
        "num_threads": 2,
        "out": out,
    } | changes
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def run_tool(inputs, out, **changes):
    import extract_tokens

    return extract_tokens.main(flags(inputs, out, **changes))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def command(*arguments):
    return [sys.executable, str(TOOLS / "extract_tokens.py"), *arguments]


def start(*arguments):
    return subprocess.Popen(
        command(*arguments),
        env=tiny.environment(),
        cwd=tiny.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """What one process on four devices writes when nothing disturbs it."""
    out = tmp_path_factory.mktemp("finished") / "tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        assert run_tool(inputs, out) == 0
    return out


# The core with a stand-in for the encoder: what it computes depends on every pixel.


def fake_encode(images):
    sums = np.round(images * 127.5 + 127.5).astype(np.int64).reshape(len(images), 4, 4, 4, 4, 3)
    weights = np.arange(1, 49).reshape(4, 4, 3)
    return (np.einsum("biyjxc,yxc->bij", sums, weights) % 32).astype(np.int32)


ORIGIN = TokenizerOrigin(
    family="fake",
    path="nowhere",
    fingerprint="12" * 32,
    codebook_size=32,
    downsample_factor=4,
    dtype="float32",
)


def make_wanted(source, crops, **changes):
    fields = dict(
        tokenizer=ORIGIN,
        source=source.name,
        source_records=len(source),
        num_classes=source.num_classes,
        has_captions=False,
        image_size=(16, 16),
        crops=crops.names,
        batch_size=8,
        num_shards=4,
    )
    return TokenDataset(**fields | changes)


def make_core(images=None, kind="center_flip", encode=fake_encode, **changes):
    """Return `extract(out, **options)` over digits or the given source."""
    from extraction import processes

    if images is None:
        pictures, labels = digits_arrays("test")
        arrays = {"image": pictures[:50], "label": labels[:50]}
        images = ArraySource(arrays, name="digits", num_classes=10)
    crops = Crops(kind=kind, size=16, scales=(1.25, 1.5) if kind == "ten_crop" else ())
    wanted = make_wanted(images, crops, **changes)

    def extract(out, **options):
        return processes.extract(wanted, images, crops, encode, out, **options)

    return extract


def test_records_are_the_tokens_of_every_crop(inputs, tmp_path, capsys):
    options = {"crops": "ten_crop", "crop_scales": "1.25,1.1"}
    assert run_tool(inputs, tmp_path / "tokens", **options) == 0
    output = capsys.readouterr().out.splitlines()
    assert json.loads(output[-1]).items() >= {"images": 20, "crops": 20, "skipped": 0}.items()
    assert re.fullmatch(r"20/20 images, [\d.,]+ images/s, ETA 0:00:00", output[-2])
    images = ImageFolderSource(inputs / "images", "train")
    crops = Crops(kind="ten_crop", size=16, scales=(1.25, 1.1))
    tokenizer = maskgil_jax.load_tokenizer(inputs / "tokenizer")
    source = TokenRecordSource(tmp_path / "tokens")
    assert len(source) == len(images) == 20
    codes = set()
    for i in range(20):
        expected = tokenizer.encode(to_float(crops(images[i]["image"])))
        np.testing.assert_array_equal(source[i]["tokens"], expected)
        assert source[i]["label"] == images[i]["label"]
        codes |= set(source[i]["tokens"].flat)
    assert len(codes) > 3
    dataset = source.dataset
    assert dataset.crops == crops.names
    assert dataset.tokenizer.fingerprint == tokenizer.fingerprint
    assert dataset.tokenizer.path == str(inputs / "tokenizer")
    assert (dataset.num_classes, dataset.image_size, dataset.grid) == (2, (16, 16), (4, 4))
    # Nothing else is left.
    names = [f"tokens-0000{i}-of-00010.array_record" for i in range(10)]
    assert sorted(p.name for p in (tmp_path / "tokens").iterdir()) == ["dataset.json", *names]


def test_the_stand_in_is_encoded_in_order_whatever_the_batches(tmp_path):
    found = []
    for batch_size, num_shards, num_threads in [(1, 1, 1), (8, 4, 3), (64, 50, 8)]:
        out = tmp_path / str(batch_size)
        extract = make_core(batch_size=batch_size, num_shards=num_shards, kind="ten_crop")
        dataset = extract(out, num_threads=num_threads)
        assert dataset.count == 50
        source = TokenRecordSource(out)
        found.append(np.stack([source[i]["tokens"] for i in range(50)]))
    assert found[0].shape == (50, 20, 4, 4)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    images = digits_arrays("test")[0]
    crops = Crops(kind="ten_crop", size=16, scales=(1.25, 1.5))
    np.testing.assert_array_equal(found[0][7], fake_encode(to_float(crops(images[7]))))


KILLER = """if True:
    import json, os, pathlib, random, shutil, signal, sys, time
    import extract_tokens_test as t

    def encode(images):
        time.sleep(0.002)
        return t.fake_encode(images)

    out, delays = pathlib.Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    extract = t.make_core(encode=encode)

    def fork(folder):
        # Never in the parent: the threads of array_record would be missing in its children.
        child = os.fork()
        if child == 0:
            extract(folder)
            os._exit(0)
        return child

    def wait(child):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    began = time.monotonic()
    assert wait(fork(out.with_name("timed"))) == 0
    whole = time.monotonic() - began
    shards, tries = [], 0
    while len(shards) < 40:
        tries += 1
        assert tries < 400, shards
        child = fork(out)
        time.sleep(delays.random() * whole / 2)
        os.kill(child, signal.SIGKILL)
        if wait(child) != 0:
            shards.append(len(list(out.glob("tokens-*"))))
        else:
            assert t.contents(out) == t.contents(out.with_name("timed"))
            shutil.rmtree(out)
    assert wait(fork(out)) == 0
    print(json.dumps({"kills": len(shards), "shards": shards}))
"""


def test_kills_at_random_moments_change_no_byte(tmp_path):
    """The child is killed by the system, so that nothing of it is tidied up."""
    out = tmp_path / "tokens"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLER, str(out), "0"],
        env=tiny.environment()
        | {"PYTHONPATH": ":".join(map(str, (tiny.ROOT, TOOLS, TESTS, TESTS / "tools")))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] == 40, report
    assert contents(out) == contents(tmp_path / "timed")
    assert len(TokenRecordSource(out)) == 50
    # They fell at several stages, with no shard there yet and with some.
    assert 0 in report["shards"], report
    assert len(set(report["shards"])) >= 3, report


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(inputs, finished, tmp_path, capsys):
    out = tmp_path / "tokens"
    with start(*flags(inputs, out)) as process:
        while process.poll() is None and not list(out.glob(".extraction/tokens-*.json")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (out / "dataset.json").exists()
    assert run_tool(inputs, out) == 0
    assert "of 10 shards are there already" in capsys.readouterr().out
    assert contents(out) == contents(finished)


def test_two_processes_write_what_one_does(inputs, finished, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = [*flags(inputs, tmp_path / "tokens"), f"--coordinator=localhost:{port}"]
    processes = [start(*arguments, "--num_processes=2", f"--process_id={i}") for i in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "ETA" in outputs[0][0]
    assert "ETA" not in outputs[1][0]
    assert "{" not in outputs[1][0]
    assert contents(tmp_path / "tokens") == contents(finished)


def run_places(extract, out, count=2, **options):
    """Run the places in threads: a lock belongs to whoever opened the file. Return their errors."""
    from extraction.shards import Place

    barrier, errors = threading.Barrier(count), [None] * count

    def work(index):
        place = Place(index=index, count=count)
        try:
            extract(out, place=place, synchronise=barrier.wait, **options)
        except Exception as error:
            errors[index] = error

    threads = [threading.Thread(target=work, args=[i]) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


@pytest.mark.parametrize("count", [2, 3])
def test_places_share_the_shards_and_another_number_may_go_on(tmp_path, count):
    make_core()(tmp_path / "one")
    assert run_places(make_core(), tmp_path / "many", count) == [None] * count
    assert contents(tmp_path / "many") == contents(tmp_path / "one")

    calls = []

    def stop(images):
        calls.append(len(images))
        if len(calls) > 8:
            raise OSError("unplugged")
        return fake_encode(images)

    with pytest.raises(OSError, match="unplugged"):
        make_core(encode=stop)(tmp_path / "other")
    assert len(list((tmp_path / "other").glob("tokens-*"))) == 2
    assert run_places(make_core(), tmp_path / "other", count) == [None] * count
    assert contents(tmp_path / "other") == contents(tmp_path / "one")
    for error in run_places(make_core(), tmp_path / "five", 5):
        assert "num_shards 4 are too few for 5 processes" in str(error)


@pytest.mark.parametrize("fails", [0, 1])
def test_a_place_that_fails_ends_the_others(tmp_path, fails):
    def encode(images):
        if threading.current_thread() is broken:
            raise OSError("unplugged")
        return fake_encode(images)

    from extraction.shards import Place

    extract, barrier, errors = make_core(encode=encode), threading.Barrier(2), {}

    def work(index):
        try:
            place = Place(index=index, count=2)
            extract(tmp_path / "tokens", place=place, synchronise=barrier.wait)
        except (OSError, DatasetError) as error:
            errors[index] = str(error)

    threads = [threading.Thread(target=work, args=[i]) for i in range(2)]
    broken = threads[fails]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors[fails] == "unplugged"
    assert re.search(f"process {fails} ended before .* its error says why", errors[1 - fails])
    assert not (tmp_path / "tokens" / "dataset.json").exists()
    make_core()(tmp_path / "tokens")
    make_core()(tmp_path / "one")
    assert contents(tmp_path / "tokens") == contents(tmp_path / "one")


def test_an_old_note_of_another_place_does_not_vouch_for_a_damaged_shard(tmp_path, monkeypatch):
    """The first place may be done before the owner of the shard has found the damage."""
    from extraction import work

    out, read_whole = tmp_path / "tokens", work.read_whole
    make_core()(out)
    before = contents(out)
    (out / "tokens-00001-of-00004.array_record").write_bytes(b"damaged")

    def fail(images):
        raise OSError("unplugged")

    def read_late(out, name):
        time.sleep(1 if "tokens-00001" in name else 0)
        return read_whole(out, name)

    monkeypatch.setattr(work, "read_whole", read_late)
    first, second = run_places(make_core(encode=fail), out)
    assert "process 1 ended before tokens-00001-of-00004.array_record was whole" in str(first)
    assert str(second) == "unplugged"
    assert not (out / "dataset.json").exists()
    assert run_places(make_core(), out) == [None, None]
    assert contents(out) == before


def test_left_over_processes_and_locks_that_are_not_shared_are_refused(tmp_path):
    from extraction import work
    from extraction.shards import Place

    out = tmp_path / "tokens"
    with pytest.raises(DatasetError, match="does not see the lock of process 1 in .* such as NFS"):
        make_core()(out, place=Place(index=0, count=2))
    with (
        work.hold(work.process_lock(out, 1), out),
        pytest.raises(DatasetError, match=r"use by process \d+ on .* of an extraction by more pro"),
    ):
        make_core()(out)
    assert not list(out.glob("tokens-*"))
    make_core()(out)
    assert not (out / work.WORK).exists()


def test_locks_and_files_behave_on_a_network_file_system(tmp_path, monkeypatch):
    """NFS locks only what is open for writing, and deletes what is open when it is closed."""
    from extraction import processes, work

    def lock(file, operation):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, operation)

    def remove(folder, ignore_errors=False):
        for path in folder.iterdir():
            path.unlink()
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lock)
    monkeypatch.setattr(processes.shutil, "rmtree", remove)
    out = tmp_path / "tokens"
    assert run_places(make_core(), out) == [None, None]
    assert len(TokenRecordSource(out)) == 50
    assert not (out / work.WORK).exists()


def test_a_folder_of_other_images_is_refused(inputs, tmp_path, capsys):
    images = tiny.make_image_folder(tmp_path / "images")
    out, victim = tmp_path / "tokens", images / "train/dark/3.png"
    victim.write_bytes(b"damaged")
    assert run_tool(inputs, out, path=images, crops="center") == 1
    assert "1 unreadable images, 0 allowed" in capsys.readouterr().err
    # Repaired under a name that comes elsewhere in the order.
    victim.unlink()
    Image.new("RGB", (20, 24)).save(victim.with_name("93.png"))
    assert run_tool(inputs, out, path=images, crops="center") == 1
    message = r"other settings:\s+source: 'images/train \w{12}' → 'images/train \w{12}'\n"
    assert re.search(message, capsys.readouterr().err)


def test_other_settings_are_refused_with_the_differences(tmp_path):
    out, calls = tmp_path / "tokens", []

    def stop(images):
        calls.append(len(images))
        if len(calls) > 6:
            raise OSError("unplugged")
        return fake_encode(images)

    with pytest.raises(OSError, match="unplugged"):
        make_core(encode=stop)(out)
    before = contents(out)
    other = dataclasses.replace(ORIGIN, fingerprint="34" * 32)
    for finish in (False, True):
        if finish:
            make_core()(out)
            before = contents(out)
        with pytest.raises(DatasetError, match=r"other settings:\s+tokenizer.fingerp") as error:
            make_core(num_shards=5, tokenizer=other, kind="center")(out)
        for name in ("print: '1212", "crops: ('center', 'center_flip') → ", "num_shards: 4 → 5"):
            assert name in str(error.value)
        after = contents(out)
        # A refusal leaves locks at most.
        assert {k: v for k, v in after.items() if not k.endswith(".lock")} == {
            k: v for k, v in before.items() if not k.endswith(".lock")
        }


def test_a_finished_folder_is_left_alone_and_a_damaged_shard_made_again(tmp_path):
    out = tmp_path / "tokens"
    make_core()(out)
    before, times = contents(out), {p: p.stat().st_mtime_ns for p in out.iterdir()}

    def never(images):
        raise AssertionError("encoded again")

    make_core(encode=never)(out)
    assert contents(out) == before
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == times
    victim = sorted(out.glob("tokens-*"))[2]
    damaged = bytearray(before[victim.name])
    damaged[len(damaged) // 2] ^= 1
    victim.write_bytes(damaged)
    make_core()(out)
    assert contents(out) == before
    untouched = [p for p in times if p.name.startswith("tokens") and p != victim]
    assert all(p.stat().st_mtime_ns == times[p] for p in untouched)


def test_a_folder_in_use_or_with_other_files_is_refused(tmp_path):
    from extraction import work

    out = tmp_path / "tokens"
    (out / work.WORK).mkdir(parents=True)
    with (
        work.hold(work.process_lock(out, 0), out),
        pytest.raises(DatasetError, match=r"is in use by process \d+ on "),
    ):
        make_core()(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match=r"no token records \(notes.txt\)"):
        make_core()(out)
    assert (out / "notes.txt").read_text() == "mine"


def test_unreadable_images_are_left_out_listed_and_counted(inputs, tmp_path, capsys):
    images = tiny.make_image_folder(tmp_path / "images", count=10)
    for name in ("dark/3.png", "light/0.png"):
        victim = images / "train" / name
        victim.write_bytes(victim.read_bytes()[:200])
    source = ImageFolderSource(images, "train")
    out = tmp_path / "tokens"
    with pytest.raises(DatasetError, match=r"1 unreadable images, 0 allowed; the last: dark/3.png"):
        make_core(source)(out)
    with pytest.raises(DatasetError, match=r"2 unreadable images, 1 allowed; the last: light/0"):
        make_core(source)(out, max_bad_images=1)
    assert not (out / "dataset.json").exists()
    # Of two places each is within bounds; together they are not.
    errors = run_places(make_core(source), tmp_path / "two", max_bad_images=1)
    assert any("2 unreadable images, 1 allowed" in str(error) for error in errors)
    dataset = make_core(source)(out, max_bad_images=2)
    assert "dark/3.png" in capsys.readouterr().err
    assert dataset.count == 18
    skipped = [entry for shard in dataset.shards for entry in shard.skipped]
    assert [index for index, _ in skipped] == [3, 10]
    assert skipped[0][1].startswith("dark/3.png: ")
    assert run_places(make_core(source), tmp_path / "two", max_bad_images=2) == [None, None]
    assert contents(tmp_path / "two") == contents(out)
    records = TokenRecordSource(out)
    expected = [i for i in range(20) if i not in (3, 10)]
    assert [records.read(i).index for i in range(18)] == expected
    crops = Crops(kind="center_flip", size=16)
    for row, index in enumerate(expected):
        tokens = fake_encode(to_float(crops(source[index]["image"])))
        np.testing.assert_array_equal(records[row]["tokens"], tokens)
    # The command line never lets another image stand in, which would be there twice.
    bad = {"path": images, "num_shards": 2}
    assert run_tool(inputs, tmp_path / "tool", **bad) == 1
    assert "dark/3.png" in capsys.readouterr().err
    assert run_tool(inputs, tmp_path / "tool", **bad, max_bad_images=2) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"] == 2


def test_captions_are_kept_where_there_are_any(inputs, tmp_path, capsys):
    pictures, labels = digits_arrays("test")
    texts = np.array([f"eine {label} № {i}" for i, label in enumerate(labels[:9])])
    arrays = {"image": pictures[:9], "label": labels[:9], "caption": texts}
    source = ArraySource(arrays, name="texts", num_classes=10)
    make_core(source, has_captions=True)(tmp_path / "texts")
    records = TokenRecordSource(tmp_path / "texts")
    assert [records.read(i).captions for i in range(9)] == [(text,) for text in texts]
    arguments = [*flags(inputs, tmp_path / "none"), "--captions"]
    import extract_tokens

    assert extract_tokens.main(arguments) == 1
    message = r"--captions is given, but records of images/train have only \['image', 'label'\]"
    assert re.search(message, capsys.readouterr().err)


@pytest.fixture
def captioned(tmp_path):
    """Pictures of three shapes, number i of red level 20 i, with one text or two."""
    folder, lines = tmp_path / "pictures", []
    folder.mkdir()
    for i in range(9):
        size = [(16, 16), (40, 20), (20, 40)][i % 3 if i < 6 else 0]
        Image.fromarray(np.full((size[1], size[0], 3), 20 * i, np.uint8)).save(folder / f"{i}.png")
        texts = f"text {i}" if i else ["text 0", "another 0"]
        lines.append(json.dumps({"file_name": f"{i}.png", "caption": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


BUCKETED = {"data": "captions", "format": "jsonl", "crops": "center", "num_shards": 3}
BUCKETED |= {"buckets": "area", "bucket_multiple": 4, "bucket_max_ratio": 2.0}


def run_bucketed(inputs, captioned, out, **changes):
    import extract_tokens

    arguments = flags(inputs, out, **{"path": captioned, **BUCKETED} | changes)
    return extract_tokens.main([*arguments, "--captions"])


def test_captions_and_tokens_of_every_bucket_are_kept(inputs, captioned, tmp_path, capsys):
    out = tmp_path / "tokens"
    assert run_bucketed(inputs, captioned, out) == 0
    output = capsys.readouterr().out.splitlines()
    counts = {"12x20": 2, "16x16": 5, "20x12": 2}
    assert json.loads(output[-1]).items() >= {"images": 9, "skipped": 0, "buckets": counts}.items()
    assert output[0] == "9 images in 3 buckets, 12x20 to 20x12 pixels"
    assert sorted(path.name for path in out.iterdir()) == [*counts, "buckets.json"]
    tokenizer = maskgil_jax.load_tokenizer(inputs / "tokenizer")
    images, seen = read_json_lines(captioned), set()
    for size, source in open_token_buckets(out, captions=True).items():
        crop = Crops(kind="center", size=size)
        for row in range(len(source)):
            captions = source.read(row).captions
            number = int(captions[0].split()[-1])
            assert captions == images.captions(number)
            expected = tokenizer.encode(to_float(crop(images[number]["image"])))
            np.testing.assert_array_equal(source[row]["tokens"], expected)
            seen.add(number)
    assert seen == set(range(9))

    # Again: a damaged bucket is made again, the same; other settings or pictures are refused.
    before = contents(out)
    (out / "12x20/tokens-00000-of-00002.array_record").write_bytes(b"")
    assert run_bucketed(inputs, captioned, out) == 0
    assert contents(out) == before
    capsys.readouterr()
    assert run_bucketed(inputs, captioned, out, bucket_max_ratio=1.0) == 1
    assert "holds 12x20, 20x12, which these buckets do not have" in capsys.readouterr().err
    Image.new("RGB", (40, 20)).save(captioned / "0.png")
    assert run_bucketed(inputs, captioned, out) == 1
    assert "extracted with other settings" in capsys.readouterr().err
    assert {
        name: data for name, data in contents(out).items() if ".extraction" not in name
    } == before


def test_unreadable_pictures_of_buckets_are_counted_in_all(inputs, captioned, tmp_path, capsys):
    (captioned / "3.png").write_bytes(b"no picture")  # of no known size
    whole = (captioned / "4.png").read_bytes()
    (captioned / "4.png").write_bytes(whole[: len(whole) // 2])
    assert run_bucketed(inputs, captioned, tmp_path / "tokens", max_bad_images=1) == 1
    assert "2 unreadable images, 1 allowed" in capsys.readouterr().err
    assert run_bucketed(inputs, captioned, tmp_path / "tokens", max_bad_images=2) == 0
    output = capsys.readouterr()
    report = json.loads(output.out.splitlines()[-1])
    assert report.items() >= {"images": 7, "skipped": 2}.items()
    assert "left out 1 unreadable: 3.png: its content is no known" in output.err


def test_a_bucket_whose_only_picture_is_broken_is_left_out(inputs, captioned, tmp_path, capsys):
    for number in (1, 4):
        whole = (captioned / f"{number}.png").read_bytes()
        (captioned / f"{number}.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "tokens"
    assert run_bucketed(inputs, captioned, out, max_bad_images=1) == 1
    assert "2 unreadable images, 1 allowed" in capsys.readouterr().err
    for _ in range(2):  # and again where all is there
        assert run_bucketed(inputs, captioned, out, max_bad_images=2) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        counts = {"16x16": 5, "20x12": 2}
        assert report.items() >= {"images": 7, "skipped": 2, "buckets": counts}.items()
        assert list(open_token_buckets(out)) == [(16, 16), (20, 12)]
    # But not if nothing is left.
    for picture in captioned.glob("*.png"):
        whole = picture.read_bytes()
        picture.write_bytes(whole[:48])
    assert run_bucketed(inputs, captioned, tmp_path / "other", max_bad_images=9) == 1
    assert "all 9 images" in capsys.readouterr().err
    assert not (tmp_path / "other" / "buckets.json").exists()


def test_sizes_may_be_listed(inputs, captioned, tmp_path, capsys):
    changes = {"buckets": "listed", "bucket_multiple": None, "bucket_max_ratio": None}
    changes["bucket_sizes"] = "16x16,8x16"
    assert run_bucketed(inputs, captioned, tmp_path / "tokens", **changes) == 0
    counts = {"16x16": 7, "8x16": 2}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["buckets"] == counts
    assert sorted(open_token_buckets(tmp_path / "tokens")) == [(8, 16), (16, 16)]


def test_places_share_a_bucket_of_fewer_pictures_than_places(tmp_path):
    pictures, labels = digits_arrays("test")
    arrays = {"image": pictures[:2], "label": labels[:2]}
    source = ArraySource(arrays, name="two", num_classes=10)
    make_core(source, num_shards=2)(tmp_path / "one")
    extract = make_core(source, num_shards=2)
    assert run_places(extract, tmp_path / "many", 3) == [None] * 3
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crops": "center_flip"}, "center_flip has mirror images, of which captions say left"),
        ({"format": None}, "data.format '' is unknown; allowed: folder, jsonl"),
        ({"caption_key": "text"}, "data.caption_key 'text' must be 'captions/text'"),
        ({"buckets": "none"}, "data.bucket_multiple 4 must be 32"),
        ({"bucket_multiple": 3}, "size 16 and multiple 3"),
        ({"bucket_sizes": "16x16,8"}, "--bucket_sizes '8' is no size; write height and width"),
        ({"bucket_sizes": "16x16"}, "data.bucket_sizes ((16, 16),) must be ()"),
        ({"bucket_multiple": 2}, "not a multiple of the tokenizer's downsample factor 4"),
        ({"data": "folder", "split": "x"}, "'folder' has no captions: data.format 'jsonl'"),
    ],
)
def test_bad_flags_of_captions_are_refused(inputs, captioned, tmp_path, capsys, changes, message):
    assert run_bucketed(inputs, captioned, tmp_path / "tokens", **changes) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()


def test_captions_are_not_lost_unasked(inputs, captioned, tmp_path, capsys):
    assert run_tool(inputs, tmp_path / "tokens", **{"path": captioned, **BUCKETED}) == 1
    assert "--data captions without --captions would lose the texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, r"height 18 is not a multiple of the tokenizer's downsample factor 4"),
        ({"batch_size": 6}, r"--batch_size 6 is not divisible by 4"),
        ({"batch_size": 0}, r"--batch_size 0 must be at least 1"),
        ({"num_threads": 0}, r"--num_threads 0 must be at least 1"),
        ({"max_bad_images": -1}, r"--max_bad_images -1 must be at least 0"),
        ({"num_shards": 21}, r"num_shards 21 is out of range; allowed: 1 to 20"),
        ({"tokenizer": "/nowhere"}, r"/nowhere"),
        ({"path": "/nowhere"}, r"/nowhere"),
        ({"path": None}, r"data.path is empty"),
        ({"data": "digits"}, r"--path .* is given, but digits have no folder"),
        ({"tfds_name": "mnist"}, r"--tfds_name 'mnist' is given, but --data is folder"),
        ({"crop_scales": "1.1"}, r"crop scales \[1.1\] with crops 'center_flip'"),
        ({"crops": "ten_crop", "crop_scales": "1.1;2"}, r"--crop_scales '1.1;2': write numbers"),
        ({"split": "val"}, r"val"),
        ({"process_id": 1}, r"--num_processes and --process_id need --coordinator"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(
    inputs, tmp_path, capsys, changes, message
):
    assert run_tool(inputs, tmp_path / "tokens", **changes) == 1
    errors = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", errors), errors
    assert not (tmp_path / "tokens").exists()
