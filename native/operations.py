"""How many floating-point operations a traced function makes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from chainrule.native.primitives import OPERATIONS

_SUMS = {"reduce_sum", "reduce_max", "reduce_min", "argmax", "argmin"}
_FREE = {
    *(
        "broadcast_in_dim",
        "reshape",
        "transpose",
        "squeeze",
        "slice",
        "concatenate",
        "convert_element_type",
    ),
    *(
        "copy",
        "select_n",
        "iota",
        "expand_dims",
        "optimization_barrier",
        "split",
        "stack",
        "unstack",
    ),
    *(
        "dynamic_slice",
        "bitcast_convert_type",
        "pad",
        "gather",
        "scatter",
        "random_wrap",
        "random_unwrap",
    ),
    *(
        "dynamic_update_slice",
        "stop_gradient",
        "chainrule_alike",
        "rev",
        "random_bits",
        "threefry2x32",
    ),
}


def operations_of(jaxpr: core.Jaxpr, uncounted: set[str]) -> int:
    """Floating-point operations of a jaxpr of whole tensors; `uncounted` gets the primitives that it cannot count.

    >>> jaxpr = jax.make_jaxpr(lambda x, y: (x @ y).sum() + 1)(jnp.ones((2, 3)), jnp.ones((3, 4)))
    >>> operations_of(jaxpr.jaxpr, set())
    57
    """
    total = 0
    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, _shaped(eqn.outvars[0])
        inner = list(_inner(eqn.params.values()))
        if name in OPERATIONS:
            form = jax.make_jaxpr(
                lambda *xs, e=eqn: OPERATIONS[e.primitive.name].form(*xs, **e.params)
            )
            total += operations_of(form(*(v.aval for v in eqn.invars)).jaxpr, uncounted)
        elif inner and name in ("scan", "while", "cond"):
            uncounted.add(name)
        elif inner:
            total += sum(operations_of(each, uncounted) for each in inner)
        elif name == "dot_general":
            total += (
                2
                * out.size
                * contracted(_shaped(eqn.invars[0]).shape, eqn.params["dimension_numbers"])
            )
        elif name in _SUMS:
            total += _shaped(eqn.invars[0]).size
        elif name not in _FREE and out.shape == _largest(eqn.invars):
            total += out.size * bool(jnp.issubdtype(out.dtype, jnp.inexact))
        elif name not in _FREE:
            uncounted.add(name)
    return total


def _shaped(var: Any) -> Any:
    return var.aval


def _largest(invars: Iterable[Any]) -> tuple[int, ...]:
    return max((v.aval.shape for v in invars), key=math.prod, default=())


def _inner(params: Iterable[Any]) -> Iterator[core.Jaxpr]:
    for value in params:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def contracted(shape: Sequence[int], dimension_numbers: Any) -> int:
    """Terms of each entry of a product, from the shape of its left factor."""
    ((left, _), *_) = dimension_numbers
    return math.prod(shape[i] for i in left)
