"""Checkpoints of the Bidirectional Transformer, under the key names of MaskGIT's PyTorch code.

Reference: valeoai/Maskgit-pytorch, `Network/transformer.py`. Its checkpoints hold the weights under
`model_state_dict`.
"""

import math
from typing import Any

from maskgil_jax.convert.inference import SizeReader
from maskgil_jax.convert.maskgil import abstract_tree
from maskgil_jax.convert.rules import (
    ConversionError,
    Family,
    Rule,
    StateDict,
    UntoldError,
)
from maskgil_jax.models.bert import BidirectionalTransformerConfig

NAME = "bidirectional-transformer"
_KEYS = "transformer.layers.{n}"
_LAYERS = "transformer/layers"
_MAX_LAYERS = 1000
# (layers, width) -> heads of the study's model: heads leave no trace in the shapes.
_PUBLISHED_HEADS = {(12, 768): 12}


def _norm_rules(key: str, path: str, axes: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{key}.weight", f"{path}/scale", axes),
        Rule(f"{key}.bias", f"{path}/bias", axes),
    )


def _linear_rules(key: str, path: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{key}.weight", f"{path}/kernel", "e f -> f e"),
        Rule(f"{key}.bias", f"{path}/bias", "f -> f"),
    )


RULES = (
    Rule("tok_emb.weight", "token_embed", "k e -> k e"),
    Rule("pos_emb", "position_embed", "o l e -> o l e"),
    Rule("bias", "bias", "l k -> l k"),
    *_norm_rules("first_layer.0", "first_layer/norm1", "e -> e"),
    *_linear_rules("first_layer.2", "first_layer/linear1"),
    *_norm_rules("first_layer.4", "first_layer/norm2", "e -> e"),
    *_linear_rules("first_layer.6", "first_layer/linear2"),
    *_norm_rules(f"{_KEYS}.0.norm", f"{_LAYERS}/attention_norm", "n e -> e"),
    Rule(
        f"{_KEYS}.0.fn.mha.in_proj_weight",
        f"{_LAYERS}/attention/qkv/kernel",
        "n e t h d -> (t h d) e",
    ),
    Rule(f"{_KEYS}.0.fn.mha.in_proj_bias", f"{_LAYERS}/attention/qkv/bias", "n t h d -> (t h d)"),
    Rule(
        f"{_KEYS}.0.fn.mha.out_proj.weight",
        f"{_LAYERS}/attention/out/kernel",
        "n h d e -> e (h d)",
    ),
    Rule(f"{_KEYS}.0.fn.mha.out_proj.bias", f"{_LAYERS}/attention/out/bias", "n e -> e"),
    *_norm_rules(f"{_KEYS}.1.norm", f"{_LAYERS}/mlp_norm", "n e -> e"),
    Rule(f"{_KEYS}.1.fn.net.0.weight", f"{_LAYERS}/mlp/up/kernel", "n e f -> f e"),
    Rule(f"{_KEYS}.1.fn.net.0.bias", f"{_LAYERS}/mlp/up/bias", "n f -> f"),
    Rule(f"{_KEYS}.1.fn.net.3.weight", f"{_LAYERS}/mlp/down/kernel", "n f e -> e f"),
    Rule(f"{_KEYS}.1.fn.net.3.bias", f"{_LAYERS}/mlp/down/bias", "n e -> e"),
    *_norm_rules("last_layer.0", "last_layer/norm1", "e -> e"),
    *_linear_rules("last_layer.2", "last_layer/linear1"),
    *_norm_rules("last_layer.4", "last_layer/norm2", "e -> e"),
)


