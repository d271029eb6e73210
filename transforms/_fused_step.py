"""A traced step in two: what XLA computes, then loops of generated C++ for its element-wise end."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from chainrule.native.loop_text import CALLS, inner, is_tensor, supports
from chainrule.native.loops import loops


def updated(jaxpr: core.Jaxpr) -> dict[Any, Any]:
    """The input that each output is the next value of, for outputs that have one of their own type."""
    pairs = zip(jaxpr.outvars, jaxpr.invars, strict=False)  # the gradients are last
    return {out: x for out, x in pairs if _type(out) == _type(x) and _is_variable(out)}


def _type(v: Any) -> Any:
    return v.aval.shape, v.aval.dtype


def run(closed: core.ClosedJaxpr, inputs: Sequence[Any], replaced: dict[Any, Any]) -> list[Any]:
    """The outputs of a jaxpr: what loops cannot do by XLA, then the loops."""
    jaxpr = closed.jaxpr
    eqns, results = _tail(jaxpr)
    if not results:
        return core.jaxpr_as_fun(closed)(*inputs)
    made = {v for eqn in eqns for v in eqn.outvars}
    operands = list(dict.fromkeys(v for eqn in eqns for v in _variables(eqn) if v not in made))
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *inputs), strict=True))
    ready = known.keys() | set(results)
    wanted = (*filter(_is_variable, jaxpr.outvars), *operands)
    from_xla = [v for v in dict.fromkeys(wanted) if v not in ready]
    before = core.ClosedJaxpr(_part(jaxpr, outvars=from_xla), closed.consts)
    known |= zip(from_xla, core.jaxpr_as_fun(before)(*inputs), strict=True)
    number = {v: i for i, v in enumerate(operands)}
    aliases = tuple(
        (number[replaced[v]], i) for i, v in enumerate(results) if replaced.get(v) in number
    )
    parts = {"invars": operands, "outvars": results, "eqns": eqns}
    tail = core.ClosedJaxpr(_part(jaxpr, constvars=[], effects=frozenset(), **parts), [])
    values = loops.bind(*(known[v] for v in operands), jaxpr=tail, aliases=aliases)
    known |= zip(results, values, strict=True)
    return [known[v] if _is_variable(v) else v.val for v in jaxpr.outvars]


def _part(jaxpr: core.Jaxpr, **parts: Any) -> core.Jaxpr:
    """Some equations of a jaxpr, which need not take and return what it does."""
    return jaxpr.replace(debug_info=jaxpr.debug_info.with_unknown_names(), **parts)


def _variables(eqn: core.JaxprEqn) -> list[Any]:
    return [v for v in eqn.invars if _is_variable(v)]


def _tail(jaxpr: core.Jaxpr) -> tuple[list[core.JaxprEqn], list[Any]]:
    """The equations from which loops make outputs, and these outputs.

    What a call needs in memory, such as a product of matrices or a sum in the kernel, XLA makes for it anyway, and
    loops read it there.
    """
    maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars if supports(eqn) and is_tensor(v)}
    for eqn in jaxpr.eqns:
        if not _reads_in_passing(eqn):
            for v in _variables(eqn):
                maker.pop(v, None)
    results = [v for v in dict.fromkeys(filter(_is_variable, jaxpr.outvars)) if v in maker]
    taken, waiting = set(), list(results)
    while waiting:
        eqn = maker.get(waiting.pop())
        if eqn is not None and id(eqn) not in taken:
            taken.add(id(eqn))
            waiting += _variables(eqn)
    return [eqn for eqn in jaxpr.eqns if id(eqn) in taken], results


def _is_variable(v: Any) -> bool:
    return isinstance(v, core.Var)


def _reads_in_passing(eqn: core.JaxprEqn) -> bool:
    """Whether XLA fuses what makes the operands into the equation."""
    if eqn.primitive.name in CALLS:
        return all(map(_reads_in_passing, inner(eqn).eqns))
    return supports(eqn) or eqn.primitive.name.startswith("reduce_")
