"""What text encoders have in common: prompts to token ids, and token ids to features.

Sequences are padded on the right and come with their lengths, which alone tell what is padding: no
id is special. Padding is never attended to, and features there are zeros.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Tokenized(NamedTuple):
    """Prompts as token ids.

    Attributes:
        ids: int32 [b s], s the encoder's `max_length`, padded on the right.
        lengths: int32 [b], tokens of each that count, in 0…s.
        cut: of each, whether it had more than s tokens and lost its end.
    """

    ids: Int[np.ndarray, "b s"]
    lengths: Int[np.ndarray, " b"]
    cut: Bool[np.ndarray, " b"]


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen text encoder.

    Attributes:
        jittable: whether `encode` may be called while JAX traces a program; otherwise it computes
            outside of JAX and returns NumPy arrays.
    """

    jittable: ClassVar[bool]

    @property
    def name(self) -> str:
        """What it is called, for people."""
        ...

    @property
    def width(self) -> int:
        """Channels t of the features."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens s to which prompts are padded, and at which they are cut."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of weights, tokenizer and all settings that features depend on."""
        ...

    def tokenize(self, prompts: Sequence[str]) -> Tokenized:
        """Turn b prompts into ids, right-padded; the result tells which are cut.

        Raises:
            ValueError: a single string, no prompts, or one that is no valid text.
        """
        ...

    def encode(
        self, ids: Int[Array | np.ndarray, "b s"], lengths: Int[Array | np.ndarray, " b"]
    ) -> Float[Array | np.ndarray, "b s t"]:
        """Turn ids into features, zero where padded.

        Raises:
            ValueError: ids or lengths are out of range, or of other shapes or types.
        """
        ...


def check_tokens(ids: Any, lengths: Any, *, vocab_size: int, max_length: int) -> None:
    """Raise a `ValueError` unless ids and lengths are what an encoder reads.

    Values are looked at where they are known, which they are not while JAX traces a program.

    Args:
        ids: should be integers [b s], 0…vocab_size-1, s from 1 to max_length.
        lengths: should be integers [b], 0…s.
        vocab_size: number of tokens that the encoder knows.
        max_length: tokens of the longest sequence that the encoder can read.
    """
    for name, array, rank in (("ids", ids, 2), ("lengths", lengths, 1)):
        kind = getattr(array, "dtype", None)
        if kind is None or not np.issubdtype(kind, np.integer) or array.ndim != rank:
            shape = getattr(array, "shape", "none")
            raise ValueError(
                f"{name} have type {kind or type(array).__name__} and shape {shape}; give integers "
                f"{'[b s]' if rank == 2 else '[b]'}, as `tokenize` does"
            )
    if len(ids) != len(lengths) or not 1 <= ids.shape[1] <= max_length:
        raise ValueError(
            f"ids {ids.shape} and lengths {lengths.shape} must be [b s] and [b], with s from 1 to "
            f"{max_length}"
        )
    if not is_traced(ids):
        _check_range("id", ids, vocab_size - 1)
    if not is_traced(lengths):
        _check_range("length", lengths, ids.shape[1])


def is_traced(array: Any) -> bool:
    """Return whether an array has no values yet, as JAX is tracing a program."""
    return isinstance(array, jax.core.Tracer)


def _check_range(name: str, array: Any, most: int) -> None:
    values = np.asarray(array)
    wrong = values[(values < 0) | (values > most)]
    if wrong.size:
        raise ValueError(f"{name} {int(wrong.flat[0])} is out of range; allowed: 0 to {most}")
