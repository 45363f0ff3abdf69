import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_text
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
from maskgil_jax.models.bert import BidirectionalTransformerConfig
from maskgil_jax.models.llamagen import LlamaGenConfig
from maskgil_jax.models.llamagen_text import LlamaGenTextConfig
from maskgil_jax.models.maskgil import MaskGILConfig
from maskgil_jax.models.maskgil_text import MaskGILTextConfig
from maskgil_jax.tokenizers.chameleon_vq import ChameleonVQConfig
from maskgil_jax.tokenizers.llamagen_vq import LlamaGenVQConfig
from maskgil_jax.tokenizers.maskgit_vq import MaskGITVQConfig
from maskgil_jax.tokenizers.open_magvit2 import OpenMAGVIT2Config


def settings_of(golden, model_type):
    """The `config.json` of a golden: its config and what every such file has."""
    described = json.loads((FOLDER / f"{golden}.json").read_text())["config"]
    return described | {"model_type": model_type}


TINY = {
    "llamagen_vq_tiny": ("llamagen-vq", {}),
    "maskgit_vq_tiny": ("maskgit-vq", {}),
    "chameleon_vq_tiny": ("chameleon-vq", {}),
    "open_magvit2_tiny": ("open-magvit2", {}),
    "maskgil_released_tiny": ("maskgil-released", {"num_heads": 2}),
    "bidirectional_llama_tiny": ("maskgil", {"num_heads": 2, "grid_size": (8, 8)}),
    "llamagen_ar_tiny": ("llamagen", {"num_heads": 2, "grid_size": (8, 8)}),
    "llamagen_ar_t2i_tiny": ("llamagen-text", {"num_heads": 2, "grid_size": (8, 8)}),
    "bidirectional_transformer_tiny": (
        "bidirectional-transformer",
        {"num_heads": 4, "num_classes": 10},
    ),
    "gemma_tiny": ("gemma", {"settings": settings_of("gemma_tiny", "gemma")}),
    "gemma2_tiny": ("gemma2", {"settings": settings_of("gemma2_tiny", "gemma2")}),
    "chameleon_lm_tiny": (
        "chameleon",
        {
            "settings": settings_of("chameleon_lm_tiny", "chameleon")
            | {"max_position_embeddings": 64}
        },
    ),
}
FULL = {
    "llamagen_vq16_full": ("llamagen-vq", vars(LlamaGenVQConfig())),
    "llamagen_vq8_full": (
        "llamagen-vq",
        vars(LlamaGenVQConfig(channel_multipliers=(1, 2, 2, 4))),
    ),
    "maskgit_vq_full": ("maskgit-vq", vars(MaskGITVQConfig())),
    "chameleon_vq_full": ("chameleon-vq", vars(ChameleonVQConfig())),
    "open_magvit2_full": ("open-magvit2", vars(OpenMAGVIT2Config())),
    "llamagen_ar_b_full": (
        "llamagen",
        {"num_heads": 12, "num_classes": 1000, "codebook_size": 16384},
    ),
    "maskgil_released_b_full": (
        "maskgil-released",
        {"num_heads": 12, "num_classes": 1000, "codebook_size": 16384},
    ),
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
    if family == "chameleon":
        # With the encoder of images, which is no part of the language model.
        state = {key: x for key, x in state.items() if not key.startswith("model.vqmodel.")}
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
CAPTIONED = {name: value for name, value in MASKGIL.items() if name != "num_classes"}
CAPTIONED |= {"text_width": 12, "text_length": 7, "cond_rope": "zero"}
VQ = {"codebook_size": 11, "embed_dim": 6, "channels": 32, "latent_channels": 5}
PAIRS = [
    ("llamagen-vq", LlamaGenVQConfig(codebook_size=11, channels=32, channel_multipliers=(1, 3))),
    ("llamagen-vq", LlamaGenVQConfig(channels=64, channel_multipliers=(2,), image_channels=1)),
    ("maskgit-vq", MaskGITVQConfig(**VQ, channel_multipliers=(2, 1, 3, 1))),
    ("maskgit-vq", MaskGITVQConfig(**VQ, channel_multipliers=(1,), image_channels=1)),
    ("chameleon-vq", ChameleonVQConfig(**VQ, channel_multipliers=(1, 2, 1))),
    ("open-magvit2", OpenMAGVIT2Config(channels=32, channel_multipliers=(1, 2, 1))),
    ("open-magvit2", OpenMAGVIT2Config(codebook_size=2, channels=32, channel_multipliers=(2,))),
    ("maskgil", MaskGILConfig(**MASKGIL, cond_rope="zero")),
    ("maskgil", MaskGILConfig(**MASKGIL, qk_norm="layer", post_norm="rms")),
    (
        "maskgil-released",
        MaskGILConfig(**MASKGIL, **find_family("maskgil-released").layout),
    ),
    ("llamagen", LlamaGenConfig(**MASKGIL, cond_rope="zero")),
    ("llamagen", LlamaGenConfig(**MASKGIL, qk_norm="layer", post_norm="rms")),
    ("llamagen-text", LlamaGenTextConfig(**CAPTIONED)),
    ("maskgil-text", MaskGILTextConfig(**CAPTIONED, null_length=7)),
    ("maskgil-text", MaskGILTextConfig(**CAPTIONED, null_length=1)),
    ("bidirectional-transformer", BidirectionalTransformerConfig(**MASKGIL)),
    ("gemma", tiny_text.gemma_config(1)),
    ("gemma2", tiny_text.gemma_config(2)),
    ("chameleon", tiny_text.chameleon_config()),
    ("chameleon", tiny_text.chameleon_config(num_kv_heads=6)),
]


@pytest.mark.parametrize(("family", "config"), PAIRS)
def test_import_of_an_export_is_the_model_bit_for_bit(family, config):
    params = random_params(family, config)
    state = export_state_dict(family, config, jax.tree.map(jax.numpy.asarray, params))
    every = {"num_heads": 2, "grid_size": (2, 3), "num_classes": 5, "text_length": 7}
    options = {name: every[name] for name in every if name in find_family(family).options}
    if "cond_rope" in find_family(family).options:
        options["cond_rope"] = config.cond_rope
    if "settings" in find_family(family).options:
        options["settings"] = config.to_hugging_face()
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


@pytest.mark.parametrize("family", ["maskgit-vq", "chameleon-vq", "open-magvit2"])
def test_losses_of_training_are_ignored_and_said(family, caplog):
    state = load_golden(f"{family.replace('-', '_')}_tiny").state_dict
    training = {
        "loss.discriminator.main.0.weight": np.zeros((4, 3, 4, 4), np.float32),
        "loss.discriminator.main.3.num_batches_tracked": np.zeros((), np.int64),
    }
    with caplog.at_level("INFO", "maskgil_jax.convert"):
        config, params = import_state_dict(family, state | training)
    assert "ignored 2 tensors under 'loss.'" in caplog.text
    assert_same(export_state_dict(family, config, params), state)


def with_averages(state, change=lambda value: value + 1):
    """Return the plain weights with the moving average that LitEma keeps beside them."""
    averages = {f"model_ema.{key.replace('.', '')}": change(v) for key, v in state.items()}
    return state | averages


def test_moving_averages_are_taken_where_there_are_any(caplog):
    state = load_golden("open_magvit2_tiny").state_dict
    wrapped = with_averages(state) | {
        "model_ema.decay": np.zeros((), np.float32),
        "model_ema.num_updates": np.zeros((), np.int32),
        "model_ema.lossdiscriminatormain0weight": np.zeros(3, np.float32),
        "loss.discriminator.main.0.weight": np.zeros(3, np.float32),
    }
    with caplog.at_level("INFO", "maskgil_jax.convert"):
        config, params = import_state_dict("open-magvit2", wrapped)
    count = len(state)
    assert f"took {count} moving averages, under 'model_ema.', in place of {count}" in caplog.text
    for told in ("model_ema.decay", "model_ema.num_updates", "'loss.'", "'model_ema.loss'"):
        assert told in caplog.text
    exported = export_state_dict("open-magvit2", config, params)
    assert_same(exported, {key: value + 1 for key, value in state.items()})
    alone = {key: value for key, value in wrapped.items() if key.startswith("model_ema.")}
    from_alone = import_state_dict("open-magvit2", alone)[1]
    assert_same(flatten_dict(from_alone, sep="/"), flatten_dict(params, sep="/"))
    caplog.clear()
    with caplog.at_level("INFO", "maskgil_jax.convert"):
        import_state_dict("open-magvit2", state)
    assert "there is no moving average of them" in caplog.text


def test_moving_averages_and_weights_are_never_mixed():
    state = with_averages(load_golden("open_magvit2_tiny").state_dict)
    del state["model_ema.decoderup1block0norm1weight"]
    state["model_ema.encoderstranger"] = np.zeros(3, np.float32)
    with pytest.raises(ConversionError) as caught:
        import_state_dict("open-magvit2", state)
    assert sorted(caught.value.problems) == [
        "missing decoder.up.1.block.0.norm1.weight [64]",
        "unexpected model_ema.encoderstranger",
    ]


LANGUAGE_MODEL = {
    "model.embed_tokens.weight": np.zeros((9, 4), np.float32),
    "model.layers.0.self_attn.q_proj.weight": np.zeros((4, 4), np.float32),
    "model.norm.weight": np.zeros(4, np.float32),
    "lm_head.weight": np.zeros((9, 4), np.float32),
}


def test_a_whole_hugging_face_model_gives_its_tokenizer(caplog):
    state = load_golden("chameleon_vq_tiny").state_dict
    whole = {f"model.vqmodel.{key}": value for key, value in state.items()} | LANGUAGE_MODEL
    with caplog.at_level("INFO", "maskgil_jax.convert"):
        config, params = import_state_dict("chameleon-vq", whole)
    assert "'model.vqmodel.'; ignored 4 tensors of the language model" in caplog.text
    assert_same(export_state_dict("chameleon-vq", config, params), state)
    whole["model.stranger"] = np.zeros(3, np.float32)
    with pytest.raises(ConversionError, match="unexpected model.stranger"):
        import_state_dict("chameleon-vq", whole)


def test_a_tensor_under_both_of_its_names_is_refused():
    state = load_golden("chameleon_vq_tiny").state_dict
    twice = {f"model.vqmodel.{key}": value for key, value in state.items()}
    twice["quant_conv.bias"] = state["quant_conv.bias"] + 1
    with pytest.raises(ConversionError) as caught:
        import_state_dict("chameleon-vq", twice)
    assert caught.value.problems == ("unexpected model.vqmodel.quant_conv.bias",)


def test_half_precision_is_widened_exactly_where_asked(caplog):
    state = load_golden("chameleon_vq_tiny").state_dict
    halves = {key: value.astype(jnp.bfloat16) for key, value in state.items()}
    halves["quant_conv.bias"] = state["quant_conv.bias"].astype(np.float16)
    halves["encoder.conv_in.bias"] = state["encoder.conv_in.bias"]
    with pytest.raises(ConversionError) as caught:
        import_state_dict("chameleon-vq", halves)
    assert len(caught.value.problems) == len(state) - 1
    assert "wrong dtype of quant_conv.weight: bfloat16, expected float32" in caught.value.problems
    whole = {f"model.vqmodel.{key}": value for key, value in halves.items()} | LANGUAGE_MODEL
    with caplog.at_level("INFO", "maskgil_jax.convert"):
        config, params = import_state_dict("chameleon-vq", whole, widen=True)
    assert f"widened {len(state) - 1} of {len(state)} tensors to float32" in caplog.text
    expected = {key: value.astype(np.float32) for key, value in halves.items()}
    assert_same(export_state_dict("chameleon-vq", config, params), expected)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8, bool])
