import functools
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from maskgil_jax.data.arrays import ArraySource
from maskgil_jax.data.errors import ImageReadError
from maskgil_jax.data.pipeline import make_loader

ROOT = pathlib.Path(__file__).parents[2]


def add_noise(record, rng):
    return record | {"noise": rng.random(2)}


def number_source(n, name="numbers"):
    return ArraySource(
        {"number": np.arange(n), "label": np.arange(n, dtype=np.int32) % 3}, name=name
    )


def noisy_loader(n=10, batch_size=4, seed=7, **options):
    return make_loader(
        number_source(n), batch_size=batch_size, seed=seed, transform=add_noise, **options
    )


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
            assert one[key].dtype == other[key].dtype


def test_every_epoch_is_another_permutation_and_batches_cross_its_edge():
    numbers = np.concatenate([b["number"] for b in take(noisy_loader(), 10)])
    epochs = numbers.reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other_seed = np.concatenate([b["number"] for b in take(noisy_loader(seed=8), 10)])
    assert (numbers != other_seed).any()


def test_records_keep_their_types():
    batch = next(noisy_loader())
    assert batch["label"].dtype == np.int32
    assert batch["label"].shape == (4,)
    assert batch["noise"].shape == (4, 2)


def test_draws_differ_between_records_and_epochs():
    noise = np.concatenate([b["noise"][:, 0] for b in take(noisy_loader(), 10)])
    assert len(np.unique(noise)) == 40


def test_threads_change_nothing():
    expected = take(noisy_loader(num_threads=0), 12)
    assert_same(take(noisy_loader(num_threads=4, prefetch=6), 12), expected)


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5, 8])
def test_resume_continues_exactly(stop):
    """Batch 2 of 4 crosses the epoch's edge at 10; six batches are prefetched when we stop."""
    expected = take(noisy_loader(), 12)
    first = noisy_loader(num_threads=3, prefetch=6)
    before = take(first, stop)
    state = json.loads(json.dumps(first.get_state()))
    second = noisy_loader(num_threads=3, prefetch=6)
    second.set_state(state)
    assert_same(before + take(second, 12 - stop), expected)

    first.set_state(state)  # back to a place already passed, in the same iterator
    assert_same(take(first, 12 - stop), expected[stop:])


def test_resume_in_a_new_process():
    loader = noisy_loader()
    take(loader, 2)
    script = """if True:
        import json, sys
        import numpy as np
        from maskgil_jax.data.arrays import ArraySource
        from maskgil_jax.data.pipeline import make_loader
        arrays = {"number": np.arange(10), "label": np.arange(10, dtype=np.int32) % 3}
        loader = make_loader(
            ArraySource(arrays, name="numbers"), batch_size=4, seed=7,
            transform=lambda record, rng: record | {"noise": rng.random(2)},
        )
        loader.set_state(json.loads(sys.argv[1]))
        batches = [next(loader) for _ in range(4)]
        print(json.dumps([{k: v.tolist() for k, v in b.items()} for b in batches]))
        """
    state = json.dumps(loader.get_state())
    command = [sys.executable, "-W", "error", "-c", script, state]
    result = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    expected = [{k: v.tolist() for k, v in b.items()} for b in take(loader, 4)]
    assert json.loads(result.stdout) == expected


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_each_global_batch(count):
    shards = [
        noisy_loader(batch_size=8, process_index=i, process_count=count) for i in range(count)
    ]
    batches = [take(shard, 5) for shard in shards]
    assert all(len(b["number"]) == 8 // count for shard in batches for b in shard)
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*batches, strict=True)
    ]
    assert_same(joined, take(noisy_loader(batch_size=8), 5))


def test_state_fits_every_process_and_process_count():
    whole = noisy_loader(batch_size=8)
    take(whole, 3)
    shard = noisy_loader(batch_size=8, process_index=1, process_count=2)
    shard.set_state(whole.get_state())
    np.testing.assert_array_equal(next(shard)["noise"], next(whole)["noise"][4:])
    assert shard.get_state() == whole.get_state()


