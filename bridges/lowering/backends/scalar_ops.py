"""What the kernel's scalar programs call an operation of the graph, and the types that they know: f, i and b."""

from typing import Any

import torch
from torch import Tensor, fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.nodes import args_of, function_of
from chainrule.bridges.lowering.op_info import info
from chainrule.native import _kernel

_TYPES = {torch.float32: "f", torch.int32: "i", torch.bool: "b"}
_TRUTHS = ("lt", "le", "gt", "ge", "eq", "ne", "isfinite")
_OPERATIONS = frozenset(_kernel.scalar_ops()) if _kernel else frozenset()


def type_of(x: Any) -> str | None:
    """The type of a node or a number; None for what is no scalar of these."""
    if not isinstance(x, fx.Node):
        return {bool: "b", int: "i", float: "f"}.get(type(x))
    value = x.meta.get("val")
    return _TYPES.get(value.dtype) if isinstance(value, Tensor) and value.ndim == 0 else None


def operation(node: fx.Node, type_: str) -> tuple[str, list[tuple[Any, str]]] | None:
    """The kernel's name for what a node does, and its operands with the types to give them in; None if it has none.

    Args:
      node: a scalar.
      type_: its type.
    """
    args = args_of(node)
    moves = node.target in (torch.Tensor.to, torch.clone)
    if not info(node).elementwise or (node.kwargs and not moves):
        return None
    if moves or (node.target is ops.float_to_int and type_ == "i"):
        args = args[:1]
    types: list[Any] = list(map(type_of, args))
    if None in types:
        return None
    name = info(node).scalar or function_of(node).__name__
    if moves:
        name, wanted = f"to.{types[0]}.{type_}", types
    elif node.target is ops.float_to_int:
        name, wanted = "float_to_int.f", ["f"]
    elif node.target is torch.where:
        name, wanted = f"where.{type_}", ["b", type_, type_]
    else:
        # What torch promotes them to; a quotient of integers is a float32.
        common = "f" if node.target is torch.div else min(types, key="fib".index)
        if type_ != ("b" if name in _TRUTHS else common):
            return None
        name, wanted = f"{name}.{common}", [common] * len(args)
    operands = list(zip(args, wanted, strict=True))
    if name not in _OPERATIONS or not all(_fits(*operand) for operand in operands):
        return None
    return name, operands[::-1] if node.target is torch.rsub else operands


def _fits(operand: Any, type_: str) -> bool:
    if isinstance(operand, fx.Node):
        return f"to.{type_of(operand)}.{type_}" in _OPERATIONS
    return type_ != "i" or -(2**31) <= operand < 2**31
