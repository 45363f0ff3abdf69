"""Source → endless shuffled batches that resume exactly: the first stage of the training path.

Record order and every random draw are a function of (seed, position in the global stream), where
batch t of the run holds positions t·B … (t+1)·B - 1 whatever the number of processes. So the whole
state of the iterator is the number of batches given out. Of several sources, one for each size of
images, the t-th batch comes from one that t alone decides.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import grain
import numpy as np

from maskgil_jax.data.transforms import Record, Transform

MAX_SEED = 2**32 - 1


@runtime_checkable
class Source(Protocol):
    """A dataset with random access."""

    name: str

    def __len__(self) -> int:
        """Return the number of records."""
        ...

    def __getitem__(self, index: SupportsIndex) -> Record:
        """Return record `index`."""
        ...


def make_loader(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transform: Transform | None = None,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    num_epochs: int | None = None,
    drop_remainder: bool = True,
    num_threads: int = 4,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """Make the iterator over one process's share of every global batch.

    Each step yields a dict of stacked records with `batch_size / process_count` rows: process p has
    the p-th slice of the global batch, so its concatenation over the processes does not depend on
    their number. An epoch is a fresh permutation of all records; batches run across its edge. A
    source smaller than a batch is repeated within the batch as long as epochs last.

    The first record is read, transformed and checked here, so a broken dataset shows at once.
    `get_state()` is a small JSON-ready dict, the same in every process; `set_state()` resumes with
    the very next batch, in another process or with another number of processes too, and refuses a
    state of other data.

    Args:
      source: random-access dataset of dicts of arrays.
      batch_size: global, over all processes.
      seed: 0..2**32 - 1, the same in every process.
      transform: (record, generator) → record, such as `transforms.Chain`.
      process_index, process_count: this process's place.
      shuffle: new order every epoch; otherwise the source's.
      num_epochs: passes over the source; None for no end.
      drop_remainder: leave out the last records of a finite run that fill no batch; False gives
        them as a smaller batch and needs a single process.
      num_threads: threads that prepare batches; 0 prepares each when asked for.
      prefetch: batches kept ready, at least `num_threads`; unused without threads.

    Raises:
      ValueError: an argument out of range, a batch not divisible by the processes, fewer records
        (times epochs) than a batch, or records that are no dicts of stackable arrays.
    """
    _check_shares(batch_size, process_index, process_count, drop_remainder)
    _check_counts(len(source), batch_size, num_epochs, drop_remainder)
    _check_threads(num_threads, prefetch)
    _check_seed(seed)

    records = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        records = records.shuffle()
    records = records.repeat(num_epochs)
    if transform is not None:
        records = records.random_map(transform)
    _check_record(source.name, records[0])

    batches = _share(records, batch_size, process_index, process_count, drop_remainder)
    read_options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    identity = {
        "source": source.name,
        "num_records": len(source),
        "batch_size": batch_size,
        "seed": seed,
        "shuffle": shuffle,
    }
    return _Loader(iter(batches.to_iter_dataset(read_options)), identity)


def make_bucketed_loader(
    sources: Mapping[tuple[int, int], Source],
    *,
    batch_size: int,
    seed: int,
    make_transform: Callable[[tuple[int, int]], Transform] | None = None,
    weights: Mapping[tuple[int, int], float] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    num_threads: int = 4,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """Make the endless iterator over one process's share of batches that are of one bucket each.

    The buckets take turns in proportion to their weights, evenly spread: after t batches a bucket
    of share w has had w·t of them, give or take one or two. Which bucket has the t-th batch depends
    on t alone, so that it is the same in every process. Inside a bucket all is as in `make_loader`:
    order and draws of its own, processes that share each global batch, and a source smaller than a
    batch repeated within it. Its weight being its number of records, each is then seen as often as
    those of large buckets.

    The first record of every bucket is read, transformed and checked here. State and errors are
    those of `make_loader`; the state is one counter, whatever the number of buckets.

    Args:
      sources: size (height, width) → data set, such as those of `buckets.split_by_bucket`.
      batch_size: global, over all processes, of every bucket.
      seed: 0..2**32 - 1, the same in every process.
      make_transform: size → transform of that bucket's records.
      weights: size → relative number of batches, more than 0, to within a hundredth of the least;
        by default the number of records.
      process_index, process_count: this process's place.
      shuffle: new order every epoch; otherwise the source's.
      num_threads: threads that prepare batches; 0 prepares each when asked for.
      prefetch: batches kept ready, at least `num_threads`; unused without threads.

    Raises:
      ValueError: an argument out of range, no sources, weights of other sizes, a batch not
        divisible by the processes, or records that are no dicts of stackable arrays or that have
        other fields than those of another bucket.
    """
    _check_shares(batch_size, process_index, process_count, True)
    _check_threads(num_threads, prefetch)
    _check_seed(seed)
    sizes = sorted(sources)
    shares = _check_weights(sources, weights)

    datasets = []
    fields: dict[str, Any] | None = None
    for size in sizes:
        _check_counts(len(sources[size]), batch_size, None, True)
        # Of its own, or buckets of equal length would have the same order and draws.
        own_seed = int(np.random.SeedSequence((seed, *size)).generate_state(1)[0])
        records = grain.MapDataset.source(sources[size]).seed(own_seed)
        if shuffle:
            records = records.shuffle()
        records = records.repeat()
        if make_transform is not None:
            records = records.random_map(make_transform(size))
        first = records[0]
        _check_record(sources[size].name, first)
        fields = first if fields is None else fields
        if first.keys() != fields.keys():
            raise ValueError(
                f"buckets have different fields: {sizes[0]} has {sorted(fields)}, {size} has "
                f"{sorted(first)}"
            )
        datasets.append(_share(records, batch_size, process_index, process_count, True))

    batches = grain.MapDataset.mix(datasets, shares)
    read_options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    buckets = [
        [*size, sources[size].name, len(sources[size]), share]
        for size, share in zip(sizes, shares, strict=True)
    ]
    identity = {
        "num_buckets": len(sizes),
        "num_records": sum(map(len, sources.values())),
        "buckets_sha256": hashlib.sha256(json.dumps(buckets).encode()).hexdigest(),
        "batch_size": batch_size,
        "seed": seed,
        "shuffle": shuffle,
    }
    return _Loader(iter(batches.to_iter_dataset(read_options)), identity)


def _share(
    records: grain.MapDataset,
    batch_size: int,
    process_index: int,
    process_count: int,
    drop_remainder: bool,
) -> grain.MapDataset:
    """Batch the records of the global stream, and keep one process's slice of every batch."""
    batches = records.batch(
        batch_size // process_count, drop_remainder=drop_remainder, batch_fn=_stack
    )
    whole = len(batches) // process_count * process_count
    return batches.slice(slice(process_index, whole, process_count))


