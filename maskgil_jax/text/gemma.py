"""Gemma 1 and 2 as text encoders: the hidden states of a causal language model, without its head.

The layers are scanned, so every parameter under `layers` carries a leading layer axis; of a model
cut at a hidden layer, those beyond it need not be there.

Reference: Gemma (Gemma Team, 2024) and Gemma 2 (Gemma Team, 2024); `modeling_gemma.py` and
`modeling_gemma2.py` of Hugging Face transformers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

DTYPES = ("float32", "bfloat16")
# What Hugging Face calls the generations.
MODEL_TYPES = {"gemma": 1, "gemma2": 2}
_TANH = "gelu_pytorch_tanh"
# Ours -> theirs.
_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_positions": "max_position_embeddings",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """Sizes of a Gemma text model.

    Attributes:
        generation: 1 or 2. The second also normalises the outputs of attention and MLP, and may
            have the soft cap and the window below.
        vocab_size: number of tokens.
        num_layers: number of blocks.
        width: channels e of the residual stream.
        mlp_width: hidden channels f of the gated MLP.
        num_heads: heads h of the queries.
        num_kv_heads: heads k of keys and values, each for h / k heads of the queries.
        head_dim: channels d per head, an even number; h·d need not be the width.
        query_scalar: attention logits are divided by its square root; `head_dim` if `None`.
        attention_softcap: c of c·tanh(logits / c); none if `None`.
        sliding_window: positions that the first, third, … layer looks back on, its own included;
            all if `None`.
        norm_eps: epsilon of every norm.
        rope_base: base of the rotary frequencies.
        max_positions: tokens of the longest sequence.
        bos_id: token before every prompt.
        pad_id: token that fills up.
        param_dtype: type in which the parameters are stored.
    """

    family: ClassVar[str] = "gemma"

    generation: int
    vocab_size: int
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_scalar: int | None = None
    attention_softcap: float | None = None
    sliding_window: int | None = None
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    max_positions: int = 8192
    bos_id: int = 2
    pad_id: int = 0
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.generation not in MODEL_TYPES.values():
            raise ValueError(f"generation {self.generation} is unknown; allowed: 1, 2")
        for name in (*_SIZES, "sliding_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} / num_kv_heads {self.num_kv_heads} must be a whole "
                "number"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be an even number")
        for name in ("norm_eps", "rope_base", "query_scalar", "attention_softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value} must be more than 0")
        if self.generation == 1 and (self.attention_softcap, self.sliding_window) != (None, None):
            raise ValueError(
                f"attention_softcap {self.attention_softcap} and sliding_window "
                f"{self.sliding_window} are of generation 2; leave them out"
            )
        for name in ("bos_id", "pad_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name} {getattr(self, name)} is out of range; allowed: 0 to "
                    f"{self.vocab_size - 1}"
                )
        check_dtype("param_dtype", self.param_dtype)

    @classmethod
    def from_hugging_face(
        cls, settings: Mapping[str, Any], *, param_dtype: str = "float32"
    ) -> "GemmaConfig":
        """Read the `config.json` of a repository such as google/gemma-2b or google/gemma-2-2b.

        Args:
            settings: the parsed file.
            param_dtype: as the attribute; the file's own word on it is not always true.

        Raises:
            ValueError: another model type, a size that is missing or no valid one, or an option
                that this implementation does not have.
        """
        kind = settings.get("model_type")
        if not isinstance(kind, str) or kind not in MODEL_TYPES:
            raise ValueError(
                f"config.json has model_type {kind!r}; allowed: {', '.join(MODEL_TYPES)}"
            )
        missing = [name for name in _SIZES.values() if name not in settings]
        if kind == "gemma2":
            others = ("query_pre_attn_scalar", "attn_logit_softcapping", "sliding_window")
            missing += [name for name in others if name not in settings]
        if missing:
            raise ValueError(f"config.json of a {kind} model lacks {', '.join(missing)}")
        _check_options(kind, settings)
        fields: dict[str, Any] = {ours: _read_int(settings, name) for ours, name in _SIZES.items()}
        if kind == "gemma2":
            fields["query_scalar"] = _read_int(settings, "query_pre_attn_scalar")
            if settings["attn_logit_softcapping"] is not None:
                fields["attention_softcap"] = _read_float(settings, "attn_logit_softcapping")
            if settings["sliding_window"] is not None:
                fields["sliding_window"] = _read_int(settings, "sliding_window")
        for ours, name in {"bos_id": "bos_token_id", "pad_id": "pad_token_id"}.items():
            if settings.get(name) is not None:
                fields[ours] = _read_int(settings, name)
        rope = settings.get("rope_parameters") or {}
        constants = {"norm_eps": (settings, "rms_norm_eps")}
        constants["rope_base"] = (rope if "rope_theta" in rope else settings, "rope_theta")
        for ours, (where, name) in constants.items():
            if name in where:
                fields[ours] = _read_float(where, name)
        return cls(generation=MODEL_TYPES[kind], param_dtype=param_dtype, **fields)

    def to_hugging_face(self) -> dict[str, Any]:
        """Return the `config.json` of the same model without a head, for transformers."""
        kind = {number: name for name, number in MODEL_TYPES.items()}[self.generation]
        settings = {theirs: getattr(self, ours) for ours, theirs in _SIZES.items()}
        settings |= {
            "architectures": [{1: "GemmaModel", 2: "Gemma2Model"}[self.generation]],
            "model_type": kind,
            "hidden_act": _TANH,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_base,
            "bos_token_id": self.bos_id,
            "pad_token_id": self.pad_id,
            "attention_bias": False,
            "dtype": self.param_dtype,
        }
        if self.generation == 2:
            settings |= {
                "hidden_activation": _TANH,
                "query_pre_attn_scalar": self.query_scalar or self.head_dim,
                "attn_logit_softcapping": self.attention_softcap,
                "sliding_window": self.sliding_window,
                "layer_types": _layer_types(self.num_layers),
            }
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON-friendly types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "GemmaConfig":
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

    def find_depth(self, hidden_layer: int) -> int:
        """Return how many blocks a hidden layer needs: it counts from the end if negative.

        Raises:
            ValueError: if there is no such hidden layer.
        """
        count = self.num_layers + 1
        if isinstance(hidden_layer, bool) or not -count <= hidden_layer < count:
            raise ValueError(
                f"hidden_layer {hidden_layer} is out of range; allowed: 0 (embeddings) to "
                f"{count - 1} (last), or -{count} to -1"
            )
        return hidden_layer % count

    def make_module(self, *, hidden_layer: int = -1, dtype: str = "float32") -> "Gemma":
        """Return the module that computes a hidden layer, see `Gemma`."""
        return Gemma(self, depth=self.find_depth(hidden_layer), dtype=dtype)

    def abstract_params(self, *, hidden_layer: int = -1) -> Any:
        """Return the parameters' shapes and types, boxed with their logical axes."""
        ids = jax.ShapeDtypeStruct((1, 1), "int32")
        lengths = jax.ShapeDtypeStruct((1,), "int32")
        module = self.make_module(hidden_layer=hidden_layer)
        return jax.eval_shape(module.init, jax.random.key(0), ids, lengths)["params"]


