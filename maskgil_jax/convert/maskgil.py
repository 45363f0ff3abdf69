"""MaskGIL in the paper's layout, under the key names of the LlamaGen code it grew from.

The rules of the transformer serve the released layout as well (`maskgil_released.py`).
"""

from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from maskgil_jax.convert.inference import SizeReader
from maskgil_jax.convert.rules import (
    ConversionError,
    Family,
    Rule,
    StateDict,
    TensorLike,
    UntoldError,
)
from maskgil_jax.models.base import TokenModelConfig
from maskgil_jax.models.maskgil import MaskGILConfig
from maskgil_jax.models.sizes import SIZES

NAME = "maskgil"
_LAYERS = "transformer/layers"
_MAX_LAYERS = 1000

TRANSFORMER_RULES = (
    Rule("layers.{n}.attention_norm.weight", f"{_LAYERS}/attention_norm/scale", "n e -> e"),
    Rule(
        "layers.{n}.attention.wqkv.weight",
        f"{_LAYERS}/attention/qkv/kernel",
        "n e t h d -> (t h d) e",
    ),
    Rule("layers.{n}.attention.wo.weight", f"{_LAYERS}/attention/out/kernel", "n h d e -> e (h d)"),
    Rule(
        "layers.{n}.attention.{c:q_norm|k_norm}.weight",
        f"{_LAYERS}/attention/{{c:q_norm|k_norm}}/scale",
        "n d -> d",
    ),
    Rule(
        "layers.{n}.attention_post_norm.weight", f"{_LAYERS}/attention_post_norm/scale", "n e -> e"
    ),
    Rule("layers.{n}.ffn_norm.weight", f"{_LAYERS}/mlp_norm/scale", "n e -> e"),
    Rule(
        "layers.{n}.feed_forward.{g:w1|w3}.weight",
        f"{_LAYERS}/mlp/gate_up/kernel",
        "n e g f -> f e",
    ),
    Rule("layers.{n}.feed_forward.w2.weight", f"{_LAYERS}/mlp/down/kernel", "n f e -> e f"),
    Rule("layers.{n}.ffn_post_norm.weight", f"{_LAYERS}/mlp_post_norm/scale", "n e -> e"),
    Rule("norm.weight", "transformer/final_norm/scale", "e -> e"),
    Rule("output.weight", "head/kernel", "e v -> v e"),
)
RULES = (
    Rule("tok_embeddings.weight", "token_embed/embedding", "k e -> k e"),
    Rule("cls_embedding.embedding_table.weight", "label_embed/embedding", "c e -> c e"),
    *TRANSFORMER_RULES,
)

LAYOUT = {
    "condition": "first",
    "rope": "2d",
    "embeddings": "separate",
    "rope_base": 10000.0,
    "norm_eps": 1e-5,
}

# (layers, width) -> heads of the published sizes: heads leave no trace in the shapes.
PUBLISHED_HEADS = {(s.num_layers, s.width): s.num_heads for s in SIZES.values()}


def read_transformer(read: SizeReader) -> dict[str, int]:
    """Infer `num_layers`, `width` and `mlp_width`."""
    attention, mlp = r"layers\.\d+\.attention\.", r"layers\.\d+\.feed_forward\."
    widths = [(r"layers\.\d+\.(attention|ffn)_norm\.weight", 0), (attention + r"wo\.weight", 0)]
    return {
        "num_layers": read.count("number of layers", r"layers\.(\d+)\.", _MAX_LAYERS),
        "width": read.size("width", (r"norm\.weight", 0), *widths),
        "mlp_width": read.size("MLP width", (mlp + r"w[13]\.weight", 0), (mlp + r"w2\.weight", 1)),
    }


def find_heads(sizes: dict[str, int], num_heads: int | None) -> int:
    """Return the number of heads given, or else that of the published size.

    Raises:
        UntoldError: the size is not a published one and no number was given.
    """
    size = sizes["num_layers"], sizes["width"]
    if num_heads is None and size not in PUBLISHED_HEADS:
        raise UntoldError(
            f"the shapes do not tell the number of heads, and {size[0]} layers of width {size[1]} "
            f"are no published size {sorted(PUBLISHED_HEADS)}; give num_heads (--num_heads)",
            option="num_heads",
            stand_in=1,
        )
    return PUBLISHED_HEADS[size] if num_heads is None else num_heads


