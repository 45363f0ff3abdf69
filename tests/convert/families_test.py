import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from goldens_lib import FOLDER, load_golden

from maskgil_jax.convert import (
    FAMILIES,
    ConversionError,
    choose_family,
    export_state_dict,
    find_family,
    import_state_dict,
)
from maskgil_jax.convert.rules import plan_slots
from maskgil_jax.models.maskgil import MaskGILConfig
from maskgil_jax.tokenizers.llamagen_vq import LlamaGenVQConfig

TINY = {
    "llamagen_vq_tiny": ("llamagen-vq", {}),
    "maskgil_released_tiny": ("maskgil-released", {"num_heads": 2}),
    "bidirectional_llama_tiny": ("maskgil", {"num_heads": 2, "grid_size": (8, 8)}),
}
FULL = {
    "llamagen_vq16_full": ("llamagen-vq", {"channel_multipliers": (1, 1, 2, 2, 4)}),
    "llamagen_vq8_full": ("llamagen-vq", {"channel_multipliers": (1, 2, 2, 4)}),
    "maskgil_released_b_full": ("maskgil-released", {"num_heads": 12, "num_classes": 1000}),
}
BUFFER = "quantize.codebook_used"


def random_params(family, config, seed=0):
    rng = np.random.default_rng(seed)
    template = find_family(family).abstract_tree(config)
    leaves = {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in template.items()}
    return unflatten_dict(leaves, sep="/")


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype
        assert one[name].shape == two[name].shape, name
        assert one[name].tobytes() == two[name].tobytes(), name


@pytest.mark.parametrize("golden", TINY)
def test_export_of_an_import_is_the_file_bit_for_bit(golden):
    family, options = TINY[golden]
    state = load_golden(golden).state_dict
    config, params = import_state_dict(family, state, **options)
    exported = export_state_dict(family, config, params)
    if family == "llamagen-vq":
        assert exported.pop(BUFFER).shape == (65536,)
    assert_same(exported, state)


MASKGIL = {
    "num_layers": 3,
    "width": 32,
    "num_heads": 2,
    "mlp_width": 48,
    "codebook_size": 20,
    "num_classes": 5,
    "grid_size": (2, 3),
}
PAIRS = [
    ("llamagen-vq", LlamaGenVQConfig(codebook_size=11, channels=32, channel_multipliers=(1, 3))),
    ("llamagen-vq", LlamaGenVQConfig(channels=64, channel_multipliers=(2,), image_channels=1)),
    ("maskgil", MaskGILConfig(**MASKGIL, cond_rope="zero")),
    ("maskgil", MaskGILConfig(**MASKGIL, qk_norm="layer", post_norm="rms")),
    (
        "maskgil-released",
        MaskGILConfig(**MASKGIL, **find_family("maskgil-released").layout),
    ),
]


@pytest.mark.parametrize(("family", "config"), PAIRS)
def test_import_of_an_export_is_the_model_bit_for_bit(family, config):
    params = random_params(family, config)
    state = export_state_dict(family, config, jax.tree.map(jax.numpy.asarray, params))
    options = {"num_heads": 2, "grid_size": (2, 3)} if "maskgil" in family else {}
    if family == "maskgil":
        options["cond_rope"] = config.cond_rope
    found, back = import_state_dict(family, state, **options)
    assert found == config
    assert_same(flatten_dict(back, sep="/"), flatten_dict(params, sep="/"))


@pytest.mark.parametrize("golden", FULL)
def test_published_sizes_are_inferred_from_shapes_alone(golden):
    name, wanted = FULL[golden]
    family = find_family(name)
    described = json.loads((FOLDER / f"{golden}.json").read_text())["state_dict"]
    state = {
        key: jax.ShapeDtypeStruct(tuple(shape), dtype)
        for key, (shape, dtype) in described.items()
        if key != BUFFER
    }
    config = family.infer_config(state)
    assert {field: getattr(config, field) for field in wanted} == wanted
    assert config.codebook_size == 16384
    slots = plan_slots(family.rules, family.abstract_tree(config))
    assert {key: slot.shape for key, slot in slots.items()} == {
        k: v.shape for k, v in state.items()
    }
    for key in state:
        assert sum(rule.key_regex.fullmatch(key) is not None for rule in family.rules) == 1, key


