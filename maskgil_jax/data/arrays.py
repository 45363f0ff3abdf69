"""Arrays in memory (or memory-mapped) as a source: cached tokens, synthetic records."""

import operator
from collections.abc import Mapping
from typing import SupportsIndex

import numpy as np


class ArraySource:
    """Give row i of every array as record i, for example `{"tokens": [gh gw], "label": []}`.

    Args:
      arrays: name → array [n, …], all of the same n; memory-mapped ones are read as needed.
      name: what the data is, for messages and for the check when a run resumes.
      num_classes: with it, every `label` must lie in 0..num_classes - 1.

    Raises:
      ValueError: no arrays, no rows, differing numbers of rows, Python objects inside, or labels
        that are missing or out of range.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        *,
        name: str = "arrays",
        num_classes: int | None = None,
    ):
        self._arrays = {key: np.asanyarray(array) for key, array in arrays.items()}
        self._length = _check_rows(self._arrays)
        if num_classes is not None:
            _check_labels(self._arrays, num_classes)
        self.name = name
        self.num_classes = num_classes

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        row = operator.index(index)
        return {key: np.asarray(array[row]) for key, array in self._arrays.items()}

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k}: {a.dtype} {a.shape}" for k, a in self._arrays.items())
        return f"ArraySource({self.name!r}, {shapes})"


def _check_rows(arrays: dict[str, np.ndarray]) -> int:
    if not arrays:
        raise ValueError("no arrays; give at least one, such as {'tokens': ..., 'label': ...}")
    for key, array in arrays.items():
        if array.ndim == 0 or array.dtype == object:
            raise ValueError(
                f"array {key!r} has shape {array.shape} and dtype {array.dtype}; "
                "expected numbers with one row per record"
            )
    rows = {key: len(array) for key, array in arrays.items()}
    if len(set(rows.values())) > 1 or 0 in rows.values():
        raise ValueError(f"arrays have {rows} rows; all must have the same number, at least one")
    return next(iter(rows.values()))


def _check_labels(arrays: dict[str, np.ndarray], num_classes: int) -> None:
    labels = arrays.get("label")
    if labels is None:
        raise ValueError(f"num_classes = {num_classes} but no 'label' among {sorted(arrays)}")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise ValueError(
            f"{wrong.size} labels out of range, first {labels[wrong[0]]} in row {wrong[0]}; "
            f"allowed 0..{num_classes - 1}"
        )
