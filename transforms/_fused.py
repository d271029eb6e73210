"""A chain and its step in one pass over memory: what is element-wise in it as one call of generated C++.

XLA on the CPU makes a loop for each result: AdamW's step reads and writes ten tensors where seven are enough.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.core import Tracer
from jax.extend import core

from chainrule.native.loop_text import CALLS, inner, is_tensor, supports
from chainrule.transforms._protocols import Tree

Step = Callable[..., tuple[Tree, Tree]]


def fused(tx: optax.GradientTransformation) -> Step:
    r"""The step of a chain, update and addition, whose element-wise part is one pass over memory on the CPU.

    $$(p, s, g) \mapsto (p + u, s'), \quad (u, s') = \mathrm{update}(g, s, p)$$

    For use inside `jax.jit` with parameters and state donated, which are then written in place. (JAX pairs what is
    donated with results of the same type in order: a function that takes them in another order than it returns them
    gets copies.) The step is traced; what makes the new parameters and state element by element becomes one foreign
    call of C++ that is generated and compiled for it (half a second, once for each chain), which reads and writes each
    tensor once. Counts, schedules, sums over tensors, products of matrices, functions such as `exp` and whatever else
    has no loop stay XLA's. Numbers differ from those of `tx.update` under `jit` by rounding alone.

    XLA computes the whole step on other platforms, on several devices, in `jax.export`, under `vmap` and in
    derivatives, and where the compiled kernel or a C++ compiler (`CXX`, or `c++`) is missing, which a warning says.
    Outside `jax.jit` the step runs operation by operation, as optax does.

    Args:
      tx: any gradient transformation; its state stays what `tx.init` makes.

    Returns:
      A function of the parameters, the state, the gradients and the extra arguments of `tx.update`, by name, which
      returns the new parameters and the new state.

    Raises:
      RuntimeError: when the step is compiled, if the C++ compiler fails.

    >>> tx = optax.adamw(1e-3)
    >>> params = {"w": jax.numpy.ones((8, 4))}
    >>> step = jax.jit(fused(tx), donate_argnums=(0, 1))
    >>> params, state = step(params, tx.init(params), {"w": jax.numpy.ones((8, 4))})
    >>> round(float(params["w"][0, 0]), 6)
    0.999
    """
    tx = optax.with_extra_args_support(tx)

    def step(params: Tree, state: Tree, grads: Tree, **extra: Any) -> tuple[Tree, Tree]:
        def plain(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
            updates, new = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), new

        given = (params, state, grads)
        if not any(isinstance(x, Tracer) for x in jax.tree.leaves(given)):
            return plain(*given)
        closed, shape = jax.make_jaxpr(plain, return_shape=True)(*given)
        is_alike = jax.tree.structure(shape) == jax.tree.structure(given[:2])
        new = _run(closed, jax.tree.leaves(given), _updated(closed.jaxpr) if is_alike else {})
        return jax.tree.unflatten(jax.tree.structure(shape), new)

    return step


def _updated(jaxpr: core.Jaxpr) -> dict[Any, Any]:
    """The input that each output is the next value of, for outputs that have one of their own type."""
    pairs = zip(jaxpr.outvars, jaxpr.invars, strict=False)  # the gradients are last
    return {out: x for out, x in pairs if _type(out) == _type(x) and _is_variable(out)}


def _type(v: Any) -> Any:
    return v.aval.shape, v.aval.dtype


def _run(closed: core.ClosedJaxpr, inputs: Sequence[Any], updated: dict[Any, Any]) -> list[Any]:
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
        (number[updated[v]], i) for i, v in enumerate(results) if updated.get(v) in number
    )
    parts = {"invars": operands, "outvars": results, "eqns": eqns}
    tail = core.ClosedJaxpr(_part(jaxpr, constvars=[], effects=frozenset(), **parts), [])
    # Imported by the first step: a session without one does not need it.
    from chainrule.native.loops import loops

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
