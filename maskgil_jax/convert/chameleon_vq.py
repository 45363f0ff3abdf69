"""Chameleon-VQ checkpoints: the release's `tokenizer/vqgan.ckpt`, or a whole Hugging Face model.

Reference: facebookresearch/chameleon, chameleon/inference/vqgan.py; huggingface/transformers,
models/chameleon/convert_chameleon_weights_to_hf.py, which puts the tokenizer under
`model.vqmodel.` and leaves its decoder out.
"""

from typing import Any

from maskgil_jax.convert import vqgan
from maskgil_jax.convert.rules import StateDict
from maskgil_jax.tokenizers.chameleon_vq import ChameleonVQConfig

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


def find_problem(state: StateDict) -> str | None:
    """Say where the decoder is, if the file has an encoder only."""
    sides = {key.split(".")[0] for key in state}
    if "encoder" not in sides or "decoder" in sides:
        return None
    return (
        "missing decoder.*: Hugging Face's Chameleon files leave it out, as that model reads "
        "images only; convert tokenizer/vqgan.ckpt of the original release instead"
    )


FAMILY = vqgan.make_vq_family(
    ChameleonVQConfig,
    vqgan.TAMING,
    find_problem=find_problem,
    wrappers=("state_dict", "model"),
    export_wrapper="state_dict",
    # Discriminator and perceptual net.
    dropped_prefixes=("loss.",),
    renames=rename,
)
