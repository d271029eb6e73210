"""What the passes know about each function that a graph calls: one record for each, and no other table.

A rule may emit any function that has a record here; `info` of another is an error, and a test walks the graphs of all
rules. An operation without a fact is treated with care: it runs as it is, in a piece of its own shapes.
"""

# pyright: reportPrivateImportUsage=false
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from chainrule.bridges.lowering import ops


class Batched(NamedTuple):
    """The forms of an operation for lists of tensors."""

    call: Callable[..., Any]
    in_place: Callable[..., Any]
    """Writes into its first operands."""
    number: int | None = None
    """Position of the operand that may be a number for all tensors, or one for each."""
    shares: bool = False
    """Whether its second operand may be one 0-d tensor for all tensors."""
    keywords: frozenset[str] = frozenset()
    """Factors that it multiplies a term with while it reads it."""


class OpInfo(NamedTuple):
    """Facts about one function."""

    elementwise: bool = False
    """Entry i of the result depends on entries i of the operands alone: tensors may be given flat, and in parts."""
    reduces: bool = False
    """Over all axes it may be given a flat tensor."""
    view: bool = False
    """The result may share memory with the first operand."""
    control: bool = False
    """Runs sub-graphs from Python, and may hand an operand through."""
    host: bool = False
    """Runs outside torch: control flow, or the compiled kernel. Its results are `operator.getitem` of it."""
    codes: bool = False
    """Takes a tensor from codes or to codes, in the compiled kernel: part by part beside what its piece computes."""
    free: bool = False
    """Costs nothing in torch: it moves numbers of other operations, or is the kernel's."""
    collective: bool = False
    """All ranks call it at the same time, so it stays where nobody reads its results."""
    heavy: bool = False
    """A product, a decomposition or a sort: worth sending a tensor to one rank, which does it for all."""
    costly: bool = False
    """Takes longer for one element than to read and write it."""
    commutes: bool = False
    neutral: float | None = None
    """The number that, as second operand, makes the result the first."""
    scalar: str | None = None
    """What the kernel's scalar programs call it; None: by the function's own name."""
    batched: Batched | None = None


def info(node: fx.Node) -> OpInfo:
    """The record of what a node calls; of a placeholder, constant or output the empty one.

    Raises:
      KeyError: the function has no record.
    """
    return _INFO[node.target] if node.op == "call_function" else _NOTHING


def hands_on(node: fx.Node) -> bool:
    """Whether a result of a node may lie in the memory of an operand."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and info(source).control
    return info(node).view or info(node).control


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """Whoever reads the memory of a node, directly or through views of it."""
    for user in node.users:
        yield user
        if hands_on(user):
            yield from readers(user)


_NOTHING = OpInfo()
_INFO: dict[Any, OpInfo] = {}


def add_info(*functions: Any, **facts: Any) -> None:
    """Adds facts to the records of functions."""
    for function in functions:
        _INFO[function] = _INFO.get(function, _NOTHING)._replace(**facts)


# Of one tensor, and a few of two that have no form for lists or numbers.
add_info(
    *(torch.acos, torch.acosh, torch.asin, torch.asinh, torch.atan, torch.atan2, torch.atanh),
    *(torch.bitwise_and, torch.bitwise_left_shift, torch.bitwise_not, torch.bitwise_or),
    *(torch.bitwise_right_shift, torch.bitwise_xor, torch.ceil, torch.clamp, torch.clone),
    *(torch.complex, torch.conj_physical, torch.cos, torch.cosh, torch.digamma, torch.eq),
    *(torch.erf, torch.erfc, torch.exp2, torch.floor, torch.fmod, torch.ge, torch.gt),
    *(torch.isfinite, torch.le, torch.lgamma, torch.lt, torch.nan_to_num, torch.ne),
    *(torch.nextafter, torch.pow, torch.round, torch.rsub, torch.sgn, torch.sin, torch.sinh),
    *(torch.square, torch.tan, torch.where, torch.Tensor.to),
    *(ops.cbrt, ops.erf_inv, ops.float_to_int, ops.half_precision, ops.int_div, ops.int_rem),
    *(ops.population_count, ops.reduce_precision, ops.round_away, ops.shift_left),
    *(ops.shift_right_arithmetic, ops.shift_right_logical, ops.sign, ops.threefry2x32),
    elementwise=True,
)
add_info(torch.real, torch.imag, elementwise=True, view=True)
add_info(torch.pow, costly=True, neutral=1)

for _name in (
    *("abs", "exp", "expm1", "log", "log1p", "neg", "reciprocal", "rsqrt", "sigmoid", "sign"),
    *("sqrt", "tanh", "add", "sub", "mul", "div", "maximum", "minimum", "clamp_min", "clamp_max"),
    *("lerp", "addcmul", "addcdiv"),
):
    _forms = (getattr(torch, f"_foreach_{_name}{end}") for end in ("", "_"))
    add_info(getattr(torch, _name), elementwise=True, batched=Batched(*_forms))


def _batch(function: Any, **facts: Any) -> None:
    batched: Any = _INFO[function].batched
    add_info(function, batched=batched._replace(**facts))


_batch(torch.add, shares=True, keywords=frozenset({"alpha"}))
_batch(torch.mul, shares=True, number=1)
_batch(torch.div, shares=True, number=1)
_batch(torch.lerp, number=2)
_batch(torch.addcmul, keywords=frozenset({"value"}))
_batch(torch.addcdiv, keywords=frozenset({"value"}))
add_info(torch.add, torch.sub, neutral=0)
add_info(torch.mul, torch.div, neutral=1)
add_info(torch.add, torch.mul, torch.maximum, torch.minimum, commutes=True)
add_info(torch.clamp_min, scalar="maximum")
add_info(torch.clamp_max, scalar="minimum")
add_info(torch.rsub, scalar="sub")

add_info(torch.sum, torch.amax, torch.amin, torch.any, torch.all, reduces=True)
add_info(
    *(ops.dynamic_slice, torch.Tensor.__getitem__, torch.Tensor.view, torch.broadcast_to),
    *(torch.narrow, torch.permute, torch.reshape, torch.select, torch.squeeze, torch.t),
    *(torch.unsqueeze, ops.first, ops.reduce_prod),
    view=True,
)
add_info(ops.branch, ops.scan, ops.while_loop, control=True, host=True)
add_info(ops.kernel_call, host=True, free=True)
add_info(ops.decode, ops.encode, codes=True)
add_info(ops.all_reduce, ops.all_gather, ops.exchange, host=True, collective=True)
add_info(torch.stack, torch.reshape, torch.narrow, ops.unbind, free=True)

# Nothing but what they return.
add_info(
    *(operator.getitem, torch.arange, torch.argmax, torch.argmin, torch.bmm, torch.cat, torch.dot),
    *(torch.flip, torch.full, torch.linalg.qr, torch.mm, torch.zeros),
    *(ops.cholesky, ops.cumlogsumexp, ops.cummax, ops.cummin, ops.cumprod, ops.cumsum),
    *(ops.dot_general, ops.dynamic_update_slice, ops.eigh, ops.gather),
    *(ops.iota_2x32, ops.pad, ops.reduce_xor, ops.scatter),
    *(ops.singular_values, ops.sort, ops.svd, ops.top_k, ops.triangular_solve, ops.wide_mm),
)
add_info(
    *(torch.bmm, torch.linalg.qr, torch.mm, ops.cholesky, ops.dot_general, ops.eigh),
    *(ops.singular_values, ops.sort, ops.svd, ops.top_k, ops.triangular_solve, ops.wide_mm),
    heavy=True,
)
add_info(torch.Tensor.new_full)
