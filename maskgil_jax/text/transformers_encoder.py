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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TransformersEncoder:
    """A text encoder of `transformers` with its tokenizer; made by `from_pretrained`.

    Attributes:
        name: what it is called.
        model: gives `last_hidden_state`.
        tokenizer: as its file says.
        tokenizer_sha256: of that file.
        hidden_layer: index into transformers' `hidden_states`, or -1 for `last_hidden_state`.
    """

    jittable: ClassVar[bool] = False

    name: str
    model: Any = dataclasses.field(repr=False)
    tokenizer: PromptTokenizer = dataclasses.field(repr=False)
    tokenizer_sha256: str
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
        with open(path / TOKENIZER_FILE, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(
            name=path.name,
            model=model.eval().requires_grad_(False).to(device),
            tokenizer=tokenizer,
            tokenizer_sha256=digest,
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
        """SHA-256 of weights, tokenizer and settings."""
        settings = [self.model.config.model_type, self.tokenizer_sha256, self.max_length]
        settings += [self.hidden_layer, str(self.model.dtype), _describe(self.model.config)]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # As float32, which holds every bfloat16: NumPy has none of its own.
            digest.update(np.ascontiguousarray(tensor.float().cpu().numpy()).data)
        return digest.hexdigest()

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


def _describe(config: Any) -> dict[str, Any]:
    """Return a config without the place it was read from and the library's version."""
    fields = json.loads(config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version"):
        fields.pop(name, None)
    return fields