def _read_int(settings: Mapping[str, Any], name: str) -> int:
    value = settings[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"config.json has {name} {value!r}, which must be a whole number")
    return value


def _read_float(settings: Mapping[str, Any], name: str) -> float:
    value = settings[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"config.json has {name} {value!r}, which must be a number")
    return float(value)


def check_dtype(name: str, dtype: str) -> None:
    """Raise a `ValueError` unless parameters and computation may have the type."""
    if dtype not in DTYPES:
        raise ValueError(f"{name} {dtype!r} is unknown; allowed: {', '.join(DTYPES)}")


def _layer_types(count: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]


def _check_options(kind: str, settings: Mapping[str, Any]) -> None:
    """Refuse what a `config.json` may ask for and no published Gemma has."""
    rope = settings.get("rope_parameters") or {}
    # "gelu" in the files of the first generation always meant the approximation.
    allowed = {"gemma": ("hidden_act", (_TANH, "gelu")), "gemma2": ("hidden_activation", (_TANH,))}
    activation, names = allowed[kind]
    wanted = {
        activation: (None, *names),
        "attention_bias": (None, False),
        "use_bidirectional_attention": (None, False),
        "rope_scaling": (None,),
    }
    wrong = [
        f"{name} is {settings[name]!r}, allowed: {', '.join(map(repr, values))}"
        for name, values in wanted.items()
        if settings.get(name) not in values
    ]
    if rope.get("rope_type", "default") != "default":
        wrong.append(f"rope_type is {rope['rope_type']!r}, allowed: 'default'")
    layers = settings.get("layer_types")
    if kind == "gemma2" and layers not in (None, _layer_types(settings["num_hidden_layers"])):
        wrong.append("layer_types are not sliding_attention and full_attention in turn")
    if wrong:
        raise ValueError(f"config.json asks for what no published {kind} has: {'; '.join(wrong)}")