def test_widening_takes_no_other_type(dtype):
    state = dict(load_golden("maskgil_released_tiny").state_dict)
    state["norm.weight"] = state["norm.weight"].astype(dtype)
    state["output.weight"] = state["output.weight"].astype(np.float16)
    with pytest.raises(ConversionError) as caught:
        import_state_dict("maskgil-released", state, num_heads=2, widen=True)
    name = np.dtype(dtype).name
    assert caught.value.problems == (f"wrong dtype of norm.weight: {name}, expected float32",)


def test_a_chameleon_without_a_decoder_is_told_where_one_is():
    state = load_golden("chameleon_vq_tiny").state_dict
    published = {
        f"model.vqmodel.{key}": value
        for key, value in state.items()
        if not key.startswith("decoder.")
    }
    with pytest.raises(ConversionError, match=r"tokenizer/vqgan\.ckpt") as caught:
        import_state_dict("chameleon-vq", published | LANGUAGE_MODEL)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["missing decoder.*"]


def test_levels_of_a_decoder_count_from_the_other_end():
    config = MaskGITVQConfig(**VQ, channel_multipliers=(1, 2, 3))
    params = random_params("maskgit-vq", config)
    state = export_state_dict("maskgit-vq", config, params)
    for ours, theirs in ((0, 2), (1, 1), (2, 0)):
        kernel = params["decoder"][f"up_{ours}_res_1"]["conv2"]["kernel"]
        key = f"decoder.up.{theirs}.block.1.conv2.weight"
        np.testing.assert_array_equal(state[key], kernel.transpose(3, 2, 0, 1))
    assert "decoder.up.2.attn.0.q.weight" in state
    assert "decoder.up.0.upsample.conv.weight" not in state


