"""Any other text encoder, T5 or CLIP's say, as `transformers` computes it in torch.

Needs the extras `text` and `clip`, whose libraries are imported when weights are loaded. Features
leave as NumPy arrays, so nothing of it can be part of a JAX program.

LlamaGen pads T5 features on the left and masks them; here they are padded on the right and come
with lengths, as all others do. The features of a caption's tokens are the same: T5's position
biases are relative, and padding is not attended to.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Float32, Int
from safetensors import SafetensorError

from maskgil_jax.text.base import Tokenized, check_tokens, is_traced
from maskgil_jax.text.gemma import MODEL_TYPES, check_dtype
from maskgil_jax.text.tokenization import TOKENIZER_FILE, PromptTokenizer

_NO_TRANSFORMERS = (
    'this text encoder needs transformers and torch: pip install "maskgil_jax[text,clip]"'
)
_LAYOUT = (
    f"config.json, {TOKENIZER_FILE}, and model.safetensors (or its shards) or pytorch_model.bin, "
    "as in the repository google/flan-t5-xl"
)
# In the order in which transformers looks for them; an index names its shards.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TransformersEncoder:
    """A text encoder of `transformers` with its tokenizer; made by `from_pretrained`.

    Attributes:
        name: what it is called.
        path: the directory that it was loaded from.
        model: gives `last_hidden_state`.
        tokenizer: as its file says.
        dtype: type in which torch computes.
        hidden_layer: index into transformers' `hidden_states`, or -1 for `last_hidden_state`.
    """

    jittable: ClassVar[bool] = False

    name: str
    path: pathlib.Path
    model: Any = dataclasses.field(repr=False)
    tokenizer: PromptTokenizer = dataclasses.field(repr=False)
    dtype: str = "float32"
    hidden_layer: int = -1

    @classmethod
    def from_pretrained(
        cls,
        path: os.PathLike | str,
        *,
        max_length: int = 120,
        hidden_layer: int = -1,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> "TransformersEncoder":
        """Load an encoder from a directory in the layout of Hugging Face; nothing is downloaded.

        Args:
            path: the directory.
            max_length: tokens of every row, those that the tokenizer adds included.
            hidden_layer: index into transformers' `hidden_states`, 0 the embeddings; -1 for
                `last_hidden_state`.
            dtype: type in which torch computes, `float32` or `bfloat16`; features are float32.
            device: where torch computes, such as "cpu" or "cuda:0".

        Raises:
            FileNotFoundError: no such directory, or no tokenizer in it.
            ValueError: another model, something missing or unreadable in it, a device that is not
                there, or settings that do not suit it.
            ImportError: `transformers`, torch or `tokenizers` is not installed.
        """
        try:
            import torch
            from transformers import AutoModelForTextEncoding, CLIPTextModel
        except ImportError as error:
            raise ImportError(_NO_TRANSFORMERS) from error

        check_dtype("dtype", dtype)
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"torch has no device {device!r} here: {error}") from error
        path = pathlib.Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"no directory {path}; give one that holds {_LAYOUT}")
        kind = read_model_type(path)
        if kind in MODEL_TYPES:
            raise ValueError(
                f"{path} holds a {kind}, which is computed in JAX; convert it with "
                "tools/convert_checkpoint.py, and give the directory that it writes"
            )
        maker: Any = CLIPTextModel if kind == "clip" else AutoModelForTextEncoding
        try:
            model, found = maker.from_pretrained(
                path, dtype=dtype, output_loading_info=True, local_files_only=True
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"{path} is no text encoder that transformers knows: {error}\nExpected {_LAYOUT}"
            ) from error
        if missing := found["missing_keys"]:
            raise ValueError(
                f"the weights in {path} lack {len(missing)} tensors of the model that config.json "
                f"describes, such as {min(missing)}; the library would take random ones"
            )
        config = model.config
        count = config.num_hidden_layers
        if isinstance(hidden_layer, bool) or not -1 <= hidden_layer <= count:
            raise ValueError(
                f"hidden_layer {hidden_layer} is out of range; allowed: 0 to {count}, or -1"
            )
        # T5 knows only relative positions.
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and max_length > longest:
            raise ValueError(
                f"max_length {max_length} is more than the {longest} tokens that the model reads"
            )
        tokenizer = PromptTokenizer.from_file(
            path / TOKENIZER_FILE,
            max_length=max_length,
            vocab_size=config.vocab_size,
            pad_id=config.pad_token_id or 0,
        )
        return cls(
            name=path.name,
            path=path,
            model=model.eval().requires_grad_(False).to(device),
            tokenizer=tokenizer,
            dtype=dtype,
            hidden_layer=hidden_layer,
        )

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.model.config.hidden_size

    @property
    def max_length(self) -> int:
        """Tokens to which prompts are padded, and at which they are cut."""
        return self.tokenizer.max_length

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of weights, tokenizer and settings, see `find_fingerprint`."""
        return find_fingerprint(
            self.path,
            max_length=self.max_length,
            hidden_layer=self.hidden_layer,
            dtype=self.dtype,
        )

    def tokenize(self, prompts: Sequence[str]) -> Tokenized:
        """Turn b prompts into int32 ids [b max_length] and lengths [b].

        The tokenizer begins and ends them as its file says. Prompts of more tokens are cut before
        that end, and the result tells which.

        Raises:
            ValueError: a single string, no prompts, or one that is no string or not valid Unicode.
        """
        return self.tokenizer(prompts)

    def encode(
        self, ids: Int[Array | np.ndarray, "b s"], lengths: Int[Array | np.ndarray, " b"]
    ) -> Float32[np.ndarray, "b s t"]:
        """Turn ids into float32 features, zero where padded.

        Raises:
            ValueError: ids or lengths are out of range, or of other shapes or types; or JAX is
                tracing a program, of which torch cannot be part.
        """
        if is_traced(ids) or is_traced(lengths):
            raise ValueError(
                f"{self.name} computes in torch and cannot be part of a JAX program; encode the "
                "captions before it, or use an encoder that is `jittable`"
            )
        import torch

        config = self.model.config
        longest = getattr(config, "max_position_embeddings", None) or np.shape(ids)[-1]
        check_tokens(ids, lengths, vocab_size=config.vocab_size, max_length=longest)
        ids, lengths = np.asarray(ids), np.asarray(lengths)
        valid = np.arange(ids.shape[1]) < lengths[:, None]
        # A sequence of nothing attends to its first token, and is made zero below.
        attended = valid | (np.arange(ids.shape[1]) == 0)
        with torch.inference_mode():
            output = self.model(
                input_ids=torch.from_numpy(ids.astype(np.int64)).to(self.model.device),
                attention_mask=torch.from_numpy(attended.astype(np.int64)).to(self.model.device),
                output_hidden_states=self.hidden_layer >= 0,
            )
        chosen = output.last_hidden_state
        if self.hidden_layer >= 0:
            chosen = output.hidden_states[self.hidden_layer]
        return np.where(valid[..., None], chosen.float().cpu().numpy(), np.float32(0))