PUBLISHED = {
    "google/gemma-2b": GemmaConfig(
        generation=1,
        vocab_size=256000,
        num_layers=18,
        width=2048,
        mlp_width=16384,
        num_heads=8,
        num_kv_heads=1,
        head_dim=256,
        param_dtype="bfloat16",
    ),
    "google/gemma-2-2b": GemmaConfig(
        generation=2,
        vocab_size=256000,
        num_layers=26,
        width=2304,
        mlp_width=9216,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        query_scalar=256,
        attention_softcap=50.0,
        sliding_window=4096,
    ),
}


def rope_table(length: int, head_dim: int, base: float) -> np.ndarray:
    """Return float32 [length, head_dim/2, 2], cos and sin of positions 0…length-1."""
    pairs = head_dim // 2
    frequencies = base ** (-np.arange(pairs, dtype=np.float64) / pairs)
    angles = np.outer(np.arange(length), frequencies)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def rotate_halves(
    x: Float[Array, "b l h d"], table: Float[np.ndarray, "l d2 2"]
) -> Float[Array, "b l h d"]:
    """Rotate the channel pairs (i, i + d/2) in float32; the result has the type of `x`."""
    cos, sin = table[None, :, None, :, 0], table[None, :, None, :, 1]
    one, two = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
    return rotated.astype(x.dtype)


def _weights(*axes: str | None):
    return nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)


class _Norm(nn.Module):
    """RMSNorm that multiplies by 1 + scale, in float32."""

    config: GemmaConfig

    @nn.compact
    def __call__(self, x):
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None,))
        shape = (self.config.width,)
        scale = self.param("scale", zeros, shape, jnp.dtype(self.config.param_dtype))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.config.norm_eps)
        return (y * (1 + jnp.asarray(scale, jnp.float32)[None, None])).astype(x.dtype)


class _Linear(nn.Module):
    """A linear map `x[…, *inputs] → y[…, *outputs]` without a bias."""

    config: GemmaConfig
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]

    @nn.compact
    def __call__(self, x):
        shape, stored = self.inputs + self.outputs, jnp.dtype(self.config.param_dtype)
        kernel = jnp.asarray(self.param("kernel", _weights(*self.axes), shape, stored), x.dtype)
        n = len(self.inputs)
        contract = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
        return jax.lax.dot_general(x, kernel, (contract, ((), ())))


