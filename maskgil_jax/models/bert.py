"""Bidirectional Transformer: the BERT-like baseline of MaskGIL's study, as MaskGIT built it.

Layer norm in front of attention and MLP, biases everywhere, GELU, learned positions. The class is
the token behind the image tokens, looked up in the same table as they are, and that table is the
head too, with a bias of its own for every position.

Reference: MaskGIT (Chang et al., 2022) section 3; MaskGIL Figure 3 and Tables A.1 and A.2; the
PyTorch code of valeoai/Maskgit-pytorch, `Network/transformer.py`.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskgil_jax.models.base import ClassModelConfig
from maskgil_jax.models.conditioning import Labels, embed_labels
from maskgil_jax.models.transformer import Projection, StackConfig, scan_blocks, weight_init

# Of the norms inside the blocks, and of those before and behind the stack.
BLOCK_EPS = 1e-5
OUTER_EPS = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class BidirectionalTransformerConfig(ClassModelConfig, StackConfig):
    """Shape and options of a class-conditional Bidirectional Transformer.

    Dropout acts on attention weights, inside and behind the MLPs, and behind the norms outside the
    blocks. Positions are learned, so the model serves its own grid only.
    """

    family: ClassVar[str] = "bidirectional-transformer"

    def __post_init__(self):
        StackConfig.__post_init__(self)
        ClassModelConfig.__post_init__(self)

    @property
    def table_size(self) -> int:
        """Rows of the embedding table: codes, mask, classes, null class."""
        return self.codebook_size + 1 + self.num_classes + 1

    def make_module(self) -> "BidirectionalTransformer":
        """Return the Flax module."""
        return BidirectionalTransformer(self)


def _norm(epsilon: float, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=jnp.float32,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), (None,)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), (None,)),
        # The one-pass variance loses digits where the mean is far from zero.
        use_fast_variance=False,
        name=name,
    )


def _linear(inputs, outputs, axes, dtype: Any, name: str) -> Projection:
    return Projection(inputs, outputs, axes, dtype, use_bias=True, name=name)


class Attention(nn.Module):
    """Multi-head attention of every position to all, with dropout on its weights."""

    config: BidirectionalTransformerConfig
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b l e"]) -> Float[Array, "b l e"]:
        """Attend."""
        cfg = self.config
        e, h, d, dtype = cfg.width, cfg.num_heads, cfg.head_dim, jnp.dtype(cfg.dtype)
        qkv = _linear((e,), (3, h, d), ("embed", None, "heads", "head_dim"), dtype, "qkv")(x)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum("blhd,bshd->bhls", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / d**0.5).astype(dtype)
        weights = nn.Dropout(cfg.dropout, deterministic=not self.train)(weights)
        y = jnp.einsum("bhls,bshd->blhd", weights, v)
        return _linear((h, d), (e,), ("heads", "head_dim", "embed"), dtype, "out")(y)


class MLP(nn.Module):
    """The MLP `down(gelu(up(x)))`."""

    config: BidirectionalTransformerConfig
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b l e"]) -> Float[Array, "b l e"]:
        """Apply the MLP at every position."""
        e, f, dtype = self.config.width, self.config.mlp_width, jnp.dtype(self.config.dtype)
        y = nn.gelu(_linear((e,), (f,), ("embed", "mlp"), dtype, "up")(x), approximate=False)
        y = nn.Dropout(self.config.dropout, deterministic=not self.train)(y)
        return _linear((f,), (e,), ("mlp", "embed"), dtype, "down")(y)


class Block(nn.Module):
    """One layer: attention and MLP, each pre-normalised."""

    config: BidirectionalTransformerConfig
    train: bool

    @nn.compact
    def __call__(self, x):
        """Return `(x, None)`, the carry and the empty output of a scan step."""
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        y = _norm(BLOCK_EPS, "attention_norm")(x).astype(dtype)
        y = Attention(cfg, self.train, name="attention")(y)
        x = x + nn.with_logical_constraint(y, ("batch", "length", "act_embed"))
        y = _norm(BLOCK_EPS, "mlp_norm")(x).astype(dtype)
        y = MLP(cfg, self.train, name="mlp")(y)
        y = nn.Dropout(cfg.dropout, deterministic=not self.train)(y)
        return x + nn.with_logical_constraint(y, ("batch", "length", "act_embed")), None


class Stack(nn.Module):
    """The blocks; sows the root mean square of their output as `output_norm`."""

    config: BidirectionalTransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b l e"], train: bool) -> Float[Array, "b l e"]:
        """Return the output of the last layer."""
        x, _ = scan_blocks(Block, self.config)(self.config, train, name="layers")(x)
        self.sow("intermediates", "output_norm", jnp.sqrt(jnp.mean(x.astype(jnp.float32) ** 2)))
        return x


class OuterLayer(nn.Module):
    """What stands before and behind the stack: norm, linear map, GELU, norm.

    Before the stack another linear map follows (`second`).
    """

    config: BidirectionalTransformerConfig
    second: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b l e"], train: bool) -> Float[Array, "b l e"]:
        """Apply the layer at every position."""
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        e, drop = cfg.width, nn.Dropout(cfg.dropout, deterministic=not train)
        x = drop(_norm(OUTER_EPS, "norm1")(x).astype(dtype))
        x = nn.gelu(_linear((e,), (e,), ("embed", "mlp"), dtype, "linear1")(x), approximate=False)
        x = _norm(OUTER_EPS, "norm2")(x).astype(dtype)
        if not self.second:
            return x
        return _linear((e,), (e,), ("mlp", "embed"), dtype, "linear2")(drop(x))


class BidirectionalTransformer(nn.Module):
    """Pre-LN BERT with learned positions, a class token, and a head tied to its table."""

    config: BidirectionalTransformerConfig

    def setup(self):
        """Create the parameters and submodules."""
        cfg, length = self.config, self.config.seq_len
        shape = (cfg.table_size, cfg.width)
        self.token_embed = self.param("token_embed", weight_init("vocab", "embed"), shape)
        self.position_embed = self.param(
            "position_embed", weight_init(None, "length", "embed"), (1, length + 1, cfg.width)
        )
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("length", "vocab"))
        self.bias = self.param("bias", zeros, (length + 1, cfg.table_size))
        self.first_layer = OuterLayer(cfg, second=True)
        self.transformer = Stack(cfg)
        self.last_layer = OuterLayer(cfg, second=False)

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "b gh gw"],
        labels: Labels,
        train: bool = False,
    ) -> Float[Array, "b l v"]:
        """Return float32 logits [b, gh·gw, K+1] for every image token.

        Args:
            tokens: codes 0…K-1, or K where masked, on the configured grid.
            labels: classes 0…C-1, or C for "no condition"; or float mixtures of them [b, C+1].
            train: whether dropout is on (needs an rng named `dropout`).

        Raises:
            ValueError: if the grid is not the configured one, for which the positions were learned.
        """
        bias = jnp.asarray(self.bias)[None, :-1, : self.config.codebook_size + 1]
        return self._project(self.features(tokens, labels, train)) + bias

    def features(
        self,
        tokens: Int[Array | np.ndarray, "b gh gw"],
        labels: Labels,
        train: bool = False,
    ) -> Float[Array, "b l e"]:
        """Return what the head reads, of every image token; the arguments are those of a call.

        Raises:
            ValueError: if the grid is not the configured one.
        """
        cfg = self.config
        b, gh, gw = tokens.shape
        if (gh, gw) != cfg.grid_size:
            raise ValueError(
                f"a grid of {gh}×{gw} tokens has no learned positions; this model serves "
                f"{cfg.grid_size[0]}×{cfg.grid_size[1]}"
            )
        table = jnp.asarray(self.token_embed)
        image = table[tokens.reshape(b, cfg.seq_len)]
        condition = embed_labels(table, labels, cfg.codebook_size + 1)
        x = jnp.concatenate([image, condition], axis=1) + self.position_embed
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        x = self.transformer(self.first_layer(x, train), train)
        return self.last_layer(x[:, : cfg.seq_len], train)

    def logits(
        self, features: Float[Array, "b n e"], positions: Int[Array, "b n"]
    ) -> Float[Array, "b n v"]:
        """Return the logits of some features, given their raster positions in the image."""
        bias = jnp.asarray(self.bias)[:, : self.config.codebook_size + 1]
        return self._project(features) + bias[positions]

    def _project(self, features: Float[Array, "b n e"]) -> Float[Array, "b n v"]:
        # The head is the table's rows of codes and mask; nobody asks for classes.
        rows = self.config.codebook_size + 1
        head = jnp.asarray(self.token_embed)[:rows].astype(features.dtype)
        head = jnp.pad(head, ((0, self.config.head_padding), (0, 0)))
        logits = jnp.einsum("bne,ve->bnv", features, head, preferred_element_type=jnp.float32)
        return logits[..., :rows]
