"""MaskGIL with captions, under the key names of LlamaGen's text models (`model_type="t2i"`)."""

from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from maskgil_jax.convert.inference import SizeReader
from maskgil_jax.convert.maskgil import TRANSFORMER_RULES, find_heads, read_heads, read_transformer
from maskgil_jax.convert.rules import ConversionError, Family, Rule, StateDict, TensorLike
from maskgil_jax.models.maskgil_text import MaskGILTextConfig

NAME = "maskgil-text"
_CAPTION = "cls_embedding"
RULES = (
    Rule("tok_embeddings.weight", "token_embed/embedding", "k e -> k e"),
    Rule(f"{_CAPTION}.uncond_embedding", "caption_embed/null_caption", "n t -> n t"),
    Rule(f"{_CAPTION}.cap_proj.fc1.weight", "caption_embed/up/kernel", "t e -> e t"),
    Rule(f"{_CAPTION}.cap_proj.fc2.weight", "caption_embed/out/kernel", "i e -> e i"),
    *TRANSFORMER_RULES,
)
LAYOUT = {"text": "features", "rope_base": 10000.0, "norm_eps": 1e-5}


def infer_config(
    state: StateDict,
    *,
    num_heads: int | None = None,
    grid_size: tuple[int, int] = (16, 16),
    cond_rope: str = "zero",
    qk_norm: str | None = None,
    post_norm: str | None = None,
) -> MaskGILTextConfig:
    """Infer the config of a text-conditional MaskGIL from the shapes of its state dict.

    The arguments are those of `maskgil.infer_config`. The null caption is as long as captions may
    be, as in LlamaGen.

    Raises:
        ConversionError: tensors that carry the sizes are missing, or the sizes make no model.
    """
    read = SizeReader(NAME, state, RULES)
    sizes = read_transformer(read)
    rows = read.size("codebook size", (r"tok_embeddings\.weight", 0), (r"output\.weight", 0))
    length = read.size("caption length", (rf"{_CAPTION}\.uncond_embedding", 0))
    width = read.size(
        "width of the features",
        (rf"{_CAPTION}\.uncond_embedding", 1),
        (rf"{_CAPTION}\.cap_proj\.fc1\.weight", 1),
    )
    read.finish()
    heads = read_heads(state, sizes["width"]) if num_heads is None else num_heads
    has_qk_norm = any(".attention.q_norm." in key or ".attention.k_norm." in key for key in state)
    has_post_norm = any("_post_norm." in key for key in state)
    fields: dict[str, Any] = {
        **sizes,
        "num_heads": find_heads(sizes, heads),
        "codebook_size": rows - 1,
        "text_width": width,
        "text_length": length,
        "null_length": length,
        "grid_size": grid_size,
        "cond_rope": cond_rope,
        "qk_norm": qk_norm or ("layer" if has_qk_norm else "none"),
        "post_norm": post_norm or ("rms" if has_post_norm else "none"),
        **LAYOUT,
    }
    try:
        return MaskGILTextConfig(**fields)
    except ValueError as error:
        raise ConversionError(f"these sizes and options make no {NAME}: {error}") from error


def abstract_tree(config: MaskGILTextConfig) -> dict[str, TensorLike]:
    """Return path -> shape and dtype of every parameter, without computing any."""
    tokens = jax.ShapeDtypeStruct((1, *config.grid_size), "int32")
    condition = jax.eval_shape(config.example_condition)
    init = config.make_module().init
    tree = jax.eval_shape(init, jax.random.key(0), tokens, condition)["params"]
    return flatten_dict(nn.unbox(tree), sep="/")


FAMILY = Family(
    name=NAME,
    kind="model",
    architecture="maskgil-text",
    rules=RULES,
    infer_config=infer_config,
    abstract_tree=abstract_tree,
    config_type=MaskGILTextConfig,
    options=("num_heads", "grid_size", "cond_rope", "qk_norm", "post_norm"),
    layout=LAYOUT,
    wrappers=("ema", "model", "state_dict"),
    export_wrapper="model",
    dropped={"freqs_cis": None, "causal_mask": None},
)
