"""The language model of Chameleon and Lumina-mGPT under the key names of Hugging Face.

Shapes tell the sizes, heads included, but not the positions nor the base of the rotary embedding:
`config.json`, which lies beside the weights, does. The encoder of images that some files carry is
left out; with its decoder, from the original release, it is the family `chameleon-vq`.

Reference: `modeling_chameleon.py` of Hugging Face transformers; Lumina-mGPT, whose files have the
same names.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

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
from maskgil_jax.models.chameleon import ChameleonConfig
from maskgil_jax.models.transformer import DTYPES
from maskgil_jax.text.tokenization import TOKENIZER_FILE

NAME = "chameleon"
_MAX_LAYERS = 1000
_IMAGES = "model.vqmodel."
# What old files keep beside the weights: the rotary frequencies.
_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

_LAYER, _LAYERS = "model.layers.{n}", "transformer/layers"
_PROJECTION, _ATTENTION = f"{_LAYER}.self_attn.{{t:%s}}.weight", f"{_LAYERS}/attention"
RULES = (
    Rule("model.embed_tokens.weight", "embed/embedding", "v e -> v e"),
    Rule(_PROJECTION % "q_proj|k_proj|v_proj", f"{_ATTENTION}/qkv/kernel", "n e t h d -> (h d) e"),
    # Where heads are grouped, the same tensors make two leaves.
    Rule(f"{_LAYER}.self_attn.q_proj.weight", f"{_ATTENTION}/q/kernel", "n e h d -> (h d) e"),
    Rule(_PROJECTION % "k_proj|v_proj", f"{_ATTENTION}/kv/kernel", "n e t g d -> (g d) e"),
    Rule(f"{_LAYER}.self_attn.o_proj.weight", f"{_ATTENTION}/out/kernel", "n h d e -> e (h d)"),
    *(
        Rule(
            f"{_LAYER}.self_attn.{{c:q_norm|k_norm}}.{theirs}",
            f"{_ATTENTION}/{{c:q_norm|k_norm}}/{ours}",
            "n h d -> h d",
        )
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    ),
    Rule(
        f"{_LAYER}.mlp.{{g:gate_proj|up_proj}}.weight",
        f"{_LAYERS}/mlp/gate_up/kernel",
        "n e g f -> f e",
    ),
    Rule(f"{_LAYER}.mlp.down_proj.weight", f"{_LAYERS}/mlp/down/kernel", "n f e -> e f"),
    Rule(f"{_LAYER}.input_layernorm.weight", f"{_LAYERS}/attention_norm/scale", "n e -> e"),
    Rule(f"{_LAYER}.post_attention_layernorm.weight", f"{_LAYERS}/mlp_norm/scale", "n e -> e"),
    Rule("model.norm.weight", "transformer/final_norm/scale", "e -> e"),
    Rule("lm_head.weight", "head/kernel", "e v -> v e"),
)


def leave_out_images(state: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Leave out the encoder of images, and the frequencies."""
    kept = {key: value for key, value in state.items() if not key.startswith(_IMAGES)}
    notes = []
    if count := len(state) - len(kept):
        notes.append(f"ignored {count} tensors of the image tokenizer under {_IMAGES!r}")
    plain = {key: value for key, value in kept.items() if not _BUFFER.fullmatch(key)}
    if count := len(kept) - len(plain):
        notes.append(f"ignored {count} buffers of rotary frequencies")
    return plain, "; ".join(notes)


def _read_dtype(state: StateDict, widen: bool) -> str:
    """Return the type of most tensors where parameters may have it, else float32."""
    dtypes = Counter(str(getattr(t, "dtype", "")).removeprefix("torch.") for t in state.values())
    most = dtypes.most_common(1)[0][0] if dtypes else ""
    return most if most in DTYPES and not widen else "float32"


def infer_config(
    state: StateDict, *, settings: Mapping[str, Any] | None = None, widen: bool = False
) -> ChameleonConfig:
    """Return the config that `config.json` describes, in the type that the tensors have.

    Args:
        settings: the parsed file.
        widen: whether bfloat16 becomes float32.

    Raises:
        ConversionError: tensors that carry the sizes are missing, or the settings are of another
            model or no valid ones.
        UntoldError: there are no settings.
    """
    read = SizeReader(NAME, state, RULES)
    layer = r"model\.layers\.\d+\."
    widths = [
        (r"model\.norm\.weight", 0),
        (layer + r"(input|post_attention)_layernorm\.weight", 0),
        (layer + r"self_attn\.o_proj\.weight", 0),
    ]
    mlp = [(layer + r"mlp\.(gate|up)_proj\.weight", 0), (layer + r"mlp\.down_proj\.weight", 1)]
    ends = [(r"model\.embed_tokens\.weight", 0), (r"lm_head\.weight", 0)]
    norm = layer + r"self_attn\.%s_norm\.(weight|bias)"
    shapes = {
        "num_hidden_layers": read.count("number of layers", r"model\.layers\.(\d+)\.", _MAX_LAYERS),
        "vocab_size": read.size("vocabulary", *ends),
        "hidden_size": read.size("width", *widths),
        "intermediate_size": read.size("MLP width", *mlp),
        "num_attention_heads": read.size("number of heads", (norm % "q", 0)),
        "num_key_value_heads": read.size("number of heads of the keys", (norm % "k", 0)),
    }
    read.finish()
    if settings is None:
        raise UntoldError(
            f"the shapes of a {NAME} do not tell its positions and constants; its config.json "
            "does, which must lie beside the weights",
            option="settings",
            stand_in=shapes | {"model_type": NAME, "max_position_embeddings": 1},
        )
    try:
        return ChameleonConfig.from_hugging_face(settings, param_dtype=_read_dtype(state, widen))
    except ValueError as error:
        raise ConversionError(str(error)) from error


def abstract_tree(config: ChameleonConfig) -> dict[str, TensorLike]:
    """Return path -> shape and dtype of every parameter, without computing any."""
    return flatten_dict(nn.unbox(config.abstract_params()), sep="/")


FAMILY = Family(
    name=NAME,
    kind="language-model",
    architecture=ChameleonConfig.family,
    rules=RULES,
    infer_config=infer_config,
    abstract_tree=abstract_tree,
    config_type=ChameleonConfig,
    options=("settings",),
    layout={"norm_eps": 1e-5},
    wrappers=("state_dict", "model"),
    export_wrapper="state_dict",
    renames=leave_out_images,
    settings_file="config.json",
    copied_files=(TOKENIZER_FILE,),
    write_settings=ChameleonConfig.to_hugging_face,
    keeps_bfloat16=True,
)
