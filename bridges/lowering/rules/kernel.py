"""The rule of the compiled kernel's primitives (`chainrule.native.primitives`).

Where the kernel runs, a primitive is one operation of the graph, `ops.kernel_call`; elsewhere it is the operations of
its form. `runs_in_kernel` decides.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.builder import Builder, Equation, Rule, Target, Value
from chainrule.bridges.lowering.ops.kernel import CALLS, NUMBERS, Params
from chainrule.native.primitives import OPERATIONS

ON_PARTS = {"chainrule_sums", "chainrule_tier2"}
"""What the kernel can do where ranks have parts of tensors: sums are additive, and tier 2 is entry by entry."""


def runs_in_kernel(eqn: Equation, target: Target) -> bool:
    """Whether a bridge leaves an equation to the kernel: on the CPU, but for sums that a compiler fuses.

    The sums of magnitudes stay, because the kernel makes all the rest of the step that reads them.
    """
    name, params = eqn.primitive.name, eqn.params
    if name not in (ON_PARTS if target.sharded else {*CALLS, *CODES}) or target.device != "cpu":
        return False
    if not OPERATIONS[name].fits([v.aval for v in eqn.invars], params):
        return False
    fused = name == "chainrule_sums" and target.compiled and params["kind"] != "magnitude"
    return not fused or params["kernel"] == "native"


@functools.lru_cache(maxsize=4096)
def _form(name: str, params: Params, avals: tuple[Any, ...]) -> Any:
    """The jaxpr of a primitive's form."""
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    return jax.make_jaxpr(functools.partial(OPERATIONS[name].form, **dict(params)))(*structs)


def _primitive(b: Builder, eqn: Equation, *operands: Value) -> Sequence[Value]:
    name = eqn.primitive.name
    avals = [v.aval for v in eqn.invars]
    params: Params = tuple(eqn.params.items())
    if runs_in_kernel(eqn, b.target):
        if name in CODES:
            return CODES[name](b, eqn, *map(b.tensor, operands, avals))
        numbers = NUMBERS[name]
        given = [
            x if i < numbers and isinstance(x, (bool, int, float)) else b.tensor(x, a)
            for i, (x, a) in enumerate(zip(operands, avals, strict=True))
        ]
        return b.items(b.emit(ops.kernel_call, name, params, given), len(eqn.outvars))
    jaxpr = _form(name, params, tuple(avals))
    return b.inline(jaxpr.jaxpr, jaxpr.consts, operands)


def _encode(b: Builder, eqn: Equation, x: fx.Node, key: fx.Node | None = None) -> Sequence[Value]:
    return b.items(b.emit(ops.encode, x, key, eqn.params["held"]), 2)


def _decode(b: Builder, eqn: Equation, codes: fx.Node, scales: fx.Node) -> Sequence[Value]:
    return [b.emit(ops.decode, codes, scales, eqn.params["shape"], eqn.params["held"])]


CODES = {"chainrule_encode": _encode, "chainrule_decode": _decode}

KERNEL: dict[str, Rule] = dict.fromkeys(OPERATIONS, _primitive)
