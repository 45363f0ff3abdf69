"""The one transformer: LLaMA blocks that are causal or bidirectional by the mask they are given.

RMSNorm, rotary embedding, SwiGLU, no biases; optionally QK-Norm and Post-Norm. What else the
weights of a language model need, such as grouped heads, its family fixes. The layers are scanned,
so every parameter under `layers` carries a leading layer axis and the compile time does not grow
with depth.

Reference: LLaMA (Touvron et al., 2023); MaskGIL section 3.1 and Figure 4; Lumina-Next (Post-Norm).
"""

import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from maskgil_jax.models.rope import apply_rope

NORMS = ("none", "layer", "rms")
REMATS = ("none", "full", "dots")
ATTENTIONS = ("xla", "cudnn")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Shape of a stack of blocks, and how it is computed.

    Attributes:
        num_layers: number of blocks.
        width: channels e of the residual stream.
        num_heads: attention heads; width / num_heads is the head dimension.
        mlp_width: hidden channels f of the MLP.
        dropout: rate of the dropout inside the blocks, in [0, 1).
        dtype: type of the computation; parameters stay float32.
        remat: what the backward pass recomputes: nothing, everything, or all but matmul outputs.
        scan_unroll: layers per iteration of the scan.
    """

    num_layers: int
    width: int
    num_heads: int
    mlp_width: int
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1

    def __post_init__(self):
        for name in ("num_layers", "width", "num_heads", "mlp_width", "scan_unroll"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} / num_heads {self.num_heads} must be a whole number"
            )
        check_choices(self, dict(dtype=DTYPES, remat=REMATS))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is out of range; allowed: [0, 1)")

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.width // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(StackConfig):
    """Shape and options of the LLaMA blocks; the head dimension is even, dropout on the outputs.

    Fields are what a run may choose. What the weights of a family fix are class variables and
    properties, which a family that differs overrides: see `models/chameleon.py`.

    Attributes:
        qk_norm: normalisation of queries and keys over the head dimension, before RoPE.
        post_norm: normalisation of the outputs of attention and MLP before the residual addition.
        norm_eps: epsilon of every norm.
        attention: `xla`, or `cudnn` (GPU, bfloat16).
    """

    # Kinds of QK-Norm: one scale for all heads, or a scale and bias of its own for every head.
    qk_norms: ClassVar[tuple[str, ...]] = NORMS
    # Channels that RoPE turns together, see `apply_rope`.
    rope_pairs: ClassVar[str] = "interleaved"

    qk_norm: str = "none"
    post_norm: str = "none"
    norm_eps: float = 1e-5
    attention: str = "xla"

    def __post_init__(self):
        super().__post_init__()
        if self.head_dim % 2:
            raise ValueError(
                f"width {self.width} / num_heads {self.num_heads} must be an even number"
            )
        check_choices(self, dict(qk_norm=self.qk_norms, post_norm=NORMS, attention=ATTENTIONS))
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps {self.norm_eps} must be more than 0")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError("attention 'cudnn' needs dtype 'bfloat16'; use 'xla' for float32")

    @property
    def kv_heads(self) -> int:
        """Heads g of keys and values, each for num_heads / kv_heads heads of the queries."""
        return self.num_heads

    @property
    def param_dtype(self) -> str:
        """Type in which the parameters are stored."""
        return "float32"


def stack_config(config: TransformerConfig) -> TransformerConfig:
    """Return the part of a model's configuration that is its stack's."""
    names = [f.name for f in dataclasses.fields(TransformerConfig)]
    return TransformerConfig(**{name: getattr(config, name) for name in names})


def check_choices(config: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Raise a `ValueError`, naming the nearest choice, where a field holds none of its choices."""
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} {value!r} is unknown; allowed: {', '.join(allowed)}.{hint}")


def weight_init(*axes: str | None, stddev: float = 0.02):
    """Return a normal initialiser whose result carries logical axis names."""
    return nn.with_logical_partitioning(nn.initializers.normal(stddev), axes)


def make_norm(
    kind: str, config: TransformerConfig, name: str, axis: str | None = None
) -> nn.Module:
    """Return a norm, computed in float32: with a scale and no bias, or `HeadNorm`."""
    if kind == "heads":
        return HeadNorm(config, name=name)
    cls = nn.RMSNorm if kind == "rms" else nn.LayerNorm
    options: dict[str, Any] = {} if kind == "rms" else {"use_bias": False}
    scale = nn.with_logical_partitioning(nn.initializers.ones_init(), (axis,))
    return cls(
        epsilon=config.norm_eps,
        dtype=jnp.float32,
        param_dtype=jnp.dtype(config.param_dtype),
        scale_init=scale,
        # The one-pass variance loses digits where the mean is far from zero.
        use_fast_variance=kind == "rms",
        name=name,
        **options,
    )


