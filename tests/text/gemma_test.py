"""Gemma computes what the original does, never looks at padding, and runs no layer in vain."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from goldens_lib import load_golden

from maskgil_jax.convert import import_state_dict
from maskgil_jax.sharding import make_mesh, state_shardings
from maskgil_jax.text.gemma import PUBLISHED, Gemma, GemmaConfig, take_layers

GOLDENS = {"gemma_tiny": "gemma", "gemma2_tiny": "gemma2"}
LENGTHS = [9, 5, 1]


@functools.cache
def load(name):
    golden = load_golden(name)
    settings = golden.config | {"model_type": GOLDENS[name], "pad_token_id": 0, "bos_token_id": 2}
    config, params = import_state_dict(GOLDENS[name], golden.state_dict, settings=settings)
    return golden, config, params


def compute(config, params, ids, lengths, hidden_layer=-1, dtype="float32"):
    module = config.make_module(hidden_layer=hidden_layer, dtype=dtype)
    kept = take_layers(params, config, module.depth)
    return np.asarray(apply(module, kept, np.asarray(ids), np.asarray(lengths)))


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, ids, lengths):
    return module.apply({"params": params}, ids, lengths)


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_hidden_states(name):
    golden, config, params = load(name)
    ids, lengths = golden.arrays["input_ids"], golden.arrays["lengths"]
    assert lengths.min() < ids.shape[1], "one sequence is padded"
    valid = np.arange(ids.shape[1]) < lengths[:, None]
    for hidden_layer, expected in ((-1, "last_hidden"), (-2, "penultimate")):
        found = compute(config, params, ids, lengths, hidden_layer)
        np.testing.assert_allclose(found[valid], golden.arrays[expected][valid], atol=1e-4, rtol=0)
        assert not found[~valid].any()


@pytest.mark.parametrize("name", GOLDENS)
def test_every_hidden_state_is_that_of_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    # Other sizes than the goldens: heads whose sum is not the width, a window, a scalar.
    sizes = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=4)
    sizes |= dict(num_attention_heads=6, num_key_value_heads=3, head_dim=10, rms_norm_eps=1e-5)
    sizes |= dict(max_position_embeddings=32, rope_parameters={"rope_theta": 50.0})
    sizes["rope_parameters"]["rope_type"] = "default"
    if name == "gemma2_tiny":
        sizes |= dict(query_pre_attn_scalar=7, sliding_window=3, attn_logit_softcapping=2.0)
        theirs = transformers.Gemma2Model(transformers.Gemma2Config(**sizes))
    else:
        theirs = transformers.GemmaModel(transformers.GemmaConfig(**sizes))
    theirs = theirs.eval()
    theirs.set_attn_implementation("eager")
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    settings = theirs.config.to_dict()
    state = {key: tensor.detach().numpy() for key, tensor in theirs.state_dict().items()}
    config, params = import_state_dict(GOLDENS[name], state, settings=settings)
    ids = np.random.default_rng(0).integers(0, 50, (3, 9), np.int32)
    valid = np.arange(9) < np.array(LENGTHS)[:, None]
    with torch.no_grad():
        output = theirs(
            input_ids=torch.from_numpy(ids.astype(np.int64)),
            attention_mask=torch.from_numpy(valid.astype(np.int64)),
            output_hidden_states=True,
        )
    assert len(output.hidden_states) == 5
    for index, expected in enumerate(output.hidden_states):
        found = compute(config, params, ids, LENGTHS, index)
        difference = np.abs(found[valid] - expected.numpy()[valid]).max()
        assert difference < 1e-4 * max(1, np.abs(expected.numpy()).max()), index


@pytest.mark.parametrize("name", GOLDENS)
def test_padding_and_what_comes_later_change_nothing(name):
    _, config, params = load(name)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 256, (3, 9), np.int32)
    whole = compute(config, params, ids, LENGTHS)
    changed = ids.copy()
    for row, length in zip(changed, LENGTHS, strict=True):
        row[length:] = rng.integers(0, 10**6, 9 - length)
    np.testing.assert_array_equal(compute(config, params, changed, LENGTHS), whole)
    longer = np.concatenate([ids, ids], axis=1)
    np.testing.assert_allclose(compute(config, params, longer, LENGTHS)[:, :9], whole, atol=1e-5)
    # Causal: the last token changes itself alone.
    changed = ids.copy()
    changed[0, -1] += 1 if changed[0, -1] < 255 else -1
    found = compute(config, params, changed, LENGTHS)
    np.testing.assert_allclose(found[0, :-1], whole[0, :-1], atol=1e-6)
    assert np.abs(found[0, -1] - whole[0, -1]).max() > 1e-3


def test_a_window_looks_back_no_further_in_every_other_layer():
    _, config, params = load("gemma2_tiny")
    assert config.sliding_window == 8
    ids = np.random.default_rng(2).integers(0, 256, (1, 12), np.int32)
    changed = ids.copy()
    changed[0, 0] = (changed[0, 0] + 1) % 256

    def differs(hidden_layer):
        one, two = (compute(config, params, x, [12], hidden_layer) for x in (ids, changed))
        return (np.abs(one - two).max(axis=-1)[0] > 1e-6).tolist()

    assert differs(1) == [True] * 8 + [False] * 4
    assert differs(2) == [True] * 12


@pytest.mark.parametrize("name", GOLDENS)
def test_an_empty_sequence_is_zero_and_a_strange_id_is_loud(name):
    _, config, params = load(name)
    ids = np.full((2, 9), 7, np.int32)
    found = compute(config, params, ids, [0, 9])
    assert not found[0].any()
    assert np.isfinite(found).all()
    assert found[1].any()
    for strange in (256, -1):
        ids[1, 4] = strange
        assert np.isnan(compute(config, params, ids, [0, 9])[1]).all()


def test_layers_beyond_the_chosen_one_are_neither_kept_nor_run():
    _, config, params = load("gemma2_tiny")
    kept = take_layers(params, config, 2)
    assert kept.keys() == {"embedding", "layers"}
    assert {len(leaf) for leaf in jax.tree.leaves(kept["layers"])} == {2}
    assert take_layers(params, config, 0).keys() == {"embedding"}
    module = config.make_module(hidden_layer=2)
    template = nn.unbox(config.abstract_params(hidden_layer=2))
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, template)
    ids = jax.ShapeDtypeStruct((1, 4), "int32")
    traced = jax.make_jaxpr(module.apply)({"params": kept}, ids, np.array([4]))
    (scan,) = [eqn for eqn in traced.eqns if eqn.primitive.name == "scan"]
    assert scan.params["length"] == 2


@pytest.mark.parametrize("name", GOLDENS)
def test_bfloat16_is_near_and_stays_bfloat16(name):
    golden, config, params = load(name)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    config = dataclasses.replace(config, param_dtype="bfloat16")
    ids, lengths = golden.arrays["input_ids"], golden.arrays["lengths"]
    found = compute(config, narrow, ids, lengths, dtype="bfloat16")
    assert found.dtype == jnp.bfloat16
    expected = golden.arrays["last_hidden"]
    valid = np.arange(ids.shape[1]) < lengths[:, None]
    error = np.abs(found.astype(np.float32) - expected)[valid]
    assert error.mean() < 0.05 * np.abs(expected[valid]).mean()


@pytest.mark.parametrize("name", GOLDENS)
def test_parameters_split_over_a_mesh_give_the_same(name):
    golden, config, params = load(name)
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    shardings = state_shardings(config.abstract_params(), mesh)
    placed = jax.device_put(params, shardings)
    assert not placed["embedding"].sharding.is_fully_replicated
    assert not placed["layers"]["mlp"]["gate_up"]["kernel"].sharding.is_fully_replicated
    ids, lengths = golden.arrays["input_ids"], golden.arrays["lengths"]
    found = jax.jit(config.make_module().apply)({"params": placed}, ids, lengths)
    expected = compute(config, params, ids, lengths)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-4)


TINY = dict(vocab_size=9, num_layers=2, width=4, mlp_width=6, num_heads=2, num_kv_heads=1)
TINY |= dict(head_dim=4, bos_id=1)


def test_published_sizes():
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(config.abstract_params())))
        for name, config in PUBLISHED.items()
    }
    # As Hugging Face counts them on the pages of the models: 2.51 and 2.61 billion.
    assert counts == {"google/gemma-2b": 2_506_172_416, "google/gemma-2-2b": 2_614_341_888}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"generation": 3}, "generation 3 is unknown; allowed: 1, 2"),
        ({"num_layers": 0}, "num_layers 0 must be at least 1"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads 3 / num_kv_heads 2"),
        ({"head_dim": 3}, "head_dim 3 must be an even number"),
        ({"norm_eps": 0.0}, "norm_eps 0.0 must be more than 0"),
        ({"generation": 1, "sliding_window": 4}, "are of generation 2"),
        ({"bos_id": 9}, "bos_id 9 is out of range; allowed: 0 to 8"),
        (
            {"param_dtype": "float16"},
            "allowed: float32, bfloat16",
        ),
    ],
)
def test_sizes_that_make_no_model_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GemmaConfig(**{"generation": 2, **TINY, **wrong})


@pytest.mark.parametrize("generation", [1, 2])
def test_settings_of_hugging_face_come_back(generation):
    more = dict(query_scalar=5, attention_softcap=3.0, sliding_window=2) if generation == 2 else {}
    config = GemmaConfig(generation=generation, **TINY, rope_base=7.0, **more)
    settings = config.to_hugging_face()
    assert GemmaConfig.from_hugging_face(settings) == config
    assert GemmaConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="model_type 'gemma3'; allowed: gemma, gemma2"):
        GemmaConfig.from_hugging_face(settings | {"model_type": "gemma3"})
    with pytest.raises(ValueError, match="hidden_size 4.5, which must be a whole number"):
        GemmaConfig.from_hugging_face(settings | {"hidden_size": 4.5})
    del settings["head_dim"], settings["hidden_size"]
    with pytest.raises(ValueError, match="lacks hidden_size, head_dim"):
        GemmaConfig.from_hugging_face(settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention_bias": True},
        {"hidden_activation": "gelu"},
        {"rope_scaling": {"type": "linear"}},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"layer_types": ["full_attention"] * 2},
        {"use_bidirectional_attention": True},
    ],
)
def test_what_no_gemma_has_is_refused_by_name(wrong):
    settings = GemmaConfig(generation=2, **TINY).to_hugging_face()
    name = "rope_type" if "rope_parameters" in wrong else next(iter(wrong))
    with pytest.raises(ValueError, match=f"no published gemma2 has: {name}"):
        GemmaConfig.from_hugging_face(settings | wrong)


def test_hidden_layers_are_counted_from_both_ends():
    config = GemmaConfig(generation=1, **TINY)
    assert [config.find_depth(i) for i in (0, 1, 2, -1, -2, -3)] == [0, 1, 2, 2, 1, 0]
    for wrong in (3, -4, True):
        with pytest.raises(ValueError, match="allowed: 0 .embeddings. to 2"):
            config.find_depth(wrong)
    assert isinstance(config.make_module(), Gemma)
