"""Gemma and Gemma 2 under the key names of Hugging Face: one family for each generation.

The number of heads and a few constants leave no trace in the shapes: `config.json`, which lies
beside the weights, tells them. The head of the language model, a copy of the embedding where a file
has it, is left out.

Reference: `modeling_gemma.py` and `modeling_gemma2.py` of Hugging Face transformers.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
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
from maskgil_jax.text.gemma import DTYPES, GemmaConfig
from maskgil_jax.text.tokenization import TOKENIZER_FILE

_MAX_LAYERS = 1000
_PREFIX = "model."
_HEAD = "lm_head.weight"
# What old files keep beside the weights: the rotary frequencies.
_BUFFER = re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

_LAYER = "layers.{n}"
_COMMON = (
    Rule("embed_tokens.weight", "embedding", "v e -> v e"),
    Rule(
        f"{_LAYER}.self_attn.q_proj.weight", "layers/attention/query/kernel", "n e h d -> (h d) e"
    ),
    Rule(
        f"{_LAYER}.self_attn.{{t:k_proj|v_proj}}.weight",
        "layers/attention/key_value/kernel",
        "n e t k d -> (k d) e",
    ),
    Rule(f"{_LAYER}.self_attn.o_proj.weight", "layers/attention/out/kernel", "n h d e -> e (h d)"),
    Rule(
        f"{_LAYER}.mlp.{{g:gate_proj|up_proj}}.weight",
        "layers/mlp/gate_up/kernel",
        "n e g f -> f e",
    ),
    Rule(f"{_LAYER}.mlp.down_proj.weight", "layers/mlp/down/kernel", "n f e -> e f"),
    Rule("norm.weight", "final_norm/scale", "e -> e"),
)
# The same name means the norm before the MLP in the first generation, and after attention in the
# second.
_NORMS = {
    1: {"input": "attention", "post_attention": "mlp"},
    2: {
        "input": "attention",
        "post_attention": "attention_post",
        "pre_feedforward": "mlp",
        "post_feedforward": "mlp_post",
    },
}
RULES = {
    generation: (
        *_COMMON,
        *(
            Rule(f"{_LAYER}.{theirs}_layernorm.weight", f"layers/{ours}_norm/scale", "n e -> e")
            for theirs, ours in norms.items()
        ),
    )
    for generation, norms in _NORMS.items()
}
# What leaves no trace in the shapes, to compare them without knowing it.
_UNTOLD: dict[str, Any] = {"max_position_embeddings": 1, "bos_token_id": 0, "pad_token_id": 0}
_STAND_IN: dict[int, dict[str, Any]] = {
    1: _UNTOLD | {"model_type": "gemma"},
    2: _UNTOLD
    | {
        "model_type": "gemma2",
        "query_pre_attn_scalar": 1,
        "attn_logit_softcapping": None,
        "sliding_window": None,
    },
}


def strip_language_model(state: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Leave out the head and the frequencies, and the prefix that a model with a head has."""
    kept = {key: value for key, value in state.items() if key != _HEAD}
    notes = ["ignored the head of the language model"] if len(kept) < len(state) else []
    if kept and all(key.startswith(_PREFIX) for key in kept):
        kept = {key.removeprefix(_PREFIX): value for key, value in kept.items()}
        notes.append(f"removed the prefix {_PREFIX!r} from every key")
    plain = {key: value for key, value in kept.items() if not _BUFFER.fullmatch(key)}
    if count := len(kept) - len(plain):
        notes.append(f"ignored {count} buffers of rotary frequencies")
    return plain, "; ".join(notes)


def _read_dtype(state: StateDict, widen: bool) -> str:
    """Return the type of most tensors where parameters may have it, else float32."""
    dtypes = Counter(str(getattr(t, "dtype", "")).removeprefix("torch.") for t in state.values())
    most = dtypes.most_common(1)[0][0] if dtypes else ""
    return most if most in DTYPES and not widen else "float32"


def _make_inference(family: str, generation: int) -> Callable[..., GemmaConfig]:
    def infer_config(
        state: StateDict, *, settings: Mapping[str, Any] | None = None, widen: bool = False
    ) -> GemmaConfig:
        """Return the config that `config.json` describes, in the type that the tensors have.

        Args:
            settings: the parsed file.
            widen: whether bfloat16 becomes float32.

        Raises:
            ConversionError: tensors that carry the sizes are missing, or the settings are of
                another model or no valid ones.
            UntoldError: there are no settings.
        """
        read = SizeReader(family, state, RULES[generation])
        attention, mlp = r"layers\.\d+\.self_attn\.", r"layers\.\d+\.mlp\."
        query_rows = ((attention + r"q_proj\.weight", 0), (attention + r"o_proj\.weight", 1))
        rows = read.size("width of the queries", *query_rows)
        key_rows = read.size("width of the keys", (attention + r"[kv]_proj\.weight", 0))
        head_dim = math.gcd(rows, key_rows)
        widths = [
            (r"norm\.weight", 0),
            (r"embed_tokens\.weight", 1),
            (mlp + r"down_proj\.weight", 0),
        ]
        # Those of the file, with heads that make the same shapes.
        shapes = {
            "num_hidden_layers": read.count("number of layers", r"layers\.(\d+)\.", _MAX_LAYERS),
            "vocab_size": read.size("vocabulary", (r"embed_tokens\.weight", 0)),
            "hidden_size": read.size("width", *widths),
            "intermediate_size": read.size(
                "MLP width", (mlp + r"(gate|up)_proj\.weight", 0), (mlp + r"down_proj\.weight", 1)
            ),
            "num_attention_heads": rows // head_dim,
            "num_key_value_heads": key_rows // head_dim,
            "head_dim": head_dim,
        }
        read.finish()
        if settings is None:
            raise UntoldError(
                f"the shapes of a {family} do not tell its heads and constants; its config.json "
                "does, which must lie beside the weights",
                option="settings",
                stand_in=shapes | _STAND_IN[generation],
            )
        try:
            config = GemmaConfig.from_hugging_face(settings, param_dtype=_read_dtype(state, widen))
        except ValueError as error:
            raise ConversionError(str(error)) from error
        if config.generation != generation:
            raise ConversionError(
                f"config.json has model_type {settings['model_type']!r}, but the tensors are those "
                f"of {family!r}; the files do not belong together"
            )
        return config

    return infer_config


def abstract_tree(config: GemmaConfig) -> dict[str, TensorLike]:
    """Return path -> shape and dtype of every parameter, without computing any."""
    return flatten_dict(nn.unbox(config.abstract_params()), sep="/")


def _make_family(name: str, generation: int) -> Family:
    return Family(
        name=name,
        kind="text-encoder",
        architecture=GemmaConfig.family,
        rules=RULES[generation],
        infer_config=_make_inference(name, generation),
        abstract_tree=abstract_tree,
        config_type=GemmaConfig,
        options=("settings",),
        layout={"generation": generation},
        wrappers=("state_dict", "model"),
        export_wrapper="state_dict",
        renames=strip_language_model,
        settings_file="config.json",
        copied_files=(TOKENIZER_FILE,),
        write_settings=GemmaConfig.to_hugging_face,
        keeps_bfloat16=True,
    )


FAMILY = _make_family("gemma", 1)
FAMILY_2 = _make_family("gemma2", 2)