def _dtype(config: StackConfig) -> Any:
    return jnp.dtype(config.dtype)


class Projection(nn.Module):
    """A linear map over trailing axes, `x[…, *inputs] → y[…, *outputs]`, bias-free by default."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any
    use_bias: bool = False
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        """Contract the last `len(inputs)` axes of `x` with the kernel."""
        stored = jnp.dtype(self.param_dtype)
        kernel = self.param("kernel", weight_init(*self.axes), self.inputs + self.outputs, stored)
        n = len(self.inputs)
        contract = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
        y = jax.lax.dot_general(
            x.astype(self.dtype), kernel.astype(self.dtype), (contract, ((), ()))
        )
        if not self.use_bias:
            return y
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[n:])
        bias = jnp.asarray(self.param("bias", zeros, self.outputs, stored), self.dtype)
        return y + bias.reshape((1,) * (x.ndim - n) + self.outputs)


class HeadNorm(nn.Module):
    """Layer norm of every head over its channels, with a scale and bias of its own, in float32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b l h d"]) -> Float[Array, "b l h d"]:
        """Normalise; the result is float32."""
        cfg, shape = self.config, x.shape[2:]

        def parameter(name, init):
            init = nn.with_logical_partitioning(init, ("heads", "head_dim"))
            value = self.param(name, init, shape, jnp.dtype(cfg.param_dtype))
            return jnp.asarray(value, jnp.float32)[None, None]

        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + cfg.norm_eps)
        scale = parameter("scale", nn.initializers.ones_init())
        return x * scale + parameter("bias", nn.initializers.zeros_init())


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer, of the positions that were computed so far.

    Attributes:
        keys: [b g s d], heads in front, as attention to them multiplies; rotated.
        values: [b g s d].
    """

    keys: Any
    values: Any


def attend_cached(
    q: Float[Array, "b l h d"],
    k: Float[Array, "b l g d"],
    v: Float[Array, "b l g d"],
    mask: Bool[Array, "#b l s"],
    cache: LayerCache,
    position: Int[Array, ""] | int,
) -> tuple[Float[Array, "b l h d"], LayerCache]:
    """Put keys and values into a cache and attend to its first s positions.

    Args:
        q: queries of new positions; each head of keys serves h / g neighbouring heads of them.
        k: their keys.
        v: their values.
        mask: true where the query of a new position may look; its width says how much of the cache
            is read.
        cache: of the layer.
        position: place of the first of them, may be traced.
    """
    start, s = (0, 0, position, 0), mask.shape[-1]
    cache = LayerCache(
        *(
            jax.lax.dynamic_update_slice(whole, jnp.swapaxes(part, 1, 2).astype(whole.dtype), start)
            for whole, part in ((cache.keys, k), (cache.values, v))
        )
    )
    d = q.shape[-1]
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, d)
    scores = jnp.einsum(
        "blgrd,bgsd->bgrls", grouped, cache.keys[:, :, :s], preferred_element_type=jnp.float32
    )
    scores = jnp.where(mask[:, None, None], scores / d**0.5, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(q.dtype)
    y = jnp.einsum("bgrls,bgsd->blgrd", weights, cache.values[:, :, :s])
    return y.reshape(q.shape), cache


class Attention(nn.Module):
    """Multi-head attention with rotary embedding."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l e"],
        rope: Float[Array | np.ndarray, "l d2 2"],
        mask: Bool[Array, "#b l s"] | None,
        lengths: Int[Array, " b"] | None,
        cache: LayerCache | None = None,
        position: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "b l e"], LayerCache | None]:
        """Attend; see `Transformer` for `mask` and `lengths`, `attend_cached` for the rest."""
        cfg = self.config
        e, h, g, d, dtype = cfg.width, cfg.num_heads, cfg.kv_heads, cfg.head_dim, _dtype(cfg)
        axes: tuple[str | None, ...] = ("embed", None, "heads", "head_dim")

        def project(outputs, axes, name):
            return Projection((e,), outputs, axes, dtype, param_dtype=cfg.param_dtype, name=name)(x)

        if g == h:
            qkv = project((3, h, d), axes, "qkv")
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        else:
            q = project((h, d), ("embed", "heads", "head_dim"), "q")
            kv = project((2, g, d), axes, "kv")
            k, v = kv[:, :, 0], kv[:, :, 1]
        if cfg.qk_norm != "none":
            q = make_norm(cfg.qk_norm, cfg, "q_norm")(q).astype(dtype)
            k = make_norm(cfg.qk_norm, cfg, "k_norm")(k).astype(dtype)
        q, k = (apply_rope(x, rope, cfg.rope_pairs) for x in (q, k))
        if cache is None:
            implementation: Any = cfg.attention
            y = jax.nn.dot_product_attention(
                q,
                k,
                v,
                mask=None if mask is None else mask[:, None],
                key_value_seq_lengths=lengths,
                implementation=implementation,
            )
        else:
            assert mask is not None
            y, cache = attend_cached(q, k, v, mask, cache, position)
        axes, stored = ("heads", "head_dim", "embed"), cfg.param_dtype
        out = Projection((h, d), (e,), axes, dtype, param_dtype=stored, name="out")
        return out(y), cache


