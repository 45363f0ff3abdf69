"""A family is known by all of its tensors: any that is changed is noticed."""

import dataclasses

import numpy as np
import pytest
import tiny_text
from flax.traverse_util import unflatten_dict
from goldens_lib import load_golden

from maskgil_jax.convert import (
    FAMILIES,
    ConversionError,
    detect_family,
    export_state_dict,
    find_family,
    fit_family,
    import_state_dict,
)
from maskgil_jax.evals.inception import InceptionConfig
from maskgil_jax.models.bert import BidirectionalTransformerConfig
from maskgil_jax.models.llamagen import LlamaGenConfig
from maskgil_jax.models.llamagen_text import LlamaGenTextConfig
from maskgil_jax.models.maskgil import MaskGILConfig
from maskgil_jax.models.maskgil_text import MaskGILTextConfig
from maskgil_jax.tokenizers.chameleon_vq import ChameleonVQConfig
from maskgil_jax.tokenizers.llamagen_vq import LlamaGenVQConfig
from maskgil_jax.tokenizers.lpips import LPIPSConfig
from maskgil_jax.tokenizers.maskgit_vq import MaskGITVQConfig
from maskgil_jax.tokenizers.open_magvit2 import OpenMAGVIT2Config

GOLDENS = {
    "llamagen_vq_tiny": "llamagen-vq",
    "maskgit_vq_tiny": "maskgit-vq",
    "chameleon_vq_tiny": "chameleon-vq",
    "open_magvit2_tiny": "open-magvit2",
    "bidirectional_llama_tiny": "maskgil",
    "maskgil_released_tiny": "maskgil-released",
    "bidirectional_llama_t2i_tiny": "maskgil-text",
    "llamagen_ar_tiny": "llamagen",
    "llamagen_ar_t2i_tiny": "llamagen-text",
    "bidirectional_transformer_tiny": "bidirectional-transformer",
    "inception_fid": "inception-fid",
    "gemma_tiny": "gemma",
    "gemma2_tiny": "gemma2",
    "chameleon_lm_tiny": "chameleon",
}
# Widths that differ, so that no reshaped or transposed tensor is the same but the square ones.
VQ = {"codebook_size": 11, "embed_dim": 6, "channels": 32, "latent_channels": 5}
VQ |= {"channel_multipliers": (1, 2), "num_res_blocks": 1}
LM = {"num_layers": 2, "width": 16, "num_heads": 2, "mlp_width": 24, "codebook_size": 16}
LM |= {"num_classes": 5, "grid_size": (2, 2)}
TEXT = {name: value for name, value in LM.items() if name != "num_classes"}
TEXT |= {"text_width": 10, "text_length": 7}
SMALL = {
    "llamagen-vq": [LlamaGenVQConfig(**VQ)],
    "maskgit-vq": [MaskGITVQConfig(**VQ)],
    "chameleon-vq": [ChameleonVQConfig(**VQ)],
    "open-magvit2": [
        OpenMAGVIT2Config(
            codebook_size=64, channels=32, channel_multipliers=(1, 2), num_res_blocks=1
        )
    ],
    "inception-fid": [InceptionConfig(channels=2, num_logits=7)],
    "lpips": [LPIPSConfig(widths=(2, 3, 4, 5, 6))],
    "maskgil": [
        MaskGILConfig(**LM, cond_rope="zero"),
        MaskGILConfig(**LM, cond_rope="zero", qk_norm="layer", post_norm="rms"),
    ],
    "maskgil-released": [MaskGILConfig(**LM, **find_family("maskgil-released").layout)],
    "bidirectional-transformer": [BidirectionalTransformerConfig(**LM)],
    "maskgil-text": [
        MaskGILTextConfig(**TEXT, null_length=7, cond_rope="zero"),
        MaskGILTextConfig(
            **TEXT, null_length=7, cond_rope="zero", qk_norm="layer", post_norm="rms"
        ),
    ],
    "llamagen": [LlamaGenConfig(**LM, cond_rope="zero")],
    "llamagen-text": [LlamaGenTextConfig(**TEXT, cond_rope="zero")],
    "gemma": [tiny_text.gemma_config(1)],
    "gemma2": [tiny_text.gemma_config(2)],
    "chameleon": [tiny_text.chameleon_config(), tiny_text.chameleon_config(num_kv_heads=6)],
}
OPTIONS = {"num_heads": 2, "grid_size": (2, 2), "num_classes": 5, "cond_rope": "zero"}


@dataclasses.dataclass(frozen=True)
class Described:
    """A tensor that cannot be read."""

    shape: tuple[int, ...]
    dtype: str