def read_heads(state: StateDict, width: int) -> int | None:
    """Return the number of heads that the width of the query norm gives, if there is one."""
    tensor = state.get("layers.0.attention.q_norm.weight")
    shape: tuple[int, ...] = getattr(tensor, "shape", ())
    if len(shape) != 1 or shape[0] < 1 or width % shape[0]:
        return None
    return width // int(shape[0])


def read_options(
    state: StateDict,
    sizes: dict[str, int],
    *,
    num_heads: int | None,
    qk_norm: str | None,
    post_norm: str | None,
) -> dict[str, Any]:
    """Return heads and norms, as given or as the tensors tell them; see `infer_config`."""
    heads = read_heads(state, sizes["width"]) if num_heads is None else num_heads
    has_qk_norm = any(".attention.q_norm." in key or ".attention.k_norm." in key for key in state)
    has_post_norm = any("_post_norm." in key for key in state)
    return {
        "num_heads": find_heads(sizes, heads),
        "qk_norm": qk_norm or ("layer" if has_qk_norm else "none"),
        "post_norm": post_norm or ("rms" if has_post_norm else "none"),
    }


def read_labelled(
    name: str,
    state: StateDict,
    *,
    num_heads: int | None,
    qk_norm: str | None,
    post_norm: str | None,
) -> dict[str, Any]:
    """Return what shapes and options tell of a class-conditional model; see `infer_config`.

    The `codebook_size` counts the rows of the tables, a mask token's included.
    """
    read = SizeReader(name, state, RULES)
    sizes = read_transformer(read)
    rows = read.size("codebook size", (r"tok_embeddings\.weight", 0), (r"output\.weight", 0))
    classes = read.size("number of classes", (r"cls_embedding\.embedding_table\.weight", 0))
    read.finish()
    options = read_options(state, sizes, num_heads=num_heads, qk_norm=qk_norm, post_norm=post_norm)
    return {**sizes, **options, "codebook_size": rows, "num_classes": classes - 1}


def build_config(name: str, config_type: Any = MaskGILConfig, **fields: Any) -> Any:
    """Build the config, a refusal of which is the checkpoint's or an option's fault."""
    try:
        return config_type(**fields)
    except ValueError as error:
        raise ConversionError(f"these sizes and options make no {name}: {error}") from error


def infer_config(
    state: StateDict,
    *,
    num_heads: int | None = None,
    grid_size: tuple[int, int] = (16, 16),
    cond_rope: str = "zero",
    qk_norm: str | None = None,
    post_norm: str | None = None,
) -> MaskGILConfig:
    """Infer the config of a MaskGIL in the paper's layout from the shapes of its state dict.

    Args:
        num_heads: needed where (layers, width) is no published size and there are no query norms,
            whose width tells it.
        grid_size: rows and columns of the token grid; shapes do not tell it.
        cond_rope: "zero" as the LlamaGen code computes it, or "identity".
        qk_norm: "layer" or "rms"; by default "layer" if the file has such tensors.
        post_norm: "layer" or "rms"; by default "rms" if the file has such tensors.

    Raises:
        ConversionError: tensors that carry the sizes are missing, or the sizes make no model.
    """
    told = read_labelled(NAME, state, num_heads=num_heads, qk_norm=qk_norm, post_norm=post_norm)
    told["codebook_size"] -= 1
    return build_config(NAME, **told, grid_size=grid_size, cond_rope=cond_rope, **LAYOUT)


def abstract_tree(config: TokenModelConfig) -> dict[str, TensorLike]:
    """Return path -> shape and dtype of every parameter, without computing any."""
    tokens = jax.ShapeDtypeStruct((1, *config.grid_size), "int32")
    condition = jax.eval_shape(config.example_condition)
    init = config.make_module().init
    tree = jax.eval_shape(init, jax.random.key(0), tokens, condition)["params"]
    return flatten_dict(nn.unbox(tree), sep="/")


FAMILY = Family(
    name=NAME,
    kind="model",
    architecture="maskgil",
    rules=RULES,
    infer_config=infer_config,
    abstract_tree=abstract_tree,
    config_type=MaskGILConfig,
    options=("num_heads", "grid_size", "cond_rope", "qk_norm", "post_norm"),
    layout=LAYOUT,
    wrappers=("ema", "model", "state_dict"),
    export_wrapper="model",
    dropped={"freqs_cis": None, "causal_mask": None},
)
