"""Prompts to token ids, by the `tokenizers` library and a `tokenizer.json` of Hugging Face.

Needs the extra `text`; the library is imported when a file is read.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from maskgil_jax.text.base import Tokenized
from maskgil_jax.text.prompts import check_texts

TOKENIZER_FILE = "tokenizer.json"
_NO_TOKENIZERS = 'text encoders need tokenizers: pip install "maskgil_jax[text]"'


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PromptTokenizer:
    """A tokenizer that pads and cuts to one length; made by `from_file`.

    Attributes:
        library: `tokenizers.Tokenizer`, set to cut at `max_length` and not to pad.
        max_length: tokens of every row.
        pad_id: id of the padding.
    """

    library: Any
    max_length: int
    pad_id: int

    @classmethod
    def from_file(
        cls,
        path: os.PathLike | str,
        *,
        max_length: int,
        vocab_size: int,
        pad_id: int,
        bos_id: int | None = None,
    ) -> "PromptTokenizer":
        """Read a `tokenizer.json`; what it says of padding and of cutting is not taken over.

        Args:
            path: the file.
            max_length: tokens of every row, those that the tokenizer adds included.
            vocab_size: number of tokens that the model knows.
            pad_id: id of the padding.
            bos_id: a token that is put before every prompt, and nothing else; by default the
                tokenizer adds what its file says.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no tokenizer, has ids that the model does not know, lacks `bos_id`, or
                `max_length` leaves no room for a token of the prompt.
            ImportError: `tokenizers` is not installed.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(_NO_TOKENIZERS) from error

        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; copy {TOKENIZER_FILE} of the model's repository there"
            )
        try:
            library = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        # The library raises plain `Exception` for a file that it cannot read.
        except Exception as error:
            raise ValueError(f"{path} is no tokenizer of Hugging Face: {error}") from error
        highest = max(library.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 <= highest < vocab_size:
            raise ValueError(
                f"{path} has ids up to {highest}, but the model knows {vocab_size} tokens, 0 to "
                f"{vocab_size - 1}; they do not belong together"
            )
        if bos_id is not None:
            library.post_processor = _prepend(library, path, bos_id)
        added = library.num_special_tokens_to_add(is_pair=False)
        if max_length <= added:
            raise ValueError(
                f"max_length {max_length} leaves no room beside the {added} tokens that begin and "
                f"end every prompt; give at least {added + 1}"
            )
        library.no_padding()
        library.enable_truncation(max_length)
        return cls(library=library, max_length=max_length, pad_id=pad_id)

    def __call__(self, prompts: Sequence[str]) -> Tokenized:
        """Turn prompts into int32 ids [b max_length] and lengths [b].

        Prompts of more tokens are cut at the end, and the result tells which.

        Raises:
            ValueError: a single string, no prompts, or one that is no text.
        """
        prompts = check_texts(prompts)
        rows = self.library.encode_batch(prompts)
        ids = np.full((len(rows), self.max_length), self.pad_id, np.int32)
        for row, found in zip(ids, rows, strict=True):
            row[: len(found.ids)] = found.ids
        lengths = np.array([len(found.ids) for found in rows], np.int32)
        return Tokenized(ids, lengths, np.array([bool(found.overflowing) for found in rows]))


def _prepend(library: Any, path: pathlib.Path, bos_id: int) -> Any:
    """Return the post-processor that puts one token before every prompt."""
    from tokenizers.processors import TemplateProcessing

    token = library.id_to_token(bos_id)
    if token is None:
        raise ValueError(
            f"{path} has no token {bos_id}, which the model expects before every prompt; it is the "
            "tokenizer of another model"
        )
    return TemplateProcessing(single=[token, "$A"], special_tokens=[(token, bos_id)])
