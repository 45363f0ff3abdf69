"""`make_bucketed_loader` of `pipeline.py`."""

import collections
import json

import numpy as np
import pytest

from maskgil_jax.data.arrays import ArraySource
from maskgil_jax.data.canvases import CanvasSource
from maskgil_jax.data.pipeline import make_bucketed_loader, make_loader

COUNTS = {(2, 4): 30, (4, 2): 10, (3, 3): 3}


def make_sources(counts=COUNTS):
    """Number the records of each bucket from a thousand of its own; images have its shape."""
    sources = {}
    for base, (size, count) in enumerate(counts.items()):
        arrays = {
            "image": np.zeros((count, *size, 3), np.uint8),
            "number": 1000 * base + np.arange(count),
        }
        sources[size] = ArraySource(arrays, name=f"bucket {base}")
    return sources


def make_noise(size):
    return lambda record, rng: record | {"noise": rng.random(2)}


def load(counts=COUNTS, batch_size=4, seed=7, **options):
    return make_bucketed_loader(
        make_sources(counts), batch_size=batch_size, seed=seed, make_transform=make_noise, **options
    )


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for one, other in zip(batches, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].tobytes() == other[key].tobytes()


def sizes_of(batches):
    return [batch["image"].shape[1:3] for batch in batches]