def test_everything_wrong_is_reported_at_once():
    state = dict(load_golden("llamagen_vq_tiny").state_dict)
    del state["encoder.conv_in.weight"]
    state["extra\x1b[2J"] = np.zeros(3, np.float32)
    state["encoder.conv_blocks.9999.res.0.conv1.weight"] = np.zeros(3, np.float32)
    state["decoder.mid.1.q.weight"] = np.zeros((64, 63, 1, 1), np.float32)
    state["quant_conv.weight"] = state["quant_conv.weight"].astype(np.float16)
    state["norm_out"] = 3
    with pytest.raises(ConversionError) as caught:
        import_state_dict("llamagen-vq", state)
    assert sorted(caught.value.problems) == [
        "missing encoder.conv_in.weight [32, 3, 3, 3]",
        "unexpected 'extra\\x1b[2J'",
        "unexpected encoder.conv_blocks.9999.res.0.conv1.weight",
        "unexpected norm_out",
        "wrong dtype of quant_conv.weight: float16, expected float32",
        "wrong shape of decoder.mid.1.q.weight: [64, 63, 1, 1], expected [64, 64, 1, 1]",
    ]


def test_nothing_is_read_before_all_of_it_fits():
    class Unreadable(np.ndarray):
        def __array__(self, *args, **kwargs):
            raise AssertionError("a tensor was read")

    state = dict(load_golden("maskgil_released_tiny").state_dict)
    state = {key: value.view(Unreadable) for key, value in state.items()}
    del state["norm.weight"]
    with pytest.raises(ConversionError, match=r"missing norm\.weight \[64\]"):
        import_state_dict("maskgil-released", state, num_heads=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_another_family_names_what_its_sizes_would_need(family):
    other = "maskgil_released_tiny" if family != "maskgil-released" else "llamagen_vq_tiny"
    with pytest.raises(ConversionError, match="cannot be inferred") as caught:
        import_state_dict(family, load_golden(other).state_dict)
    assert any(problem.startswith("unexpected") for problem in caught.value.problems)


def test_wrapper_prefixes_and_computed_buffers_are_removed_and_said(caplog):
    state = load_golden("maskgil_released_tiny").state_dict
    wrapped = {f"module._orig_mod.{key}": value for key, value in state.items()}
    wrapped["module._orig_mod.freqs_cis"] = np.zeros((257, 16, 2), np.float32)
    with caplog.at_level("INFO", "maskgil_jax.convert"):
        config, params = import_state_dict("maskgil-released", wrapped, num_heads=2)
    assert [name in caplog.text for name in ("'module.'", "'_orig_mod.'", "freqs_cis")] == [
        True
    ] * 3
    assert_same(export_state_dict("maskgil-released", config, params), state)


def test_heads_grid_and_options():
    state = load_golden("maskgil_released_tiny").state_dict
    with pytest.raises(ConversionError, match="--num_heads"):
        import_state_dict("maskgil-released", state)
    with pytest.raises(ConversionError, match="width 64 / num_heads 3"):
        import_state_dict("maskgil-released", state, num_heads=3)
    config, _ = import_state_dict("maskgil-released", state, num_heads=4, grid_size=(8, 32))
    assert (config.num_heads, config.grid_size, config.num_classes) == (4, (8, 32), 10)
    with pytest.raises(ValueError, match="no option cond_rope; its options: num_heads, grid_size"):
        import_state_dict("maskgil-released", state, cond_rope="zero")
    with pytest.raises(ValueError, match="did you mean 'llamagen-vq'"):
        import_state_dict("llamagen_vq", state)


def test_a_table_too_short_for_the_head_is_refused():
    state = dict(load_golden("maskgil_released_tiny").state_dict)
    state["tok_emb.weight"] = state["tok_emb.weight"][:66]
    with pytest.raises(ConversionError, match="66 rows, at least 67"):
        import_state_dict("maskgil-released", state, num_heads=2)


def test_an_export_refuses_parameters_and_layouts_that_do_not_fit():
    config = MaskGILConfig(**MASKGIL)
    params = random_params("maskgil", config)
    params["head"]["bias"] = np.zeros(3, np.float32)
    del params["transformer"]["final_norm"]
    with pytest.raises(
        ConversionError, match=r"missing transformer/final_norm/scale(.|\n)*head/bias"
    ):
        export_state_dict("maskgil", config, params)
    with pytest.raises(ConversionError, match="embeddings is 'separate', the layout has 'shared'"):
        export_state_dict("maskgil-released", config, params)


def test_the_family_of_an_export_follows_from_the_config():
    released = PAIRS[-1][1]
    assert choose_family("maskgil", released.to_dict()) == ("maskgil-released", released)
    assert choose_family("maskgil", MaskGILConfig(**MASKGIL).to_dict())[0] == "maskgil"
    with pytest.raises(ConversionError, match="maskgil: condition is 'last'"):
        choose_family("maskgil", MaskGILConfig(**MASKGIL, condition="last").to_dict())
    with pytest.raises(ConversionError, match="allowed: llamagen-vq"):
        choose_family("chameleon", {})
