"""MaskGIL with captions, under the key names of LlamaGen's text models (`model_type="t2i"`)."""

import dataclasses
from typing import Any

from maskgil_jax.convert import maskgil
from maskgil_jax.convert.inference import SizeReader
from maskgil_jax.convert.maskgil import (
    TRANSFORMER_RULES,
    build_config,
    read_options,
    read_transformer,
)
from maskgil_jax.convert.rules import Rule, StateDict
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


def read_captioned(
    name: str,
    state: StateDict,
    *,
    num_heads: int | None,
    qk_norm: str | None,
    post_norm: str | None,
) -> tuple[int, dict[str, Any]]:
    """Infer what a state dict tells of a model with captions.

    Returns:
        the rows of its head, and fields of its config.

    Raises:
        ConversionError: tensors that carry the sizes are missing.
    """
    read = SizeReader(name, state, RULES)
    sizes = read_transformer(read)
    rows = read.size("codebook size", (r"tok_embeddings\.weight", 0), (r"output\.weight", 0))
    length = read.size("caption length", (rf"{_CAPTION}\.uncond_embedding", 0))
    width = read.size(
        "width of the features",
        (rf"{_CAPTION}\.uncond_embedding", 1),
        (rf"{_CAPTION}\.cap_proj\.fc1\.weight", 1),
    )
    read.finish()
    options = read_options(state, sizes, num_heads=num_heads, qk_norm=qk_norm, post_norm=post_norm)
    return rows, {**sizes, **options, "text_length": length, "text_width": width}


def infer_config(
    state: StateDict,
    *,
    num_heads: int | None = None,
    grid_size: tuple[int, int] = (16, 16),
    cond_rope: str = "zero",
    qk_norm: str | None = None,
    post_norm: str | None = None,
    text_length: int | None = None,
) -> MaskGILTextConfig:
    """Infer the config of a text-conditional MaskGIL from the shapes of its state dict.

    The arguments are those of `maskgil.infer_config`, and how long captions may be: the shapes tell
    the length of the null caption only, which in LlamaGen is the same, and so it is if `None`.

    Raises:
        ConversionError: tensors that carry the sizes are missing, or the sizes make no model.
    """
    rows, fields = read_captioned(
        NAME, state, num_heads=num_heads, qk_norm=qk_norm, post_norm=post_norm
    )
    null_length = fields["text_length"]
    if text_length is not None:
        fields["text_length"] = text_length
    return build_config(
        NAME,
        MaskGILTextConfig,
        codebook_size=rows - 1,
        null_length=null_length,
        **fields,
        grid_size=grid_size,
        cond_rope=cond_rope,
        **LAYOUT,
    )


FAMILY = dataclasses.replace(
    maskgil.FAMILY,
    name=NAME,
    architecture="maskgil-text",
    rules=RULES,
    infer_config=infer_config,
    config_type=MaskGILTextConfig,
    layout=LAYOUT,
    options=(*maskgil.FAMILY.options, "text_length"),
)
