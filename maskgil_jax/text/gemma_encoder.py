"""Gemma behind the interface of text encoders."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maskgil_jax.text.base import Tokenized, check_tokens
from maskgil_jax.text.gemma import Gemma, GemmaConfig, check_dtype, take_layers
from maskgil_jax.text.tokenization import PromptTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GemmaEncoder:
    """A frozen Gemma with its tokenizer; made by `create`.

    Attributes:
        name: what it is called.
        config: sizes of the whole model.
        module: what is computed of it.
        params: parameters of the module, in the type of its computation.
        tokenizer: puts `bos_id` before every prompt.
        fingerprint: SHA-256 of weights, tokenizer and settings.
    """

    jittable: ClassVar[bool] = True

    name: str
    config: GemmaConfig
    module: Gemma
    params: Any = dataclasses.field(repr=False)
    tokenizer: PromptTokenizer = dataclasses.field(repr=False)
    fingerprint: str

    @classmethod
    def create(
        cls,
        config: GemmaConfig,
        params: Mapping[str, Any],
        tokenizer: PromptTokenizer,
        *,
        name: str,
        hashes: Mapping[str, str],
        hidden_layer: int = -1,
        dtype: str | None = None,
    ) -> "GemmaEncoder":
        """Return an encoder that holds no more parameters than its hidden layer needs.

        Args:
            config: sizes of the model.
            params: its parameters, whole, as NumPy arrays.
            tokenizer: that belongs to it.
            name: what it is called.
            hashes: SHA-256 of what parameters and tokenizer were read from, by name.
            hidden_layer: 0 for the embeddings, n for what block n gives, -1 for the last, normed.
            dtype: type of computation and parameters, `float32` or `bfloat16`; as stored if `None`.

        Raises:
            ValueError: no such hidden layer or type, or a tokenizer for longer sequences than the
                model reads.
        """
        dtype = config.param_dtype if dtype is None else dtype
        check_dtype("dtype", dtype)
        if tokenizer.max_length > config.max_positions:
            raise ValueError(
                f"max_length {tokenizer.max_length} is more than the {config.max_positions} tokens "
                "that the model reads"
            )
        depth = config.find_depth(hidden_layer)
        settings = {"hidden_layer": hidden_layer, "max_length": tokenizer.max_length}
        fingerprint = find_fingerprint(config, hashes, **settings, dtype=dtype)
        config = dataclasses.replace(config, param_dtype=dtype)
        kept = take_layers(params, config, depth)
        return cls(
            name=name,
            config=config,
            module=config.make_module(hidden_layer=depth, dtype=dtype),
            params=jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), kept),
            tokenizer=tokenizer,
            fingerprint=fingerprint,
        )

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.config.width

    @property
    def max_length(self) -> int:
        """Tokens to which prompts are padded, and at which they are cut."""
        return self.tokenizer.max_length

    def tokenize(self, prompts: Sequence[str]) -> Tokenized:
        """Turn b prompts into int32 ids [b max_length] and lengths [b], `bos_id` first.

        Prompts of more tokens are cut at the end, and the result tells which.

        Raises:
            ValueError: a single string, no prompts, or one that is no string or not valid Unicode.
        """
        return self.tokenizer(prompts)

    def encode(
        self, ids: Int[Array | np.ndarray, "b s"], lengths: Int[Array | np.ndarray, " b"]
    ) -> Float[Array, "b s t"]:
        """Turn ids into features in the type of the computation, zero where padded.

        Inside a program of the caller's, `apply` spares it a copy of the parameters.

        Raises:
            ValueError: ids or lengths are out of range, or of other shapes or types.
        """
        return self.apply(self.params, ids, lengths)

    def apply(
        self,
        params: Any,
        ids: Int[Array | np.ndarray, "b s"],
        lengths: Int[Array | np.ndarray, " b"],
    ) -> Float[Array, "b s t"]:
        """Do as `encode`, with parameters that a program takes as an argument.

        Raises:
            ValueError: as `encode`.
        """
        check_tokens(
            ids,
            lengths,
            vocab_size=self.config.vocab_size,
            max_length=self.config.max_positions,
        )
        return _apply(self.module, params, ids, lengths)


def find_fingerprint(
    config: GemmaConfig,
    hashes: Mapping[str, str],
    *,
    max_length: int,
    hidden_layer: int,
    dtype: str,
) -> str:
    """Return the fingerprint of the encoder of these sizes, files and settings.

    Args:
        config: sizes of the model.
        hashes: SHA-256 of what parameters and tokenizer are read from, by name.
        max_length: tokens at which prompts are cut.
        hidden_layer: as `GemmaEncoder.create` takes it.
        dtype: type of the computation.

    Raises:
        ValueError: no such hidden layer.
    """
    config = dataclasses.replace(config, param_dtype=dtype)
    settings = [
        *(config.family, config.to_dict(), dict(hashes)),
        *(config.find_depth(hidden_layer), dtype, max_length),
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@functools.partial(jax.jit, static_argnums=0)
def _apply(module, params, ids, lengths):
    return module.apply({"params": params}, ids, lengths)
