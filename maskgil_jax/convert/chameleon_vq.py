"""Chameleon-VQ checkpoints: the release's `tokenizer/vqgan.ckpt`, or a whole Hugging Face model.

Reference: facebookresearch/chameleon, chameleon/inference/vqgan.py; huggingface/transformers,
models/chameleon/convert_chameleon_weights_to_hf.py, which puts the tokenizer under
`model.vqmodel.` and leaves its decoder out.
"""

from typing import Any

from maskgil_jax.convert import vqgan
from maskgil_jax.convert.inference import SizeReader
from maskgil_jax.convert.rules import Family, StateDict
from maskgil_jax.tokenizers.chameleon_vq import ChameleonVQConfig

NAME = "chameleon-vq"
RULES = vqgan.taming_rules(level_attention=False)
_HUGGING_FACE = "model.vqmodel."
_LANGUAGE_MODEL = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")


def rename(state: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Take the tokenizer out of a whole Hugging Face model; other state dicts stay as they are."""
    if not any(key.startswith(_HUGGING_FACE) for key in state):
        return state, ""
    kept = {}
    for key, value in state.items():
        if key.startswith(_LANGUAGE_MODEL):
            continue
        name = key.removeprefix(_HUGGING_FACE)
        # Of two tensors for one place neither may hide the other: this one stays a stranger.
        kept[key if name in state else name] = value
    ignored = len(state) - len(kept)
    return kept, (
        f"removed the prefix {_HUGGING_FACE!r}; ignored {ignored} tensors of the language model"
    )


def infer_config(state: StateDict) -> ChameleonVQConfig:
    """Infer the sizes of a Chameleon-VQ from the shapes of its state dict.

    Raises:
        ConversionError: tensors that carry the sizes are missing, or the sizes make no model.
    """
    read = SizeReader(NAME, state, RULES)
    sides = {key.split(".")[0] for key in state}
    if "encoder" in sides and "decoder" not in sides:
        read.problem(
            "missing decoder.*: Hugging Face's Chameleon files leave it out, as that model reads "
            "images only; convert tokenizer/vqgan.ckpt of the original release instead"
        )
    return vqgan.infer_vq_config(ChameleonVQConfig, read, r"encoder\.down\.", r"\.block\.")


FAMILY = Family(
    name=NAME,
    kind="tokenizer",
    architecture=NAME,
    rules=RULES,
    infer_config=infer_config,
    abstract_tree=vqgan.abstract_tree,
    config_type=ChameleonVQConfig,
    wrappers=("state_dict", "model"),
    export_wrapper="state_dict",
    layout={"l2_normalize": False, "level_attention": False},
    # Discriminator and perceptual net.
    dropped_prefixes=("loss.",),
    renames=rename,
)
