"""What a prompt may be, and prompts as bytes: what a model with an encoder of its own reads."""

import unicodedata
from collections.abc import Sequence

import numpy as np

from maskgil_jax.text.base import Tokenized

_SHOWN = 40


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Return prompts without the blanks around them, in Unicode's composed form.

    Raises:
        ValueError: if a single string is given, or a prompt is no text, empty, or cannot be written
            as UTF-8 (as what comes from bytes that were none).
    """
    if isinstance(prompts, str | bytes):
        raise ValueError(f"prompts {show(prompts)} is a single one; give a list, [{show(prompts)}]")
    checked = []
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {number} is {type(prompt).__name__}, not str")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt {number} {show(prompt)} has no UTF-8 form at character {error.start}: its "
                "bytes were no UTF-8; save the text as UTF-8"
            ) from error
        text = unicodedata.normalize("NFC", prompt).strip()
        if not text:
            raise ValueError(f"prompt {number} {show(prompt)} is empty; say what the picture shows")
        checked.append(text)
    return checked


def encode_bytes(prompts: Sequence[str], max_length: int) -> Tokenized:
    """Turn prompts into the bytes of their UTF-8 form.

    Args:
        prompts: texts, none empty.
        max_length: bytes a prompt may have, and to which it is padded.

    Raises:
        ValueError: as `check_prompts`; or if a prompt is longer, so that its end would not be seen.
    """
    ids = np.zeros((len(prompts), max_length), np.int32)
    lengths = np.zeros(len(prompts), np.int32)
    for number, text in enumerate(check_prompts(prompts)):
        data = text.encode()
        if len(data) > max_length:
            raise ValueError(
                f"prompt {number} {show(text)} has {len(data):,} bytes; the model reads at most "
                f"{max_length}: shorten it"
            )
        ids[number, : len(data)] = np.frombuffer(data, np.uint8)
        lengths[number] = len(data)
    return Tokenized(ids, lengths)


def show(prompt: str | bytes) -> str:
    """Return a prompt as it may be printed, cut where it is long."""
    return repr(prompt) if len(prompt) <= _SHOWN else repr(prompt[:_SHOWN])[:-1] + "…'"