class SwiGLU(nn.Module):
    """The gated MLP `down(silu(gate(x)) · up(x))`."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b l e"]) -> Float[Array, "b l e"]:
        """Apply the MLP at every position."""
        cfg, e, f = self.config, self.config.width, self.config.mlp_width
        make = functools.partial(Projection, dtype=_dtype(cfg), param_dtype=cfg.param_dtype)
        y = make((e,), (2, f), ("embed", None, "mlp"), name="gate_up")(x)
        y = nn.silu(y[..., 0, :]) * y[..., 1, :]
        return make((f,), (e,), ("mlp", "embed"), name="down")(y)


class Block(nn.Module):
    """One layer: attention and MLP, each pre-normalised, optionally post-normalised."""

    config: TransformerConfig
    train: bool

    @nn.compact
    def __call__(self, x, rope, mask, lengths, cache=None, position=0):
        """Return the carry of a scan, and the cache: none in a scan."""
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        drop = nn.Dropout(cfg.dropout, deterministic=not self.train)

        def add(x, y, name):
            if cfg.post_norm != "none":
                y = make_norm(cfg.post_norm, cfg, name)(y).astype(dtype)
            y = nn.with_logical_constraint(y, ("batch", "length", "act_embed"))
            return x + drop(y)

        y = make_norm("rms", cfg, "attention_norm")(x).astype(dtype)
        y, cache = Attention(cfg, name="attention")(y, rope, mask, lengths, cache, position)
        x = add(x, y, "attention_post_norm")
        y = SwiGLU(cfg, name="mlp")(make_norm("rms", cfg, "mlp_norm")(x).astype(dtype))
        return add(x, y, "mlp_post_norm"), cache


def scan_blocks(block: Any, config: StackConfig) -> Any:
    """Return the module class that applies `num_layers` blocks, their parameters on a layer axis.

    The block maps (carry, *rest) to (carry, None); the rest is the same for all layers.
    """
    if config.remat != "none":
        policy = {
            "full": None,
            "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
        }[config.remat]
        block = nn.remat(block, prevent_cse=False, policy=policy)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=config.num_layers,
        unroll=config.scan_unroll,
        # Nothing is hoisted out of the loop; to verify that would trace every block twice.
        check_constancy_invariants=False,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class Transformer(nn.Module):
    """A stack of blocks and a final norm."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l e"],
        rope: Float[Array | np.ndarray, "l d2 2"],
        mask: Bool[Array, "#b l l"] | None = None,
        train: bool = False,
        lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b l e"]:
        """Return the normalised output of the last layer.

        The root mean square of the last layer's output before the final norm is sown as
        `output_norm` in the collection `intermediates`: growth without bound announces the
        divergence that QK-Norm and Post-Norm prevent.

        Args:
            x: embedded sequence.
            rope: rotary table, cos and sin, one row a position.
            mask: true where query l may look at key s; `None` lets every position see all.
            train: whether dropout is on (needs an rng named `dropout`).
            lengths: of the sequence of each image; nothing looks at what lies behind. `None` where
                all of it counts.

        Reference: MaskGIL Figure 4.
        """
        cfg = self.config
        x = x.astype(jnp.dtype(cfg.dtype))
        x, _ = scan_blocks(Block, cfg)(cfg, train, name="layers")(x, rope, mask, lengths)
        self.sow("intermediates", "output_norm", jnp.sqrt(jnp.mean(x.astype(jnp.float32) ** 2)))
        return make_norm("rms", cfg, "final_norm")(x).astype(x.dtype)