def test_every_batch_is_of_one_bucket_in_proportion_to_the_records():
    batches = take(load(), 129)
    found = collections.Counter(sizes_of(batches))
    assert all(abs(found[size] - 3 * count) <= 2 for size, count in COUNTS.items())
    for batch, (height, width) in zip(batches, sizes_of(batches), strict=True):
        base = list(COUNTS).index((height, width))
        assert set(batch["number"] // 1000) == {base}
    # Spread evenly, not one bucket after the other.
    first = collections.Counter(sizes_of(batches[:43]))
    assert all(abs(first[size] - count) <= 2 for size, count in COUNTS.items())


def test_inside_a_bucket_every_epoch_is_a_permutation():
    batches = take(load(), 300)
    numbers = np.concatenate([b["number"] for b in batches if b["image"].shape[1:3] == (4, 2)])
    epochs = numbers[:100].reshape(10, 10)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(1000 + np.arange(10), (10, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_buckets_of_equal_length_have_orders_and_draws_of_their_own():
    batches = take(load({(2, 4): 20, (4, 2): 20}), 10)
    by_size = {size: [] for size in [(2, 4), (4, 2)]}
    for batch in batches:
        by_size[batch["image"].shape[1:3]].append(batch)
    one, other = (np.concatenate([b["number"] % 1000 for b in part]) for part in by_size.values())
    assert (one != other).any()
    noise = np.concatenate([b["noise"].ravel() for b in batches])
    assert len(np.unique(noise)) == len(noise)


def test_weights_replace_the_numbers_of_records():
    weights = {(2, 4): 1.0, (4, 2): 1.0, (3, 3): 2.0}
    found = collections.Counter(sizes_of(take(load(weights=weights), 80)))
    assert all(abs(found[size] - 20 * weight) <= 2 for size, weight in weights.items())
    for wrong, match in [
        ({(2, 4): 1.0}, r"2 missing \[\(3, 3\), \(4, 2\)\]"),
        (weights | {(8, 8): 1.0}, r"1 extra \[\(8, 8\)\]"),
        (weights | {(3, 3): 0.0}, r"weight 0.0 of bucket \(3, 3\)"),
        (weights | {(3, 3): float("nan")}, r"weight nan of bucket"),
    ]:
        with pytest.raises(ValueError, match=match):
            load(weights=wrong)


@pytest.mark.parametrize("stop", [0, 1, 5, 17, 40])
def test_resume_continues_bitwise(stop):
    expected = take(load(num_threads=0), 60)
    first = load(num_threads=3, prefetch=6)
    take(first, stop)
    state = json.loads(json.dumps(first.get_state()))
    assert state["batches"] == {"next_index": stop}
    second = load(num_threads=3, prefetch=6)
    take(second, 3)
    second.set_state(state)
    assert_same(take(second, 60 - stop), expected[stop:])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_draw_the_same_buckets_and_share_each_batch(count):
    shards = [load(process_index=i, process_count=count, batch_size=8) for i in range(count)]
    batches = [take(shard, 50) for shard in shards]
    whole = take(load(batch_size=8), 50)
    assert all(sizes_of(shard) == sizes_of(whole) for shard in batches)
    assert len(set(sizes_of(whole))) == 3
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*batches, strict=True)
    ]
    assert_same(joined, whole)
    alone = load(batch_size=8)
    alone.set_state(shards[1].get_state())
    assert_same(take(alone, 2), take(load(batch_size=8), 52)[50:])


def test_shares_of_large_buckets_have_no_record_in_common():
    shards = [load(process_index=i, process_count=2, batch_size=10) for i in range(2)]
    seen = set()
    for one, other in zip(take(shards[0], 4), take(shards[1], 4), strict=True):
        if one["image"].shape[1:3] == (2, 4):
            numbers = [*one["number"], *other["number"]]
            assert len(set(numbers)) == 10
            seen |= set(numbers)
    assert len(seen) == 30  # three batches are the first epoch


def test_a_bucket_of_less_than_a_batch_repeats_in_it():
    batches = [b for b in take(load(batch_size=8), 60) if b["image"].shape[1:3] == (3, 3)]
    assert len(batches) >= 3
    for batch in batches:
        assert len(batch["number"]) == 8
        assert set(batch["number"]) == {2000, 2001, 2002}


def test_a_state_of_other_buckets_is_refused():
    state = load().get_state()
    with pytest.raises(ValueError, match="num_buckets was 3 and is 2; num_records was 43 and is"):
        load({(2, 4): 30, (4, 2): 10}).set_state(state)
    with pytest.raises(ValueError, match="belongs to other data: buckets_sha256 was"):
        load({(2, 4): 29, (4, 2): 11, (3, 3): 3}).set_state(state)
    with pytest.raises(ValueError, match="buckets_sha256 was"):
        load(weights=dict.fromkeys(COUNTS, 1.0)).set_state(state)
    with pytest.raises(ValueError, match="seed was 7 and is 8"):
        load(seed=8).set_state(state)
    plain = make_loader(next(iter(make_sources().values())), batch_size=4, seed=7)
    with pytest.raises(ValueError, match="num_buckets was None"):
        load().set_state(plain.get_state())


def test_the_order_of_the_mapping_does_not_matter():
    sources = make_sources()
    turned = dict(reversed(sources.items()))
    one, other = (make_bucketed_loader(s, batch_size=4, seed=0) for s in (sources, turned))
    assert_same(take(one, 20), take(other, 20))
    assert one.get_state() == other.get_state()


def test_canvases_of_several_sizes_are_buckets_as_they_are():
    sizes = [(64, 64), (64, 128), (96, 64)]
    sources = {size: CanvasSource("test", size) for size in sizes}
    loader = make_bucketed_loader(sources, batch_size=2, seed=0, num_threads=0)
    found = [batch["image"].shape for batch in take(loader, 9)]
    assert collections.Counter(found) == {(2, *size, 3): 3 for size in sizes}


def test_bad_arguments_are_refused():
    for options, match in [
        ({"batch_size": 6, "process_count": 4}, "batch_size = 6 cannot be shared by 4"),
        ({"seed": -1}, "seed = -1"),
        ({"num_threads": 4, "prefetch": 2}, "num_threads = 4, prefetch = 2"),
        ({"counts": {}}, "there are no buckets"),
    ]:
        with pytest.raises(ValueError, match=match):
            load(**options)
    sources = make_sources()
    sources[3, 3] = ArraySource({"number": np.arange(3)})
    with pytest.raises(ValueError, match=r"different fields: \(2, 4\) has .* \(3, 3\) has"):
        make_bucketed_loader(sources, batch_size=4, seed=0)


def test_a_broken_bucket_shows_at_once():
    def make_transform(size):
        def fail(record, rng):
            raise RuntimeError(f"bucket {size} is broken")

        return fail if size == (3, 3) else lambda record, rng: record

    with pytest.raises(RuntimeError, match=r"bucket \(3, 3\) is broken"):
        make_bucketed_loader(make_sources(), batch_size=4, seed=0, make_transform=make_transform)
