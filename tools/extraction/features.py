"""What a text encoder makes of the texts of records, in batches that all have one shape."""

import collections
import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from maskgil_jax.data.token_dataset import FeaturedRecord, TokenRecord

# Texts → int32 ids [b s] padded to one length, their lengths [b], and whether each was cut [b].
Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, ...]]
# int32 ids [b s] and lengths [b] → features [b s t].
EncodeTexts = Callable[[np.ndarray, np.ndarray], Any]


class TextReader:
    """Reads the texts of records.

    Args:
      tokenize: turns texts into ids.
      encode: turns ids, always those of `batch_size` texts, into features.
      batch_size: texts at a time.
      dtype: in which features are kept.

    Attributes:
      count: texts that were read.
      cut: how many of them had more tokens than are kept.
    """

    def __init__(
        self, tokenize: Tokenize, encode: EncodeTexts, *, batch_size: int, dtype: np.dtype
    ):
        self._tokenize, self._encode = tokenize, encode
        self._batch_size, self._dtype = batch_size, dtype
        self.count = self.cut = 0

    def add_features(
        self, records: Generator[TokenRecord, None, None]
    ) -> Generator[TokenRecord, None, None]:
        """Yield the records in order, each with the features of all its texts."""
        texts: collections.deque[str] = collections.deque()
        waiting: collections.deque[TokenRecord] = collections.deque()
        features: collections.deque[np.ndarray] = collections.deque()
        with contextlib.closing(records):
            for record in records:
                waiting.append(record)
                texts.extend(record.captions)
                while len(texts) >= self._batch_size:
                    features.extend(self._read([texts.popleft() for _ in range(self._batch_size)]))
                yield from _take_whole(waiting, features)
            if texts:
                features.extend(self._read(list(texts)))
            yield from _take_whole(waiting, features)

    def _read(self, texts: list[str]) -> list[np.ndarray]:
        """Return the features [s t] of each text, without padding."""
        filled = texts + texts[-1:] * (self._batch_size - len(texts))
        ids, lengths, cut = self._tokenize(filled)
        found = np.asarray(self._encode(ids, lengths))
        self.count += len(texts)
        self.cut += int(np.sum(cut[: len(texts)]))
        # Copied: a view would keep the whole batch.
        return [found[i, : lengths[i]].astype(self._dtype, copy=True) for i in range(len(texts))]


def _take_whole(
    waiting: collections.deque[TokenRecord], features: collections.deque[np.ndarray]
) -> Iterator[TokenRecord]:
    """Yield the first records for as long as there are the features of all their texts."""
    while waiting and len(features) >= len(waiting[0].captions):
        record = waiting.popleft()
        yield FeaturedRecord(
            tokens=record.tokens,
            index=record.index,
            label=record.label,
            captions=record.captions,
            features=tuple(features.popleft() for _ in record.captions),
        )