def changes(key, tensor):
    """Everything that can be wrong with one tensor: what it is called -> what stands for it."""
    other = "float16" if tensor.dtype == "float32" else "float32"
    yield "drop", {}
    yield "rename", {key + "x": tensor}
    yield "add", {key: tensor, "x" + key: tensor}
    yield "one more axis", {key: Described((*tensor.shape, 1), tensor.dtype)}
    yield "dtype", {key: Described(tensor.shape, other)}
    if len(tensor.shape) > 1:
        flat = (int(np.prod(tensor.shape)),)
        yield "flatten", {key: Described(flat, tensor.dtype)}
    turned = tensor.shape[::-1]
    if turned != tensor.shape:
        yield "transpose", {key: Described(turned, tensor.dtype)}


# Of a family with more tensors, each is changed in one way only, in turn.
MANY = 400
CASES = [(family, i) for family, configs in SMALL.items() for i in range(len(configs))]


@pytest.mark.parametrize(("family", "number"), CASES)
def test_every_change_of_every_tensor_is_detected(family, number):
    config = SMALL[family][number]
    known = find_family(family)
    template = known.abstract_tree(config)
    leaves = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in template.items()}
    exported = export_state_dict(family, config, unflatten_dict(leaves, sep="/"))
    state = {
        key: Described(array.shape, str(array.dtype))
        for key, array in exported.items()
        if key not in known.dropped
    }
    assert fit_family(family, state, **OPTIONS).problems == ()
    for number, (key, tensor) in enumerate(state.items()):
        others = {name: value for name, value in state.items() if name != key}
        tried = list(changes(key, tensor))
        if len(state) > MANY:
            tried = [tried[number % len(tried)]]
        for what, instead in tried:
            assert fit_family(family, others | instead, **OPTIONS).problems, f"{what} {key}"


def test_every_family_is_tried():
    assert set(SMALL) == set(FAMILIES)
    assert set(GOLDENS.values()) == set(FAMILIES) - {"lpips"}


@pytest.mark.parametrize("golden", GOLDENS)
def test_the_family_is_known_by_its_tensors(golden):
    state = load_golden(golden).state_dict
    fit = detect_family(state)
    assert (fit.family, fit.problems) == (GOLDENS[golden], ())
    wrapped = {f"module.{key}": value for key, value in state.items()}
    assert detect_family(wrapped).family == GOLDENS[golden]


def test_half_precision_is_recognised_and_has_to_be_asked_for():
    state = load_golden("maskgit_vq_tiny").state_dict
    halves = {key: value.astype(np.float16) for key, value in state.items()}
    with pytest.raises(ConversionError, match="^maskgit-vq would fit, but .*--widen"):
        detect_family(halves)
    fit = detect_family(halves, widen=True)
    assert (fit.family, fit.problems) == ("maskgit-vq", ())
    halves["quant_conv.bias"] = state["quant_conv.bias"].astype(np.float64)
    for widen in (False, True):
        with pytest.raises(ConversionError, match="no family fits; .* nearest is maskgit-vq"):
            detect_family(halves, widen=widen)


def test_what_cannot_be_read_off_is_said():
    fit = detect_family(load_golden("bidirectional_transformer_tiny").state_dict)
    assert fit.untold == ("num_heads", "num_classes")
    given = {"num_heads": 4, "num_classes": 10}
    fit = detect_family(load_golden("bidirectional_transformer_tiny").state_dict, **given)
    assert (fit.untold, fit.config.num_heads, fit.config.num_classes) == ((), 4, 10)


def test_heads_are_read_off_query_norms():
    config = SMALL["maskgil"][1]
    template = find_family("maskgil").abstract_tree(config)
    leaves = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in template.items()}
    state = export_state_dict("maskgil", config, unflatten_dict(leaves, sep="/"))
    found, _ = import_state_dict("maskgil", state, grid_size=(2, 2))
    assert found == config


def test_attention_at_the_lowest_level_tells_two_families_apart():
    maskgit = load_golden("maskgit_vq_tiny").state_dict
    attention = [key for key in maskgit if ".attn." in key and ".mid." not in key]
    assert len(attention) == 30
    without = {key: value for key, value in maskgit.items() if key not in attention}
    assert detect_family(without).family == "chameleon-vq"
    mixed = {key: value for key, value in maskgit.items() if key not in attention[:3]}
    with pytest.raises(ConversionError, match="no family fits.*nearest is maskgit-vq") as caught:
        detect_family(mixed)
    assert sorted(p.split()[1] for p in caught.value.problems) == sorted(attention[:3])


def test_tensors_of_no_family_are_refused():
    with pytest.raises(ConversionError, match="no family fits; tried: llamagen-vq, maskgit-vq"):
        detect_family({"w": Described((3,), "float32")})
    with pytest.raises(ConversionError, match="no family fits"):
        detect_family({})
