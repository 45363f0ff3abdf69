import jax
import numpy as np
import pytest

from maskgil_jax.convert.rules import Family, Plan, Rule, export_tree, import_tree, plan_slots

LAYERS, WIDTH, HEADS, DIM, MLP = 3, 12, 2, 6, 5


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def family_of(*rules):
    return Family(
        name="some",
        kind="model",
        architecture="some",
        rules=rules,
        infer_config=lambda state: None,
        abstract_tree=lambda config: {},
        config_type=dict,
        wrappers=("model",),
        export_wrapper="model",
    )


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_layers_are_stacked_and_heads_split_as_the_torch_code_views_them():
    rule = Rule("layers.{n}.wqkv.weight", "layers/qkv", "n e t h d -> (t h d) e")
    state = {
        f"layers.{n}.wqkv.weight": random((3 * HEADS * DIM, WIDTH), seed=n) for n in range(LAYERS)
    }
    template = {"layers/qkv": abstract(LAYERS, WIDTH, 3, HEADS, DIM)}
    leaf = import_tree(Plan.make(family_of(rule), template), state)["layers/qkv"]
    x = random((4, WIDTH), seed=9)
    for n in range(LAYERS):
        q, k, v = np.split(x @ state[f"layers.{n}.wqkv.weight"].T, 3, axis=1)
        for t, wanted in enumerate((q, k, v)):
            got = np.einsum("be,ehd->bhd", x, leaf[n, :, t])
            np.testing.assert_allclose(got, wanted.reshape(4, HEADS, DIM), rtol=1e-5, atol=1e-5)


def test_two_torch_keys_share_a_leaf_in_the_order_of_their_words():
    rule = Rule("layers.{n}.{g:w1|w3}.weight", "layers/gate_up", "n e g f -> f e")
    state = {
        f"layers.{n}.{word}.weight": random((MLP, WIDTH), seed=10 * n + g)
        for n in range(LAYERS)
        for g, word in enumerate(("w1", "w3"))
    }
    template = {"layers/gate_up": abstract(LAYERS, WIDTH, 2, MLP)}
    leaf = import_tree(Plan.make(family_of(rule), template), state)["layers/gate_up"]
    np.testing.assert_array_equal(leaf[2, :, 0], state["layers.2.w1.weight"].T)
    np.testing.assert_array_equal(leaf[2, :, 1], state["layers.2.w3.weight"].T)


@pytest.mark.parametrize(
    ("key", "path", "layout", "shape"),
    [
        ("{c:a|b}.weight", "{c:a|b}/kernel", "kh kw i o -> o i kh kw", (3, 2, 4, 5)),
        ("a.{i}.weight", "a_{i}/scale", "c -> c", (7,)),
        ("l.{n}.wo", "l/out", "n h d e -> e (h d)", (3, 2, 6, 12)),
        ("l.{n}.qkv", "l/qkv", "n e t h d -> (t h d) e", (3, 12, 3, 2, 6)),
        ("l.{n}.{g:w1|w3}", "l/gate_up", "n e g f -> f e", (3, 12, 2, 5)),
    ],
)
def test_export_undoes_import_and_import_undoes_export(key, path, layout, shape):
    family = family_of(Rule(key, path, layout))
    place = path.replace("{c:a|b}", "b").replace("{i}", "4")
    leaves, template = {place: random(shape)}, {place: abstract(*shape)}
    plan = Plan.make(family, template)
    state = export_tree(family, plan, leaves)
    back = import_tree(plan, state)
    assert back[place].tobytes() == leaves[place].tobytes()
    again = export_tree(family, plan, back)
    assert all(again[name].tobytes() == state[name].tobytes() for name in state)
    assert all(array.flags.c_contiguous for array in state.values())


@pytest.mark.parametrize("layout", ["a b -> a", "a b -> a b b", "a b -> (a c) b", "a a -> a a"])
def test_a_layout_that_cannot_be_inverted_is_refused(layout):
    with pytest.raises(ValueError, match="layout"):
        Rule("x.weight", "x", layout)


def test_every_leaf_fits_exactly_one_rule_and_every_key_one_leaf():
    one, same = Rule("a.{i}", "a_{i}", "c -> c"), Rule("b.{i}", "{c:a|b}_{i}", "c -> c")
    with pytest.raises(ValueError, match="fits 2 rules"):
        plan_slots((one, same), {"a_1": abstract(3)})
    with pytest.raises(ValueError, match="fits 0 rules"):
        plan_slots((one, same), {"c_1": abstract(3)})
    with pytest.raises(ValueError, match="fill both"):
        plan_slots(
            (one, same, Rule("b.{i}", "c_{i}", "c -> c")),
            dict.fromkeys(("b_1", "c_1"), abstract(3)),
        )
    with pytest.raises(ValueError, match="expects axes"):
        plan_slots((one,), {"a_1": abstract(3, 3)})
    with pytest.raises(ValueError, match="axis g is 3"):
        plan_slots((Rule("{g:a|b}", "x", "g c -> c"),), {"x": abstract(3, 3)})


def test_a_path_may_count_from_the_last():
    rules = (
        Rule("up.{i}.block.{j}", "up_{~i}_res_{j}", "c -> c"),
        Rule("up.{i}.upsample", "up_{~i}_upsample", "c -> c"),
    )
    template = {f"up_{i}_res_{j}": abstract(i + 1) for i in range(12) for j in range(2)}
    # The last level has none: the count must come from all rules of the levels.
    template |= {f"up_{i}_upsample": abstract(i + 1) for i in range(11)}
    slots = plan_slots(rules, template)
    assert len(slots) == len(template)
    assert slots["up.0.block.1"].leaf == "up_11_res_1"
    assert slots["up.11.block.0"].leaf == "up_0_res_0"
    assert slots["up.1.upsample"].leaf == "up_10_upsample"
    with pytest.raises(ValueError, match="it is the path that counts from the last"):
        Rule("up.{~i}.block", "up_{i}", "c -> c")
