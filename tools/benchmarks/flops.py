"""Count the operations of a function, 2 per multiply-add, as the floors of the table are counted.

Only matrix products and convolutions count. XLA's own analysis is no help here: it counts the body
of a loop once, adds what is element-wise, and leaves out what multiplies padding.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Return the operations of one call, without computing it.

    Args:
        function: what is traced; its loops are scans, of a known length.
        *args: arrays or their shapes, as `jax.eval_shape` takes them.

    Raises:
        ValueError: if how often a part runs is known only when it runs.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = _shape(equation.invars[0])
        terms = math.prod(left[axis] for axis in contracted)
        return 2 * math.prod(_shape(equation.outvars[0])) * terms
    if name == "conv_general_dilated":
        # One output is a sum over the window and the input channels of its group.
        kernel = _shape(equation.invars[1])
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(_shape(equation.outvars[0])) * (math.prod(kernel) // outputs)
    inside = sum(map(_count, _inner(params)))
    if inside and name in ("cond", "while"):
        raise ValueError(f"a {name!r} holds matrix products; how often they run is not known")
    return inside * params.get("length", 1) if name == "scan" else inside


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
