"""Rules for calls and control flow.

Calls are inlined. A ``cond`` whose branches are cheap becomes both branches and a
``torch.where``, which neither synchronises nor breaks a compiled graph; one whose branch holds
a loop, linear algebra, a kernel call or a large matrix product becomes ``ops.branch``, a real branch that reads
the predicate on the host. A short ``scan`` is unrolled; a long one, and every ``while``, runs a
sub-graph (``ops.scan``, ``ops.while_loop``).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jax.extend import core
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.builder import Builder, Equation, Full, Rule, Target, Value
from chainrule.bridges.lowering.rules.kernel import runs_in_kernel

_LINEAR_ALGEBRA = {"svd", "qr", "eigh", "cholesky", "triangular_solve", "lu"}
_CHEAP_PRODUCT = 2**20  # multiply-adds of a dot_general that a `cond` may evaluate in vain
_UNROLLED = 2000  # equations; a longer scan stays a loop


@functools.lru_cache(maxsize=4096)
def _size(jaxpr: core.Jaxpr) -> int:
    """How many equations ``jaxpr`` runs, its calls and scans expanded."""
    return sum(_eqn_size(eqn) for eqn in jaxpr.eqns)


def _eqn_size(eqn: Equation) -> int:
    inner = sum(_size(j) for j in _jaxprs(eqn))
    return max(1, inner) * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)


def _jaxprs(eqn: Equation) -> list[core.Jaxpr]:
    return list(core.jaxprs_in_params(eqn.params))


@functools.lru_cache(maxsize=4096)
def _heavy(jaxpr: core.Jaxpr, target: Target) -> bool:
    """Whether evaluating ``jaxpr`` in vain would cost more than asking the host."""
    equations: list[Equation] = list(jaxpr.eqns)
    for eqn in equations:
        name = eqn.primitive.name
        if name == "while" or name in _LINEAR_ALGEBRA or runs_in_kernel(eqn, target):
            return True
        if name == "scan" and _eqn_size(eqn) > _UNROLLED:
            return True
        if name == "dot_general":
            contract = eqn.params["dimension_numbers"][0][0]
            depth = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
            if depth * math.prod(eqn.outvars[0].aval.shape) > _CHEAP_PRODUCT:
                return True
        if any(_heavy(j, target) for j in _jaxprs(eqn)):
            return True
    return False


def _call(parameter: str) -> Rule:
    """A call primitive: its jaxpr, inlined."""

    def rule(b: Builder, eqn: Equation, *operands: Value) -> Sequence[Value]:
        inner = eqn.params[parameter]
        if isinstance(inner, core.ClosedJaxpr):
            return b.inline(inner.jaxpr, inner.consts, operands)
        return b.inline(inner, (), operands)

    return rule


def _tensors(b: Builder, values: Sequence[Value], atoms: Sequence[Any]) -> list[fx.Node]:
    return [b.tensor(x, a.aval) for x, a in zip(values, atoms, strict=True)]


def _cond(b: Builder, eqn: Equation, index: Value, *operands: Value) -> Sequence[Value]:
    branches = eqn.params["branches"]
    if not isinstance(index, fx.Node):
        chosen = branches[min(max(int(np.real(_number(index))), 0), len(branches) - 1)]
        return b.inline(chosen.jaxpr, chosen.consts, operands)
    if any(_heavy(branch.jaxpr, b.target) for branch in branches):
        modules = [b.module(branch) for branch in branches]
        node = b.emit(ops.branch, index, modules, _tensors(b, operands, eqn.invars[1:]))
        return b.items(node, len(eqn.outvars))
    results = [b.inline(branch.jaxpr, branch.consts, operands) for branch in branches]
    out = results[-1]
    for i in reversed(range(len(branches) - 1)):
        after = _after(b, index, i)
        out = [
            x if _equal(x, y) else b.emit(torch.where, after, *_tensors(b, (y, x), (v, v)))
            for x, y, v in zip(results[i], out, eqn.outvars, strict=True)
        ]
    return out


def _number(x: Any) -> Any:
    return x.value if isinstance(x, Full) else x


def _equal(x: Value, y: Value) -> bool:
    if isinstance(x, fx.Node) or isinstance(y, fx.Node):
        return x is y
    x, y = _number(x), _number(y)
    return type(x) is type(y) and repr(x) == repr(y)


def _after(b: Builder, index: fx.Node, i: int) -> fx.Node:
    """The predicate ``index > i``; a converted bool is its own predicate."""
    if i == 0 and index.target is torch.Tensor.to:
        source = index.args[0]
        if isinstance(source, fx.Node) and source.meta["aval"].dtype == np.bool_:
            return source
    if index.meta["aval"].dtype == np.bool_:
        return index
    return b.emit(torch.gt, index, i)


def _while(b: Builder, eqn: Equation, *operands: Value) -> Sequence[Value]:
    p = eqn.params
    nodes = _tensors(b, operands, eqn.invars)
    first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    node = b.emit(
        ops.while_loop,
        b.module(p["cond_jaxpr"]),
        b.module(p["body_jaxpr"]),
        nodes[:first],
        nodes[first:second],
        nodes[second:],
    )
    return b.items(node, len(eqn.outvars))


def _scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many it carries."""
    if (
        "ft_in" in params
    ):  # JAX 0.11 on: (constants, carry, xs), each with an entry for every operand
        constants, carry, _ = params["ft_in"].unpack()
        return len(constants), len(carry)
    return params["num_consts"], params["num_carry"]


