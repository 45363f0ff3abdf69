"""Chameleon: a causal language model whose vocabulary holds the codes of images too.

It reads ids of a vocabulary, not a grid of codes, so it is no `TokenModelConfig`. Lumina-mGPT is
such a model that was trained to draw images after a prompt; `CachedChameleon` decodes them, in
terms of codes and ends of rows. How an image is spelled is `text/image_protocol.py`'s to know.

Reference: Chameleon Team, 2024, "Chameleon: Mixed-Modal Early-Fusion Foundation Models"; Liu et
al., 2024, "Lumina-mGPT"; `modeling_chameleon.py` of Hugging Face transformers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskgil_jax.models.cached import Cache, CachedTransformer, look_back
from maskgil_jax.models.conditioning import Embedding
from maskgil_jax.models.rope import rope_1d
from maskgil_jax.models.transformer import (
    DTYPES,
    Transformer,
    TransformerConfig,
    check_choices,
    weight_init,
)

# The norms of queries and keys have it in transformers, whatever the others have.
_NORM_EPS = 1e-5
# Ours -> Hugging Face's.
_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
}
# Option of a `config.json` -> the values that this implementation has.
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu"),
    "swin_norm": (None, False),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "tie_word_embeddings": (None, False),
    "rope_scaling": (None,),
    "rms_norm_eps": (None, _NORM_EPS),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChameleonConfig(TransformerConfig):
    """Sizes of a Chameleon.

    Attributes:
        vocab_size: number of ids.
        num_kv_heads: heads of keys and values; it divides `num_heads`.
        max_positions: tokens of the longest sequence.
        rope_base: base of the rotary frequencies.
        param_dtype: type in which the parameters are stored.
    """

    family: ClassVar[str] = "chameleon"
    qk_norms: ClassVar[tuple[str, ...]] = ("heads",)
    rope_pairs: ClassVar[str] = "halves"

    vocab_size: int
    num_kv_heads: int
    max_positions: int = 4096
    rope_base: float = 10000.0
    qk_norm: str = "heads"
    param_dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        for name in ("vocab_size", "num_kv_heads", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} / num_kv_heads {self.num_kv_heads} must be a whole "
                "number"
            )
        if not self.rope_base > 0:
            raise ValueError(f"rope_base {self.rope_base} must be more than 0")
        check_choices(self, {"param_dtype": DTYPES, "post_norm": ("none",)})

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; see the base."""
        return self.num_kv_heads

    @classmethod
    def from_hugging_face(
        cls, settings: Mapping[str, Any], *, param_dtype: str = "float32"
    ) -> "ChameleonConfig":
        """Read the `config.json` of a repository such as Alpha-VLLM/Lumina-mGPT-7B-768.

        Args:
            settings: the parsed file.
            param_dtype: as the attribute, and the type of the computation; the file's own word on
                it is not always true.

        Raises:
            ValueError: another model type, a size that is missing or no valid one, or an option
                that this implementation does not have.
        """
        if settings.get("model_type") != cls.family:
            raise ValueError(
                f"config.json has model_type {settings.get('model_type')!r}; allowed: "
                f"{cls.family!r}"
            )
        if missing := [name for name in _SIZES.values() if name not in settings]:
            raise ValueError(f"config.json of a {cls.family} model lacks {', '.join(missing)}")
        rope = settings.get("rope_parameters") or {}
        _check_options(settings, rope)
        fields: dict[str, Any] = {}
        for ours, name in _SIZES.items():
            fields[ours] = value = settings[name]
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"config.json has {name} {value!r}, which must be a whole number")
        base = rope.get("rope_theta", settings.get("rope_theta", 10000.0))
        if isinstance(base, bool) or not isinstance(base, int | float):
            raise ValueError(f"config.json has rope_theta {base!r}, which must be a number")
        return cls(**fields, rope_base=float(base), param_dtype=param_dtype, dtype=param_dtype)

    def to_hugging_face(self) -> dict[str, Any]:
        """Return the `config.json` of the same model, for transformers."""
        return {theirs: getattr(self, ours) for ours, theirs in _SIZES.items()} | {
            "architectures": ["ChameleonForConditionalGeneration"],
            "model_type": self.family,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_base,
            "attention_bias": False,
            "swin_norm": False,
            "tie_word_embeddings": False,
            # Which ids are codes the tokenizer beside it tells; transformers wants a map all the
            # same, and forbids the ids that it names.
            "vocabulary_map": {},
            "dtype": self.param_dtype,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON-friendly types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ChameleonConfig":
        """Build from `to_dict`'s result.

        Raises:
            ValueError: if a field is unknown, missing or not valid.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if set(fields) - known or required - set(fields):
            raise ValueError(
                f"{cls.__name__}: unknown fields {sorted(set(fields) - known)}, missing fields "
                f"{sorted(required - set(fields))}; allowed: {', '.join(sorted(known))}"
            )
        return cls(**fields)

    def make_module(self) -> "Chameleon":
        """Return the Flax module."""
        return Chameleon(self)

    def abstract_params(self) -> Any:
        """Return the parameters' shapes and types, boxed with their logical axes."""
        ids = jax.ShapeDtypeStruct((1, 1), "int32")
        return jax.eval_shape(self.make_module().init, jax.random.key(0), ids)["params"]

    def make_cached(self, params: Any, stream_ids: np.ndarray, prefix_length: int) -> Any:
        """Return the model for decoding images, see `CachedChameleon`."""
        return CachedChameleon.take_apart(self, params, stream_ids, prefix_length)


def _check_options(settings: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """Refuse what a `config.json` may ask for and this implementation does not have."""
    wrong = [
        f"{name} is {settings[name]!r}, allowed: {', '.join(map(repr, values))}"
        for name, values in _OPTIONS.items()
        if settings.get(name) not in values
    ]
    if rope.get("rope_type", "default") != "default":
        wrong.append(f"rope_type is {rope['rope_type']!r}, allowed: 'default'")
    if wrong:
        raise ValueError(f"config.json asks for what is not implemented: {'; '.join(wrong)}")


PUBLISHED = {
    "facebook/chameleon-7b": ChameleonConfig(
        vocab_size=65536,
        num_layers=32,
        width=4096,
        mlp_width=11008,
        num_heads=32,
        num_kv_heads=32,
        dtype="bfloat16",
        param_dtype="bfloat16",
    ),
}


class VocabularyHead(nn.Module):
    """The output layer, `features → logits` over the vocabulary in float32."""

    config: ChameleonConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b l e"]) -> Float[Array, "b l v"]:
        """Return the logits of all ids."""
        cfg = self.config
        shape, stored = (cfg.width, cfg.vocab_size), jnp.dtype(cfg.param_dtype)
        kernel = self.param("kernel", weight_init("embed", "vocab"), shape, stored)
        return _project(x, jnp.asarray(kernel))


def _project(x: Float[Array, "b l e"], kernel: Float[Array, "e v"]) -> Float[Array, "b l v"]:
    return jnp.einsum("ble,ev->blv", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


class Chameleon(nn.Module):
    """The language model."""

    config: ChameleonConfig

    def setup(self):
        """Create the submodules."""
        cfg = self.config
        self.embed = Embedding(cfg.vocab_size, cfg.width, cfg.param_dtype)
        self.transformer = Transformer(cfg)
        self.head = VocabularyHead(cfg)

    def __call__(
        self, ids: Int[Array | np.ndarray, "b l"], train: bool = False
    ) -> Float[Array, "b l v"]:
        """Return float32 logits [b, l, vocabulary] of the id behind every one given.

        Args:
            ids: in 0…vocabulary - 1.
            train: whether dropout is on (needs an rng named `dropout`).
        """
        length = ids.shape[1]
        x = nn.with_logical_constraint(self.embed(ids), ("batch", "length", "act_embed"))
        table = rope_1d(length, self.config.head_dim, self.config.rope_base)
        return self.head(self.transformer(x, table, look_back(0, length, length, 0), train=train))


@flax.struct.dataclass
class Prefix:
    """What stands before an image's codes: the prompt, and how the image begins.

    Attributes:
        ids: int32 [b p], padded in front with any ids.
        lengths: int32 [b], how many of them count, the last ones.
    """

    ids: Any
    lengths: Any


def without_prompt(prefix: Prefix, count: int) -> Prefix:
    """Return the prefix that means "no prompt": of each image no more than the last `count` ids.

    The positions stay those with the prompt; attention only knows how far apart two tokens are.
    """
    lengths = jnp.full_like(jnp.asarray(prefix.lengths), count)
    return dataclasses.replace(prefix, lengths=lengths)


@dataclasses.dataclass(frozen=True)
class CachedChameleon:
    """Chameleon for decoding an image: one token of its stream in, logits of the next code out.

    The tokens of the stream are codes 0…K-1, and K where a row ends.

    Attributes:
        config: sizes.
        transformer: parameters of the transformer.
        codes: those of the head for the K codes, [e k].
        embedding: the table of the vocabulary.
        rope: rotary table of all positions.
        stream_ids: int32 [k + 1], id of every token of the stream.
        prefix_length: ids before the first code, padding included.
    """

    config: ChameleonConfig
    transformer: CachedTransformer
    codes: Any
    embedding: Any
    rope: np.ndarray
    stream_ids: np.ndarray
    prefix_length: int

    @classmethod
    def take_apart(
        cls, config: ChameleonConfig, params: Any, stream_ids: np.ndarray, prefix_length: int
    ) -> "CachedChameleon":
        """Return it for the parameters of the model; see the attributes.

        Raises:
            ValueError: if an id is outside the vocabulary.
        """
        stream_ids = np.asarray(stream_ids, np.int32)
        if stream_ids.min() < 0 or stream_ids.max() >= config.vocab_size:
            raise ValueError(
                f"the codes have ids from {stream_ids.min()} to {stream_ids.max()}, but the model "
                f"knows 0 to {config.vocab_size - 1}; vocabulary and model do not belong together"
            )
        return cls(
            config=config,
            transformer=CachedTransformer.take_apart(config, params["transformer"]),
            codes=jnp.asarray(params["head"]["kernel"])[:, stream_ids[:-1]],
            embedding=params["embed"]["embedding"],
            rope=rope_1d(config.max_positions, config.head_dim, config.rope_base),
            stream_ids=stream_ids,
            prefix_length=prefix_length,
        )

    def start(self, prefix: Prefix, length: int) -> tuple[Float[Array, "b v"], Cache]:
        """Read the prefix: return the logits of the first code and a cache.

        Args:
            prefix: as many ids as `prefix_length`.
            length: tokens of the stream that the cache is to hold.

        Raises:
            ValueError: if the prefix has another length, or both together have more positions than
                the model.
        """
        count = self.prefix_length
        if prefix.ids.shape[1] != count:
            raise ValueError(f"the prefix has {prefix.ids.shape[1]} ids; expected: {count}")
        self._check_length(count + length)
        lengths = jnp.asarray(prefix.lengths)
        caches = self.transformer.empty(len(lengths), count + length)
        mask = look_back(0, count, count, count, lengths)
        x = self._embed(prefix.ids)
        x, caches = self.transformer.extend(x, self.rope[:count], mask, caches, 0)
        return self._logits(x[:, -1:]), Cache(caches, lengths)

    def step(
        self, tokens: Int[Array, " b"], index: Int[Array, ""] | int, live: int, cache: Cache
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Read one more token of the stream; as `CachedLlamaGen.step`.

        Args:
            tokens: 0…K at place `index` of the stream.
            index: 0…, may be traced.
            live: positions of the cache to read, the prefix included; at least as many as are
                filled then.
            cache: of all tokens before.

        Raises:
            ValueError: if more positions are read than the model has.
        """
        self._check_length(live)
        position = self.prefix_length + index
        x = self._embed(jnp.asarray(self.stream_ids)[tokens][:, None])
        mask = look_back(position, 1, live, self.prefix_length, cache.lengths)
        rope = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.rope), position, 1)
        x, caches = self.transformer.extend(x, rope, mask, cache.layers, position)
        return self._logits(x), Cache(caches, cache.lengths)

    def _check_length(self, total: int) -> None:
        count, most = self.prefix_length, self.config.max_positions
        if total > most:
            raise ValueError(
                f"{count} ids of prompts and {total - count} tokens of the image are {total}; the "
                f"model has {most} positions: shorten the prompts, or make a smaller image"
            )

    def _embed(self, ids: Int[Array | np.ndarray, "b l"]) -> Float[Array, "b l e"]:
        return jnp.asarray(self.embedding)[jnp.asarray(ids)]

    def _logits(self, x: Float[Array, "b 1 e"]) -> Float[Array, "b v"]:
        return _project(x, self.codes)[:, 0]