def test_state_of_other_data_is_refused():
    state = noisy_loader().get_state()
    loader = noisy_loader(n=11, seed=9)
    with pytest.raises(ValueError, match="num_records was 10 and is 11; seed was 7 and is 9"):
        loader.set_state(state)
    with pytest.raises(ValueError, match="source was None"):
        loader.set_state({})
    assert loader.get_state() == noisy_loader(n=11, seed=9).get_state()


def test_finite_runs_drop_or_keep_the_rest():
    loader = functools.partial(noisy_loader, shuffle=False, num_epochs=2, batch_size=8)
    assert [b["number"].tolist() for b in loader()] == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [8, 9, 0, 1, 2, 3, 4, 5],
    ]
    assert [len(b["number"]) for b in loader(drop_remainder=False)] == [8, 8, 4]
    shards = [loader(process_index=i, process_count=2, num_epochs=1) for i in range(2)]
    assert [len(list(shard)) for shard in shards] == [1, 1]


def test_fewer_records_than_a_batch_repeat_while_epochs_last():
    batch = next(noisy_loader(n=3, batch_size=8, shuffle=False))
    assert batch["number"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match="3 records x 2 epochs do not fill one batch of 8"):
        noisy_loader(n=3, batch_size=8, num_epochs=2)


class BrokenSource:
    """Fails at one record, as a truncated image does."""

    name = "broken"
    fails = 5

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == self.fails:
            raise ImageReadError(f"cannot read image {index}.JPEG")
        return {"number": np.asarray(index)}


@pytest.mark.parametrize("num_threads", [0, 2])
def test_read_error_reaches_the_caller_and_is_not_skipped(num_threads):
    loader = make_loader(
        BrokenSource(), batch_size=2, seed=0, shuffle=False, num_threads=num_threads
    )
    take(loader, 2)
    for _ in range(2):  # asking again does not silently go on with the batch after it
        with pytest.raises(ImageReadError, match=r"5\.JPEG"):
            next(loader)
    assert loader.get_state()["batches"] == {"next_index": 2}


def test_broken_first_record_shows_before_the_first_batch():
    source = BrokenSource()
    source.fails = 0
    with pytest.raises(ImageReadError, match=r"0\.JPEG"):
        make_loader(source, batch_size=2, seed=0, shuffle=False)


def test_images_of_different_sizes_ask_for_a_crop():
    class Ragged(BrokenSource):
        def __getitem__(self, index):
            return {"image": np.zeros((4, 4 + index, 3), np.uint8)}

    loader = make_loader(Ragged(), batch_size=4, seed=0)
    with pytest.raises(ValueError, match=r"'image' has 4 shapes in one batch.*CenterCrop"):
        next(loader)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size = 6 cannot be shared by 4"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"process_index": 2, "process_count": 2}, r"process_index = 2; allowed 0\.\.1"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"num_epochs": 0}, "num_epochs = 0"),
        ({"drop_remainder": False}, "needs num_epochs"),
        ({"drop_remainder": False, "num_epochs": 1, "process_count": 2}, "with 2 processes"),
        ({"num_threads": 4, "prefetch": 2}, "num_threads = 4, prefetch = 2"),
        ({"num_threads": -1}, "num_threads = -1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        noisy_loader(**options)


def test_records_must_be_dicts_of_numbers():
    with pytest.raises(ValueError, match="records of numbers are ndarray"):
        make_loader(number_source(4), batch_size=2, seed=0, transform=lambda r, rng: r["number"])
    with pytest.raises(ValueError, match="field 'text' of numbers is object"):
        make_loader(
            number_source(4), batch_size=2, seed=0, transform=lambda r, rng: {"text": object()}
        )


def test_batches_are_prepared_ahead_and_no_further():
    class Counted(BrokenSource):
        fails = None
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    source = Counted()
    loader = make_loader(source, batch_size=2, seed=0, num_threads=1, prefetch=4)
    source.reads = 0  # of the check at the start
    next(loader)
    give_up = time.monotonic() + 20
    while source.reads < 2 * 5 and time.monotonic() < give_up:
        time.sleep(0.01)
    time.sleep(0.05)
    assert source.reads == 2 * 5  # the batch given out and four more