def read_model_type(path: pathlib.Path) -> str:
    """Return the model type that the `config.json` of a Hugging Face directory names.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it names none.
    """
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; give a directory that holds {_LAYOUT}")
    try:
        kind = json.loads(file.read_bytes())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} names no model_type; it is no model of Hugging Face") from error
    return str(kind)


def find_fingerprint(
    path: os.PathLike | str, *, max_length: int, hidden_layer: int, dtype: str
) -> str:
    """Return the fingerprint of the encoder in a directory, under some settings.

    All of its weights are read, but neither torch nor transformers is needed. The same weights in
    other files, in other shards say, have another fingerprint.

    Args:
        path: the directory.
        max_length, hidden_layer, dtype: as `TransformersEncoder.from_pretrained` takes them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file of JSON is damaged, or `config.json` names no model.
    """
    path = pathlib.Path(path)
    read_model_type(path)
    fields = json.loads((path / "config.json").read_bytes())
    for name in ("_name_or_path", "transformers_version"):
        fields.pop(name, None)
    settings = [fields, max_length, hidden_layer, dtype]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in (TOKENIZER_FILE, *_find_weights(path)):
        with open(path / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _find_weights(path: pathlib.Path) -> list[str]:
    """Return the names of the files that hold the weights."""
    there = [name for name in _WEIGHTS if (path / name).is_file()]
    if not there:
        raise FileNotFoundError(f"{path} holds no weights; give a directory that holds {_LAYOUT}")
    first = there[0]
    if not first.endswith(".json"):
        return [first]
    try:
        return sorted(set(json.loads((path / first).read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / first} names no files of weights: {error}") from error
