"""What a prompt may be, and prompts as bytes: what a model with an encoder of its own reads."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from maskgil_jax.text.base import Tokenized

_SHOWN = 40


def check_texts(prompts: Sequence[str]) -> list[str]:
    """Return texts as a list.

    Raises:
        ValueError: if a single string or nothing is given, or a prompt is no text, or cannot be
            written as UTF-8 (as what comes from bytes that were none).
    """
    given: Any = prompts
    if isinstance(given, str | bytes):
        raise ValueError(f"prompts {show(given)} is a single text; give a list of them")
    if not len(prompts):
        raise ValueError("there are no prompts; give at least one")
    for number, prompt in enumerate(given):
        if not isinstance(prompt, str):
            kind = type(prompt).__name__
            raise ValueError(f"prompt {number} is a {kind}, {prompt!r:.80}; give texts")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt {number} {show(prompt)} has half a surrogate pair at character "
                f"{error.start}: its bytes were no UTF-8; save the text as UTF-8"
            ) from error
    return list(prompts)


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Return prompts without the blanks around them, in Unicode's composed form.

    Raises:
        ValueError: as `check_texts`, or if a prompt is empty.
    """
    checked = [unicodedata.normalize("NFC", text).strip() for text in check_texts(prompts)]
    if "" in checked:
        number = checked.index("")
        raise ValueError(
            f"prompt {number} {show(prompts[number])} is empty; say what the picture shows"
        )
    return checked


def encode_bytes(prompts: Sequence[str], max_length: int) -> Tokenized:
    """Turn prompts into the bytes of their UTF-8 form; longer ones are cut behind a character.

    Args:
        prompts: texts, none empty.
        max_length: bytes a prompt may have, and to which it is padded.

    Raises:
        ValueError: as `check_prompts`.
    """
    texts = check_prompts(prompts)
    ids, lengths = np.zeros((len(texts), max_length), np.int32), np.zeros(len(texts), np.int32)
    cut = np.zeros(len(texts), bool)
    for number, text in enumerate(texts):
        data = text.encode()
        if len(data) > max_length:
            cut[number] = True
            data = data[:max_length].decode(errors="ignore").encode()
        ids[number, : len(data)] = np.frombuffer(data, np.uint8)
        lengths[number] = len(data)
    return Tokenized(ids, lengths, cut)


def show(prompt: str | bytes) -> str:
    """Return a prompt as it may be printed, cut where it is long."""
    return repr(prompt) if len(prompt) <= _SHOWN else repr(prompt[:_SHOWN])[:-1] + "…'"