def test_layouts_refuse_what_they_do_not_say():
    config = ChameleonVQConfig(**VQ, level_attention=True)
    with pytest.raises(ConversionError, match="level_attention is True, the layout has False"):
        choose_family("chameleon-vq", config.to_dict())
    config = MaskGITVQConfig(**VQ, l2_normalize=True)
    with pytest.raises(ConversionError, match="l2_normalize is True, the layout has False"):
        export_state_dict("maskgit-vq", config, random_params("maskgit-vq", config))


def test_heads_grid_and_options():
    state = load_golden("maskgil_released_tiny").state_dict
    with pytest.raises(ConversionError, match="--num_heads"):
        import_state_dict("maskgil-released", state)
    for family, golden in ((f, name) for name, (f, _) in TINY.items() if "maskgil" in f):
        with pytest.raises(ConversionError, match="num_heads 0 must be at least 1"):
            import_state_dict(family, load_golden(golden).state_dict, num_heads=0)
    with pytest.raises(ConversionError, match="width 64 / num_heads 3"):
        import_state_dict("maskgil-released", state, num_heads=3)
    config, _ = import_state_dict("maskgil-released", state, num_heads=4, grid_size=(8, 32))
    assert (config.num_heads, config.grid_size, config.num_classes) == (4, (8, 32), 10)
    with pytest.raises(ValueError, match="no option cond_rope; its options: num_heads, grid_size"):
        import_state_dict("maskgil-released", state, cond_rope="zero")
    with pytest.raises(ValueError, match="did you mean 'llamagen-vq'"):
        import_state_dict("llamagen_vq", state)


