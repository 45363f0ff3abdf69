"""MaskGIL checkpoints of the released code: one shared embedding table, the class token last.

Reference: synbol/MaskGIL. Its checkpoints hold the weights under `model_state_dict`.
"""

from maskgil_jax.convert.inference import SizeReader
from maskgil_jax.convert.maskgil import (
    TRANSFORMER_RULES,
    abstract_tree,
    build_config,
    find_heads,
    read_transformer,
)
from maskgil_jax.convert.rules import Family, Rule, StateDict
from maskgil_jax.models.maskgil import MaskGILConfig

NAME = "maskgil-released"
RULES = (Rule("tok_emb.weight", "token_embed/embedding", "k e -> k e"), *TRANSFORMER_RULES)
LAYOUT = {
    "rope_base": 10000.0,
    "norm_eps": 1e-5,
    "condition": "last",
    "rope": "1d",
    "cond_rope": "table",
    "embeddings": "shared",
    "qk_norm": "none",
    "post_norm": "none",
}


def infer_config(
    state: StateDict,
    *,
    num_heads: int | None = None,
    grid_size: tuple[int, int] = (16, 16),
) -> MaskGILConfig:
    """Infer the config of a released checkpoint from the shapes of its state dict.

    Args:
        num_heads: needed where (layers, width) is no published size.
        grid_size: rows and columns of the token grid; shapes do not tell it.

    Raises:
        ConversionError: tensors that carry the sizes are missing, or the sizes make no model.
    """
    read = SizeReader(NAME, state, RULES)
    sizes = read_transformer(read)
    # The table holds the codes, the mask, the classes and the null class; the head the first two.
    head_rows = read.size("codebook size", (r"output\.weight", 0))
    rows = read.size("number of classes", (r"tok_emb\.weight", 0))
    if rows < head_rows + 2:
        read.problem(
            f"tok_emb.weight has {rows} rows, at least {head_rows + 2} are needed for the "
            f"{head_rows} of output.weight, one class and the null class"
        )
    read.finish()
    return build_config(
        NAME,
        **sizes,
        num_heads=find_heads(sizes, num_heads),
        codebook_size=head_rows - 1,
        num_classes=rows - head_rows - 1,
        grid_size=grid_size,
        **LAYOUT,
    )


FAMILY = Family(
    name=NAME,
    kind="model",
    architecture="maskgil",
    rules=RULES,
    infer_config=infer_config,
    abstract_tree=abstract_tree,
    config_type=MaskGILConfig,
    options=("num_heads", "grid_size"),
    layout=LAYOUT,
    wrappers=("model_state_dict",),
    export_wrapper="model_state_dict",
    # Tables that the code computes anew; some versions register them as buffers.
    dropped={"freqs_cis": None, "causal_mask": None},
)
