"""Calls of the compiled kernel on torch memory.

Each runs the same arithmetic as the primitive's foreign call in XLA, through the kernel's other door: `kernel_call`
returns new tensors, as XLA does; `run_tier2` works in place.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chainrule.native import _kernel, forms
from chainrule.native.primitives import TIER2_NUMBERS, step_of

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
        return list(torch.from_numpy(table.astype(np.float32)).unbind(1))


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


CALLS = {
    "chainrule_tier2": _tier2,
    "chainrule_statistics": _statistics,
    "chainrule_sums": _sums,
}

# How many operands come before the tensors; where the graph knows these they are Python's.
NUMBERS = {
    "chainrule_tier2": len(TIER2_NUMBERS),
    "chainrule_statistics": 0,
    "chainrule_sums": 1,
}


def kernel_call(name: str, params: Params, operands: Sequence[Any]) -> list[Tensor]:
    """What the primitive `name` returns; no operand is written."""
    return CALLS[name](params, operands)
