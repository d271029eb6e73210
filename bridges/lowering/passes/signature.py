"""Signatures of pieces: what two of them must have in common to run as one call, or as one compiled function."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.nodes import args_of, first_arg, is_array, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.passes.simplify import key_of


def spanning(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The arrays among some nodes that a flat piece is over: all but a tensor's first element beside the others."""
    arrays = [n for n in nodes if is_array(value_of(n))]
    return [n for n in arrays if value_of(n).numel() != 1] or arrays


def flat_shape(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> tuple[int, ...] | None:
    """The shape over which nodes work element by element, up to reductions of everything; None if they do not."""
    tensors = [value_of(n) for n in (*nodes, *inputs)]
    if not all(isinstance(t, torch.Tensor) for t in tensors) or not all(map(_is_flat, nodes)):
        return None
    shapes = {tuple(value_of(n).shape) for n in spanning((*nodes, *inputs))}
    return shapes.pop() if len(shapes) == 1 else None


def _is_flat(node: fx.Node) -> bool:
    value = value_of(node)
    if node.op != "call_function" or not isinstance(value, torch.Tensor):
        return False
    on_arrays = any(is_array(value_of(s)) for s in node.all_input_nodes)
    if not on_arrays:
        return value.ndim == 0
    if info(node).reduces and value.ndim == 0:
        return True
    return info(node).elementwise or node.target is ops.first


def reduces_all(node: fx.Node) -> bool:
    """Whether a node of a flat piece reduces a tensor to a scalar."""
    return info(node).reduces and is_array(value_of(first_arg(node)))


def is_size(value: Any, node: fx.Node, size: int) -> bool:
    """Whether a literal is the number of elements that a mean divides by."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return node.target is torch.div and is_number and size > 16 and value == size


def signature(
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    updates: Sequence[tuple[int, fx.Node]],
    shape: tuple[int, ...] | None,
) -> Any:
    """A hashable description of a piece; without its shape if one is given, over which it is flat."""
    number = {n: i for i, n in enumerate((*inputs, *nodes))}
    size = math.prod(shape or ())

    def inner(node: fx.Node) -> Any:
        args = args_of(node)
        if shape is not None:
            if reduces_all(node):
                args = (args[0], "all", *args[2:])
            args = tuple("size" if is_size(a, node, size) else a for a in args)
        named = key_of(node.kwargs, number.__getitem__)
        return node.target, key_of(args, number.__getitem__), named

    def outer(node: fx.Node) -> Any:
        value = value_of(node)
        if not isinstance(value, torch.Tensor):  # a loop's results, or its body
            return (node.target, id(value) if node.op == "get_attr" else str(value))
        flat = shape is not None and value.ndim > 0
        own = ("flat", min(value.numel(), 2)) if flat else tuple(value.shape)
        constant = node.target if node.op == "get_attr" else None
        return (value.dtype, own, constant)

    return (
        None
        if shape is None
        else min(size, 2),  # none, one and any number of elements are other code
        tuple(map(outer, inputs)),
        tuple(map(inner, nodes)),
        tuple(number[n] for n in outputs),
        tuple((i, number[old]) for i, old in updates),
    )
