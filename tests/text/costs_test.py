import jax
import pytest
import tiny_text
from flax import linen as nn

from maskgil_jax.text.costs import estimate_cost
from maskgil_jax.text.gemma import PUBLISHED


def count_flops(jaxpr):
    """Multiplications and additions of the matrix products of a traced program, loops unrolled."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (left, _), _ = eqn.params["dimension_numbers"]
            inner = 1
            for axis in left:
                inner *= eqn.invars[0].aval.shape[axis]
            total += 2 * eqn.outvars[0].aval.size * inner
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
                total += repeats * count_flops(inner)
    return total


def shapes(batch_size, tokens):
    ids = jax.ShapeDtypeStruct((batch_size, tokens), "int32")
    return ids, jax.ShapeDtypeStruct((batch_size,), "int32")


@pytest.mark.parametrize("config", [tiny_text.gemma_config(1), *PUBLISHED.values()])
@pytest.mark.parametrize("hidden_layer", [-1, 2, 0])
def test_operations_are_those_of_the_traced_program(config, hidden_layer):
    module = config.make_module(hidden_layer=hidden_layer)
    params = nn.unbox(config.abstract_params(hidden_layer=hidden_layer))
    traced = jax.make_jaxpr(module.apply)({"params": params}, *shapes(3, 11))
    cost = estimate_cost(config, tokens=11, batch_size=3, hidden_layer=hidden_layer)
    assert cost.flops == count_flops(traced.jaxpr)
    assert (cost.flops > 0) == (hidden_layer != 0)
    assert cost.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_memory_is_about_what_the_compiler_plans():
    config = tiny_text.gemma_config(1, width=256, mlp_width=2048, head_dim=64)
    module = config.make_module()
    params = nn.unbox(config.abstract_params())
    cost = estimate_cost(config, tokens=40, batch_size=8, dtype="float32")
    program = jax.jit(lambda params, ids, lengths: module.apply({"params": params}, ids, lengths))
    planned = program.lower(params, *shapes(8, 40)).compile().memory_analysis()
    assert 0.5 * cost.working_bytes < planned.temp_size_in_bytes < cost.working_bytes
    assert abs(planned.argument_size_in_bytes - cost.parameter_bytes) < 10_000


def test_time_is_bound_by_one_rate_or_the_other():
    one, many = (estimate_cost(PUBLISHED["google/gemma-2b"], batch_size=n) for n in (1, 64))
    rates = dict(flops_per_second=1e15, bytes_per_second=1e12)
    assert one.least_seconds(**rates) == one.bytes_read / 1e12
    assert many.least_seconds(**rates) == many.flops / 1e15
    assert many.flops == 64 * one.flops


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens 0 must be at least 1"),
        ({"tokens": 9000}, "at most 8192"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"hidden_layer": 19}, "hidden_layer 19"),
        ({"dtype": "int8"}, "dtype 'int8'"),
    ],
)
def test_what_cannot_be_computed_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_cost(PUBLISHED["google/gemma-2b"], **options)