class _Loader(grain.DatasetIterator):
    """Batches, with a state that knows which data it counts."""

    def __init__(self, batches: grain.DatasetIterator, identity: dict[str, Any]):
        super().__init__(batches)
        self._identity = identity

    def __next__(self) -> Record:
        try:
            return next(self._parent)
        except StopIteration:
            raise
        except Exception:
            # grain has taken the failed batch off its queue without counting it: a caller who goes
            # on would silently lose it and be off by one from then on.
            self._parent.set_state(self._parent.get_state())
            raise

    def get_state(self) -> dict[str, Any]:
        """Return the number of batches given out and what they are batches of."""
        return {**self._identity, "batches": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a saved state.

        Raises:
          ValueError: it was saved for other data; every difference is named.
        """
        different = [
            f"{key} was {state.get(key)!r} and is {value!r}"
            for key, value in self._identity.items()
            if state.get(key) != value
        ]
        if different or "batches" not in state:
            raise ValueError(
                "the saved data position belongs to other data: "
                f"{'; '.join(different) or 'no position in it'}; "
                "resume with the settings and data it was saved with, or start anew"
            )
        self._parent.set_state(state["batches"])


def _stack(records: Sequence[Record]) -> Record:
    """Stack records into a batch, telling which field does not fit."""
    first = records[0]
    for record in records:
        if record.keys() != first.keys():
            raise ValueError(f"records have different fields: {sorted(first)}, {sorted(record)}")
    batch = {}
    for key in first:
        shapes = {np.shape(record[key]) for record in records}
        if len(shapes) > 1:
            raise ValueError(
                f"{key!r} has {len(shapes)} shapes in one batch, such as {sorted(shapes)[:3]}; "
                "add a transform that makes them equal, such as CenterCrop"
            )
        batch[key] = np.stack([record[key] for record in records])
    return batch


def _check_shares(
    batch_size: int, process_index: int, process_count: int, drop_remainder: bool
) -> None:
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size = {batch_size} cannot be shared by {process_count} processes; "
            "give a positive multiple of the number of processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index = {process_index}; allowed 0..{process_count - 1}")
    if process_count > 1 and not drop_remainder:
        raise ValueError(
            f"drop_remainder = False with {process_count} processes: the last batch cannot be "
            "shared equally; use one process or drop the remainder"
        )


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed = {seed}; allowed 0..{MAX_SEED}")


def _check_weights(
    sources: Mapping[tuple[int, int], Source], weights: Mapping[tuple[int, int], float] | None
) -> list[float]:
    """Return the weights in the order of the sizes."""
    if not sources:
        raise ValueError("there are no buckets; give at least one source")
    if weights is None:
        return [float(len(sources[size])) for size in sorted(sources)]
    if weights.keys() != sources.keys():
        missing, extra = sorted(sources.keys() - weights), sorted(weights.keys() - sources)
        raise ValueError(
            f"weights of other buckets: {len(missing)} missing {missing[:5]}, {len(extra)} extra "
            f"{extra[:5]}"
        )
    for size, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"weight {weight} of bucket {size}; give more than 0, or leave it out")
    return [float(weights[size]) for size in sorted(sources)]


def _check_counts(
    num_records: int, batch_size: int, num_epochs: int | None, drop_remainder: bool
) -> None:
    if num_records < 1:
        raise ValueError("the source has no records")
    if num_epochs is None:
        if not drop_remainder:
            raise ValueError("drop_remainder = False needs num_epochs: an endless run has no rest")
        return
    if num_epochs < 1:
        raise ValueError(f"num_epochs = {num_epochs}; give at least 1, or None for no end")
    if drop_remainder and num_records * num_epochs < batch_size:
        raise ValueError(
            f"{num_records} records x {num_epochs} epochs do not fill one batch of {batch_size}; "
            "lower batch_size, add epochs or keep the remainder"
        )


def _check_threads(num_threads: int, prefetch: int) -> None:
    if num_threads < 0 or prefetch < max(num_threads, 1):
        raise ValueError(
            f"num_threads = {num_threads}, prefetch = {prefetch}; "
            "give 0 threads or more, and at least one batch of prefetch for each"
        )


def _check_record(name: str, record: Any) -> None:
    if not isinstance(record, dict) or not record:
        raise ValueError(f"records of {name} are {type(record).__name__}; expected filled dicts")
    for key, value in record.items():
        if np.asarray(value).dtype == object:
            raise ValueError(f"field {key!r} of {name} is {type(value).__name__}; expected numbers")
