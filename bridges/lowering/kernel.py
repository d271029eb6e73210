"""The primitives of the compiled kernel (`chainrule.native.primitives`) as operations of the graph.

Where the kernel runs, a primitive is one operation, which runs the same arithmetic as its foreign call in XLA through
the kernel's other door, on torch memory: `kernel_call` returns new tensors, as XLA does; `run_tier2` works in place.
Elsewhere a primitive is the operations of its form. `runs_in_kernel` decides.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from chainrule.bridges.lowering.builder import Builder, Equation, Rule, Target, Value
from chainrule.native import _kernel, forms
from chainrule.native.primitives import OPERATIONS, TIER2_NUMBERS, step_of

Params = tuple[tuple[str, Any], ...]
"""The parameters of a primitive, hashable."""


def buffers(tensors: Sequence[Tensor], name: str) -> Any:
    """Contiguous tensors as the kernel takes them; `name` is what its messages call them."""
    # Maps, because what a call costs beside the kernel is mostly this.
    names = map(_name, map(_dtype, tensors))
    memory = zip(map(Tensor.data_ptr, tensors), map(Tensor.numel, tensors), names, strict=True)
    return _kernel.Buffers(list(memory), name)


_dtype = operator.attrgetter("dtype")


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_tier2(
    params: Params, tensors: Mapping[str, Sequence[Tensor]], numbers: Mapping[str, Any]
) -> None:
    """A tier-2 step in place: the state, and `updates` or else `parameters`."""
    given = dict(params)
    options: dict[str, Any] = {"denominator": given["denominator"], "nu": None, "parameters": None}
    run = _kernel.tier2
    if "mu_codes" in tensors:
        run = _kernel.tier2_quantized
        options |= {name: given[name] for name in ("block", "bits", "start")}
    run(**options | {name: buffers(role, name) for name, role in tensors.items()}, **numbers)


def _tier2(params: Params, operands: Sequence[Any]) -> list[Tensor]:
    step = step_of(dict(params)["roles"], operands)
    numbers = {name: x.numpy() if isinstance(x, Tensor) else x for name, x in step.numbers.items()}
    tensors = {name: [t.contiguous() for t in role] for name, role in step.roles.items()}
    tensors |= {name: [t.clone() for t in tensors[name]] for name in step.state}
    tensors["updates"] = [torch.empty_like(g) for g in tensors["gradients"]]
    run_tier2(params, tensors, numbers)
    return [t for name in ("updates", *step.state) for t in tensors[name]]


def _statistics(_: Params, operands: Sequence[Tensor]) -> list[Tensor]:
    gradients = [t.contiguous() for t in operands]  # held while the kernel reads them
    table = _kernel.statistics(buffers(gradients, "gradients"))
    with np.errstate(over="ignore"):  # infinite in float32, as in XLA
        return [torch.from_numpy(table.astype(np.float32))]


def _sums(params: Params, operands: Sequence[Any]) -> list[Tensor]:
    kind: str = dict(params)["kind"]
    c = torch.as_tensor(operands[0], device="cpu")
    tensors = [t.contiguous() for t in operands[1:]]  # held while the kernel reads them
    tables = []
    for i in range(c.numel()):  # one, but under `vmap`, which gives all operands its axes
        own = (
            [t.reshape(c.numel(), t.numel() // c.numel())[i] for t in tensors]
            if c.ndim
            else tensors
        )
        xs = own if kind in forms.OF_ONE else own[: len(own) // 2]
        ys = None if kind in forms.OF_ONE else buffers(own[len(xs) :], "ys")
        tables.append(_kernel.sums(kind, buffers(xs, "xs"), ys, c=c.reshape(-1)[i].item()))
    table = torch.from_numpy(np.stack(tables)).reshape(*c.shape, *tables[0].shape)
    return list(table.unbind(-1))


_CALLS = {
    "chainrule_tier2": _tier2,
    "chainrule_statistics": _statistics,
    "chainrule_sums": _sums,
}

# How many operands come before the tensors; where the graph knows these they are Python's.
_NUMBERS = {
    "chainrule_tier2": len(TIER2_NUMBERS),
    "chainrule_statistics": 0,
    "chainrule_sums": 1,
}


def kernel_call(name: str, params: Params, operands: Sequence[Any]) -> list[Tensor]:
    """What the primitive `name` returns; no operand is written."""
    return _CALLS[name](params, operands)


def runs_in_kernel(eqn: Equation, target: Target) -> bool:
    """Whether a bridge leaves an equation to the kernel: on the CPU, but for sums that a compiler fuses.

    The sums of magnitudes stay, because the kernel makes all the rest of the step that reads them.
    """
    name, params = eqn.primitive.name, eqn.params
    if name not in _CALLS or target.device != "cpu":
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
        numbers = _NUMBERS[name]
        given = [
            x if i < numbers and isinstance(x, (bool, int, float)) else b.tensor(x, a)
            for i, (x, a) in enumerate(zip(operands, avals, strict=True))
        ]
        return b.items(b.emit(kernel_call, name, params, given), len(eqn.outvars))
    jaxpr = _form(name, params, tuple(avals))
    return b.inline(jaxpr.jaxpr, jaxpr.consts, operands)


KERNEL: dict[str, Rule] = dict.fromkeys(OPERATIONS, _primitive)