def _scan(b: Builder, eqn: Equation, *operands: Value) -> Sequence[Value]:
    p = eqn.params
    length, reverse, body = p["length"], bool(p["reverse"]), p["jaxpr"]
    first, carried = _scan_counts(p)
    second = first + carried
    stacked = eqn.outvars[carried:]
    if length and _eqn_size(eqn) > _UNROLLED:
        nodes = _tensors(b, operands, eqn.invars)
        node = b.emit(
            ops.scan,
            b.module(body),
            nodes[:first],
            nodes[first:second],
            nodes[second:],
            length,
            reverse,
        )
        return b.items(node, len(eqn.outvars))
    constants, carry = list(operands[:first]), list(operands[first:second])
    xs = _tensors(b, operands[second:], eqn.invars[second:])
    rows: list[list[fx.Node]] = []
    for i in reversed(range(length)) if reverse else range(length):
        slices = [b.emit(torch.select, x, 0, i) for x in xs]
        for node, var in zip(slices, body.jaxpr.invars[second:], strict=True):
            node.meta["aval"] = var.aval
        out = b.inline(body.jaxpr, body.consts, [*constants, *carry, *slices])
        carry = out[: len(carry)]
        rows.append(_tensors(b, out[len(carry) :], body.jaxpr.outvars[len(carry) :]))
    if reverse:
        rows.reverse()
    if not length:
        return [*carry, *(Full(0, v.aval) for v in stacked)]
    return [*carry, *(b.emit(torch.stack, column) for column in zip(*rows, strict=True))]


def _same(b: Builder, eqn: Equation, *operands: Value) -> Sequence[Value]:
    return operands


CONTROL: dict[str, Rule] = {
    "checkpoint": _call("jaxpr"),
    "closed_call": _call("call_jaxpr"),
    "cond": _cond,
    "core_call": _call("call_jaxpr"),
    "custom_jvp_call": _call("call_jaxpr"),
    "custom_vjp_call": _call("call_jaxpr"),
    "custom_vjp_call_jaxpr": _call("call_jaxpr"),
    "custom_vmap_call": _call("call"),
    "device_put": _same,
    "jit": _call("jaxpr"),
    "layout_constraint": _same,
    "name": _same,
    "optimization_barrier": _same,
    "pjit": _call("jaxpr"),
    "remat2": _call("jaxpr"),
    "reshard": _same,
    "scan": _scan,
    "sharding_constraint": _same,
    "while": _while,
}