def infer_config(
    state: StateDict,
    *,
    num_heads: int | None = None,
    num_classes: int | None = None,
    grid_size: tuple[int, int] | None = None,
) -> BidirectionalTransformerConfig:
    """Infer the config from the shapes of a state dict.

    Args:
        num_heads: needed where (layers, width) is not the published size.
        num_classes: always needed: codes and classes share one table, shapes only tell their sum.
        grid_size: rows and columns of the token grid; needed where it is no square.

    Raises:
        ConversionError: tensors that carry the sizes are missing, the sizes make no model, or an
            option does not fit the shapes.
        UntoldError: an option is needed and was not given.
    """
    read = SizeReader(NAME, state, RULES)
    layer = r"transformer\.layers\.\d+\."
    widths = [(layer + r"[01]\.norm\.weight", 0), (layer + r"0\.fn\.mha\.out_proj\.weight", 0)]
    mlp_widths = [(layer + r"1\.fn\.net\.0\.weight", 0), (layer + r"1\.fn\.net\.3\.weight", 1)]
    sizes = {
        "num_layers": read.count("number of layers", r"transformer\.layers\.(\d+)\.", _MAX_LAYERS),
        "width": read.size("width", (r"tok_emb\.weight", 1), (r"pos_emb", 2), *widths),
        "mlp_width": read.size("MLP width", *mlp_widths),
    }
    rows = read.size("size of the table", (r"tok_emb\.weight", 0), (r"bias", 1))
    length = read.size("number of positions", (r"pos_emb", 1), (r"bias", 0))
    read.finish()
    return _build_config(
        **sizes,
        num_heads=_find_heads(sizes, num_heads),
        **_split_table(rows, num_classes),
        grid_size=_find_grid(length - 1, grid_size),
    )


def _build_config(**fields: Any) -> BidirectionalTransformerConfig:
    try:
        return BidirectionalTransformerConfig(**fields)
    except ValueError as error:
        raise ConversionError(f"these sizes and options make no {NAME}: {error}") from error


def _find_heads(sizes: dict[str, int], num_heads: int | None) -> int:
    size = sizes["num_layers"], sizes["width"]
    if num_heads is None and size not in _PUBLISHED_HEADS:
        raise UntoldError(
            f"the shapes do not tell the number of heads, and {size[0]} layers of width {size[1]} "
            f"are no published size {sorted(_PUBLISHED_HEADS)}; give num_heads (--num_heads)",
            option="num_heads",
            stand_in=1,
        )
    return _PUBLISHED_HEADS[size] if num_heads is None else num_heads


def _split_table(rows: int, num_classes: int | None) -> dict[str, int]:
    if num_classes is None:
        raise UntoldError(
            f"the {rows} rows of tok_emb.weight are codes and classes together; give num_classes "
            "(--num_classes)",
            option="num_classes",
            stand_in=1,
        )
    # Beside codes and classes, the table holds the mask and the null class.
    if not 1 <= num_classes <= rows - 3:
        raise ConversionError(
            f"num_classes {num_classes} does not fit the {rows} rows of tok_emb.weight; allowed: "
            f"1 to {rows - 3}"
        )
    return {"num_classes": num_classes, "codebook_size": rows - 2 - num_classes}


def _find_grid(count: int, grid_size: tuple[int, int] | None) -> tuple[int, int]:
    side = math.isqrt(max(count, 0))
    if grid_size is None and side * side != count:
        raise UntoldError(
            f"the {count} image positions of pos_emb make no square; give grid_size (--grid_size)",
            option="grid_size",
            stand_in=(1, count),
        )
    gh, gw = (side, side) if grid_size is None else grid_size
    if gh * gw != count:
        raise ConversionError(
            f"grid_size {gh}x{gw} has {gh * gw} tokens, but pos_emb has {count} image positions"
        )
    return gh, gw


FAMILY = Family(
    name=NAME,
    kind="model",
    architecture=BidirectionalTransformerConfig.family,
    rules=RULES,
    infer_config=infer_config,
    abstract_tree=abstract_tree,
    config_type=BidirectionalTransformerConfig,
    options=("num_heads", "num_classes", "grid_size"),
    wrappers=("model_state_dict",),
    export_wrapper="model_state_dict",
)