def test_one_table_of_codes_and_classes_is_told_where_it_parts():
    family = "bidirectional-transformer"
    state = dict(load_golden("bidirectional_transformer_tiny").state_dict)
    with pytest.raises(ConversionError, match="2 layers of width 64 are no .*--num_heads"):
        import_state_dict(family, state, num_classes=10)
    with pytest.raises(ConversionError, match="76 rows .* together; .*--num_classes"):
        import_state_dict(family, state, num_heads=4)
    options = {"num_heads": 4, "num_classes": 10}
    for wrong in (0, 74):
        with pytest.raises(ConversionError, match=f"num_classes {wrong} does.* allowed: 1 to 73"):
            import_state_dict(family, state, **options | {"num_classes": wrong})
    with pytest.raises(ConversionError, match="8x8 has 64 tokens, but pos_emb has 256"):
        import_state_dict(family, state, **options, grid_size=(8, 8))
    config, _ = import_state_dict(family, state, **options, grid_size=(8, 32))
    assert (config.grid_size, config.codebook_size, config.mlp_width) == ((8, 32), 64, 128)
    state["pos_emb"], state["bias"] = state["pos_emb"][:, 1:], state["bias"][1:]
    with pytest.raises(ConversionError, match="255 image positions .* no square; .*--grid_size"):
        import_state_dict(family, state, **options)


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
    released = dict(PAIRS)["maskgil-released"]
    assert choose_family("maskgil", released.to_dict()) == ("maskgil-released", released)
    assert choose_family("maskgil", MaskGILConfig(**MASKGIL).to_dict())[0] == "maskgil"
    bert = BidirectionalTransformerConfig(**MASKGIL)
    assert choose_family(bert.family, bert.to_dict()) == ("bidirectional-transformer", bert)
    with pytest.raises(ConversionError, match="maskgil: condition is 'last'"):
        choose_family("maskgil", MaskGILConfig(**MASKGIL, condition="last").to_dict())
    with pytest.raises(ConversionError, match="allowed: llamagen-vq"):
        choose_family("muse", {})