class _Attention(nn.Module):
    """Attention with grouped heads, rotary embedding and, where there is one, a soft cap."""

    config: GemmaConfig

    @nn.compact
    def __call__(self, x, rope, mask):
        cfg = self.config
        e, h, k, d = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        axes: tuple[str | None, ...] = ("embed", "heads", "head_dim")
        query = _Linear(cfg, (e,), (h, d), axes, name="query")(x)
        axes = ("embed", None, "heads", "head_dim")
        key_value = _Linear(cfg, (e,), (2, k, d), axes, name="key_value")(x)
        query = rotate_halves(query, rope).reshape(*x.shape[:2], k, h // k, d)
        key, value = rotate_halves(key_value[:, :, 0], rope), key_value[:, :, 1]
        logits = jnp.einsum("blkgd,bskd->bkgls", query, key, preferred_element_type=jnp.float32)
        logits *= 1 / math.sqrt(cfg.query_scalar or d)
        if cfg.attention_softcap is not None:
            logits = cfg.attention_softcap * jnp.tanh(logits / cfg.attention_softcap)
        # Not infinity: a row of padding may see nothing at all, and must not become NaN.
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        y = jnp.einsum("bkgls,bskd->blkgd", weights, value).reshape(*x.shape[:2], h, d)
        return _Linear(cfg, (h, d), (e,), ("heads", "head_dim", "embed"), name="out")(y)


class _MLP(nn.Module):
    """The gated MLP `down(gelu(gate(x)) · up(x))`, with the tanh approximation."""

    config: GemmaConfig

    @nn.compact
    def __call__(self, x):
        e, f = self.config.width, self.config.mlp_width
        y = _Linear(self.config, (e,), (2, f), ("embed", None, "mlp"), name="gate_up")(x)
        y = nn.gelu(y[..., 0, :], approximate=True) * y[..., 1, :]
        return _Linear(self.config, (f,), (e,), ("mlp", "embed"), name="down")(y)


class _Block(nn.Module):
    """One layer; whether it looks back through a window is an input of the scan."""

    config: GemmaConfig

    @nn.compact
    def __call__(self, x, is_sliding, rope, masks):
        cfg = self.config

        def branch(x, name, apply):
            y = apply(_Norm(cfg, name=f"{name}_norm")(x))
            if cfg.generation == 2:
                y = _Norm(cfg, name=f"{name}_post_norm")(y)
            return nn.with_logical_constraint(x + y, ("batch", "length", "act_embed"))

        whole, window = masks
        mask = whole if window is None else jnp.where(is_sliding, window, whole)
        attention = _Attention(cfg, name="attention")
        x = branch(x, "attention", lambda y: attention(y, rope, mask))
        return branch(x, "mlp", _MLP(cfg, name="mlp")), None


class Gemma(nn.Module):
    """Hidden states of a Gemma model.

    Attributes:
        config: sizes.
        depth: number of blocks that are computed; parameters of others must not be given.
        dtype: type of the computation.
    """

    config: GemmaConfig
    depth: int
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, ids: Int[Array | np.ndarray, "b s"], lengths: Int[Array | np.ndarray, " b"]
    ) -> Float[Array, "b s e"]:
        """Return the output of block `depth`, of the embedding if 0, normed if it is the last.

        So it is `hidden_states[depth]` of transformers, but zero where padded. An id outside the
        vocabulary makes NaN of its sequence.

        Args:
            ids: tokens, padded on the right.
            lengths: tokens of each sequence; what comes later is never attended to.
        """
        cfg, dtype = self.config, jnp.dtype(self.dtype)
        table = self.param(
            "embedding",
            _weights("vocab", "embed"),
            (cfg.vocab_size, cfg.width),
            jnp.dtype(cfg.param_dtype),
        )
        length = ids.shape[1]
        valid = jnp.arange(length)[None, :] < jnp.asarray(lengths)[:, None]
        # Padding may hold anything; a negative id would count from the end.
        ids = jnp.where(valid, ids, 0)
        ids = jnp.where(ids < 0, cfg.vocab_size, ids)
        x = jnp.take(jnp.asarray(table), ids, axis=0, mode="fill").astype(dtype)
        # Rounded to the type of the computation, as the weights were trained with.
        x = x * jnp.asarray(math.sqrt(cfg.width), dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        if self.depth:
            rope = rope_table(length, cfg.head_dim, cfg.rope_base)
            is_sliding = jnp.arange(self.depth) % 2 == 0
            blocks = nn.scan(
                _Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=self.depth,
                check_constancy_invariants=False,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(cfg, name="layers")
            x, _ = blocks(x, is_sliding, rope, _make_masks(valid, cfg.sliding_window))
        if self.depth == cfg.num_layers:
            x = _Norm(cfg, name="final_norm")(x)
        return jnp.where(valid[..., None], x, jnp.zeros((), dtype))


def _make_masks(
    valid: Bool[Array, "b s"], window: int | None
) -> tuple[Bool[Array, "b s s"], Bool[Array, "b s s"] | None]:
    """Return where a query may look at a key: in full layers, and in those with a window."""
    length = valid.shape[1]
    back = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    whole = (back >= 0)[None] & valid[:, None, :]
    if window is None or window >= length:
        return whole, None
    return whole, whole & (back < window)[None]


def take_layers(params: Mapping[str, Any], config: GemmaConfig, depth: int) -> dict[str, Any]:
    """Return the parameters that a module of a depth needs, of those of the whole model."""
    names = {"embedding"} | ({"layers"} if depth else set())
    names |= {"final_norm"} if depth == config.num_layers else set()
    kept = {name: params[name] for name in params if name in names}
    if "layers" in kept:
        kept["layers"] = jax.tree.map(lambda leaf: leaf[:depth], kept["layers"])
    return kept
