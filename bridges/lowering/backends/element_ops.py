"""What the kernel's programs of elements call an operation of the graph (`chainrule/elements.hpp`)."""

from typing import Any

import torch
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.nodes import args_of, first_arg, function_of, value_of
from chainrule.bridges.lowering.passes.signature import reduces_all
from chainrule.native import _kernel

_NAMES = frozenset(_kernel.element_ops()) if _kernel else frozenset()
_TRUTHS = {torch.bitwise_and, torch.bitwise_or, torch.bitwise_xor, torch.bitwise_not}
_OTHERS: dict[Any, str] = {
    torch.clamp_min: "maximum",
    torch.clamp_max: "minimum",
    ops.sign: "sign",
}
_SAME = {
    *(torch.add, torch.sub, torch.mul, torch.div, torch.lerp, torch.maximum, torch.minimum),
    *(torch.neg, torch.abs, torch.square, torch.reciprocal, torch.sqrt, torch.rsqrt),
    *(torch.isfinite, torch.clone, torch.where, *_TRUTHS),
    *(torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne),
}


def operation(node: fx.Node) -> tuple[str, list[Any]] | None:
    """The kernel's name for what a node does, and its operands in order; None if it has none."""
    args, keywords, target = list(args_of(node)), dict(node.kwargs), node.target
    if is_sum(node):
        return "sum", args[:1]
    if target in (torch.addcmul, torch.addcdiv):
        return function_of(node).__name__, [*args, keywords.get("value", 1.0)]
    if target is torch.add and "alpha" in keywords:
        return "add_scaled", [*args, keywords["alpha"]]
    if keywords:
        return None
    if target is torch.nan_to_num:
        zeros = all(repr(x) == "0.0" for x in args[1:]) and len(args) == 4
        return ("finite_or_zero", args[:1]) if zeros else None
    if target is torch.Tensor.to:
        to_float = args[1:] == [torch.float32] and value_of(args[0]).dtype == torch.bool
        return ("bitwise_and", [args[0], 1.0]) if to_float else None
    if target is torch.rsub:
        return "sub", args[::-1]
    if target in _OTHERS:
        return _OTHERS[target], args
    return (function_of(node).__name__, args) if target in _SAME else None


def takes(node: fx.Node) -> bool:
    """Whether a node of a flat piece, which makes an array or a sum, can be a step of a program."""
    if is_sum(node):
        return True
    found = operation(node)
    if found is None or found[0] not in _NAMES:
        return False
    made, truths = value_of(node).dtype, [is_truth(x) for x in found[1]]
    if node.target is torch.where:
        return made == torch.float32 and truths == [True, False, False]
    if node.target in _TRUTHS or node.target is torch.Tensor.to:
        return truths[0] and all(truths) == (node.target in _TRUTHS)
    return not any(truths) and made in (torch.float32, torch.bool)


def is_sum(node: fx.Node) -> bool:
    """Whether a node of a flat piece sums a float32 tensor."""
    if node.target is not torch.sum or not reduces_all(node):
        return False
    return {value_of(node).dtype, value_of(first_arg(node)).dtype} == {torch.float32}


def is_truth(x: Any) -> bool:
    """Whether an operand is true or false, or an array of such."""
    return isinstance(x, bool) or (isinstance(x, fx.Node) and value_of(x).dtype == torch.bool)
