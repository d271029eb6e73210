"""Calls of the compiled kernel (`chainrule.native.xla`) as operations of the graph.

A chain traced for XLA calls the kernel through XLA's foreign functions. Here each such call is one operation that runs
the same arithmetic through the kernel's other door, on torch memory: `kernel_call` returns new tensors, as XLA does;
`run_tier2` works in place.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from chainrule.bridges.lowering.builder import Builder, Equation, Rule, Value
from chainrule.native import _kernel, xla

Attributes = tuple[tuple[str, Any], ...]
T = TypeVar("T")

TABLE: tuple[str, ...] = ("learning_rate", "weight_decay", "b1", "b1_long", "blend", "b2", "eps")
TABLE += ("mu_correction", "nu_correction")
"""The numbers in a row of a tier-2 call's first operand."""

_DENOMINATORS = ("root", "magnitude", "none")


def roles(target: str, attributes: Attributes, operands: Sequence[T]) -> dict[str, Sequence[T]]:
    """The operands of a tier-2 call after its table, by what they are; the state is what it hands back new."""
    given = dict(attributes)
    moments = ["mu", *(["mu_long"] if given["has_long"] else [])]
    if target == "chainrule_tier2_quantized":
        moments = [f"{name}_{part}" for name in moments for part in ("codes", "scales")]
    names = ["gradients", *moments, *(["nu"] if given["denominator"] == 0 else [])]
    names += ["parameters"] if given["has_parameters"] else []
    n = (len(operands) - 1) // len(names)
    return {name: operands[1 + k * n : 1 + (k + 1) * n] for k, name in enumerate(names)}


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
    target: str,
    attributes: Attributes,
    tensors: Mapping[str, Sequence[Tensor]],
    numbers: Mapping[str, Any],
) -> None:
    """A tier-2 call in place: the state, and `updates` or else `parameters`."""
    given = dict(attributes)
    options: dict[str, Any] = {"denominator": _DENOMINATORS[given["denominator"]], "nu": None}
    if target == "chainrule_tier2_quantized":
        options |= {"block": given["block"], "bits": given["bits"]}
        options["start"] = "gradient" if given["start_at_gradient"] else "zero"
    options |= {name: buffers(role, name) for name, role in tensors.items()}
    options.setdefault("parameters", None)
    getattr(_kernel, target.removeprefix("chainrule_"))(**options, **numbers)


def _tier2(target: str, attributes: Attributes, operands: Sequence[Tensor]) -> list[Tensor]:
    numbers = dict(zip(TABLE, operands[0].numpy().T, strict=True))
    tensors = dict(roles(target, attributes, [t.contiguous() for t in operands]))
    state = [name for name in tensors if name not in ("gradients", "parameters")]
    tensors |= {name: [t.clone() for t in tensors[name]] for name in state}
    tensors["updates"] = [torch.empty_like(g) for g in tensors["gradients"]]
    run_tier2(target, attributes, tensors, numbers)
    return [t for name in ("updates", *state) for t in tensors[name]]


def _statistics(_: str, attributes: Attributes, operands: Sequence[Tensor]) -> list[Tensor]:
    del attributes
    gradients = [t.contiguous() for t in operands]  # held while the kernel reads them
    table = _kernel.statistics(buffers(gradients, "gradients"))
    with np.errstate(over="ignore"):  # infinite in float32, as in XLA
        return [torch.from_numpy(table.astype(np.float32))]


def _sums_of(attributes: Attributes) -> tuple[str, bool]:
    """The kind of a call of `chainrule.native.xla.sums`, and whether it is of pairs."""
    kind, (_, of_pairs) = list(xla.SUMS.items())[dict(attributes)["kind"]]
    return kind, of_pairs


def _sums(_: str, attributes: Attributes, operands: Sequence[Tensor]) -> list[Tensor]:
    kind, of_pairs = _sums_of(attributes)
    c, *tensors = (t.contiguous() for t in operands)  # held while the kernel reads them
    tables = []
    for i in range(c.numel()):  # one, but under `vmap`, which gives all operands its axes
        own = (
            [t.reshape(c.numel(), t.numel() // c.numel())[i] for t in tensors]
            if c.ndim
            else tensors
        )
        xs = own[: len(own) // 2] if of_pairs else own
        ys = buffers(own[len(xs) :], "ys") if of_pairs else None
        tables.append(_kernel.sums(kind, buffers(xs, "xs"), ys, c=c.reshape(-1)[i].item()))
    return [torch.from_numpy(np.stack(tables)).reshape(*c.shape, *tables[0].shape)]


_CALLS = {
    "chainrule_tier2": _tier2,
    "chainrule_tier2_quantized": _tier2,
    "chainrule_statistics": _statistics,
    "chainrule_sums": _sums,
}


def measured(
    target: str, attributes: Attributes, operands: Sequence[T]
) -> tuple[Sequence[T], Sequence[T]]:
    """For a call that returns a table with a row for each tensor: its first operands, and the tensors; else none."""
    if target == "chainrule_statistics":
        return (), operands
    if target == "chainrule_sums" and not _sums_of(attributes)[1]:
        return operands[:1], operands[1:]
    return (), ()


def kernel_call(target: str, attributes: Attributes, operands: Sequence[Tensor]) -> list[Tensor]:
    """What the XLA call `target` returns; no operand is written."""
    return _CALLS[target](target, attributes, operands)


def _ffi_call(b: Builder, eqn: Equation, *operands: Value) -> Sequence[Value]:
    target = eqn.params["target_name"]
    if target not in _CALLS or b.device.type != "cpu":
        raise b.unsupported(eqn, f"of `{target}` on {b.device.type}")
    # Python's numbers, which the code that is made of the graph can name.
    attributes = tuple(
        (name, value.item() if isinstance(value, np.generic) else value)
        for name, value in eqn.params["attributes"]
    )
    nodes = [b.tensor(x, v.aval) for x, v in zip(operands, eqn.invars, strict=True)]
    return b.items(b.emit(kernel_call, target, attributes, nodes), len(eqn.outvars))


KERNEL: dict[str, Rule] = {"ffi_call": _ffi_call}
