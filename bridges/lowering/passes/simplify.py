"""The first pass, over every graph when it is made, linear in the number of nodes.

Every node that a rule emits is pure, so equal nodes can be one and unused nodes none.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.nodes import args_of, mark_like
from chainrule.bridges.lowering.op_info import info


def simplify(graph: fx.Graph) -> None:
    """No-op arithmetic and dead code gone, common subexpressions once."""
    drop_noops(graph)
    merge_common(graph)
    drop_signs(graph)
    round_products(graph)
    unbind_vectors(graph)
    drop_dead(graph)


def drop_dead(graph: fx.Graph) -> None:
    """Erase every node that no output and no other rank needs; placeholders stay."""
    for node in reversed(graph.nodes):
        stays = node.op in ("placeholder", "output") or info(node).collective
        if not node.users and not stays:
            graph.erase_node(node)


def drop_noops(graph: fx.Graph) -> None:
    """Remove arithmetic with the operation's neutral scalar. (x + 0.0 is x but for the sign of a negative zero.)"""
    for node in graph.nodes:
        neutral = info(node).neutral
        if neutral is None or len(node.args) != 2 or node.kwargs:
            continue
        x, y = args_of(node)
        if isinstance(x, fx.Node) and not isinstance(y, fx.Node) and y == neutral:
            node.replace_all_uses_with(x)
            graph.erase_node(node)


def merge_common(graph: fx.Graph) -> None:
    """Replace a node that repeats an earlier one (same target, same arguments) by it."""
    seen: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        key = (node.target, key_of(node.args), key_of(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def drop_signs(graph: fx.Graph) -> None:
    """The square of a real magnitude is that of the number."""
    for node in graph.find_nodes(op="call_function", target=torch.mul):
        x, y = args_of(node)
        if x is y and isinstance(x, fx.Node) and x.target is torch.abs:
            signed = args_of(x)[0]
            aval = signed.meta.get("aval")
            if aval is not None and aval.dtype.kind != "c":
                node.args = (signed, signed)


def round_products(graph: fx.Graph) -> None:
    """A wide product of half-precision matrices, rounded to their dtype, is torch's own, which adds in float32."""
    for node in graph.find_nodes(op="call_function", target=torch.Tensor.to):
        product, dtype = args_of(node)[:2]
        if product.op == "call_function" and product.target is ops.wide_mm:
            x, y, narrow, _ = args_of(product)
            if dtype == narrow:
                node.target, node.args = torch.mm, (x, y)


_FEW = 8


def unbind_vectors(graph: fx.Graph, few: int = _FEW) -> None:
    """Scalars taken one by one out of a vector become one operation, unless they are fewer than `few`."""
    for node in list(graph.nodes):
        if getattr(node.meta.get("aval"), "ndim", None) != 1:
            continue
        taken = [
            (scalar, 0 if entry.target is ops.first else args_of(entry)[2])
            for entry in node.users
            if entry.target is ops.first or (entry.target is torch.narrow and entry.args[3] == 1)
            for scalar in entry.users
            if scalar.target is torch.reshape and not scalar.args[1]
        ]
        if len(taken) < few:
            continue
        with graph.inserting_after(node):
            parts = graph.call_function(ops.unbind, (node,))
        known = {index: scalar.meta.get("val") for scalar, index in taken}
        mark_like(parts, node, [known.get(i) for i in range(max(known) + 1)])
        for scalar, index in taken:
            scalar.target, scalar.args = operator.getitem, (parts, index)


def key_of(value: Any, of_node: Callable[[fx.Node], Any] = lambda node: node) -> Any:
    """A hashable stand-in for an argument; 1, 1.0 and True differ, and so do 0.0 and -0.0.

    Args:
      value: what a node takes.
      of_node: what stands for a node in it.
    """
    if isinstance(value, fx.Node):
        return of_node(value)
    if isinstance(value, tuple | list):
        return tuple(key_of(v, of_node) for v in value)
    if isinstance(value, dict):
        return tuple((k, key_of(v, of_node)) for k, v in value.items())
    if isinstance(value, bool | int | float | complex | slice):
        return (type(value), repr(value))
    return value
