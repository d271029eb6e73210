"""Passes over the lowered graph, each linear in the number of nodes.

Every node a rule emits is pure, so equal nodes can be one and unused nodes none.
"""

import operator
from typing import Any

import torch
from torch import fx

from chainrule.bridges.lowering import ops


def simplify(graph: fx.Graph) -> None:
    """No-op arithmetic and dead code gone, common subexpressions once."""
    drop_noops(graph)
    merge_common(graph)
    round_products(graph)
    unbind_vectors(graph)
    drop_dead(graph)


def drop_dead(graph: fx.Graph) -> None:
    """Erase every node that no output needs; placeholders stay."""
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


# x op scalar that is x. (x + 0.0 is x but for the sign of a negative zero.)
_NOOPS: dict[Any, float] = {
    torch.add: 0,
    torch.sub: 0,
    torch.mul: 1,
    torch.div: 1,
    torch.pow: 1,
}


def drop_noops(graph: fx.Graph) -> None:
    """Remove arithmetic with the operation's neutral scalar."""
    for node in graph.nodes:
        if node.target not in _NOOPS or len(node.args) != 2 or node.kwargs:
            continue
        x, y = node.args
        if isinstance(x, fx.Node) and not isinstance(y, fx.Node) and y == _NOOPS[node.target]:
            node.replace_all_uses_with(x)
            graph.erase_node(node)


def merge_common(graph: fx.Graph) -> None:
    """Replace a node that repeats an earlier one (same target, same arguments) by it."""
    seen: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def round_products(graph: fx.Graph) -> None:
    """A wide product of half-precision matrices, rounded to their dtype, is torch's own, which adds in float32."""
    for node in graph.find_nodes(op="call_function", target=torch.Tensor.to):
        product, dtype = node.args[:2]
        if product.op == "call_function" and product.target is ops.wide_mm:
            x, y, narrow, _ = product.args
            if dtype == narrow:
                node.target, node.args = torch.mm, (x, y)


_FEW = 8


def unbind_vectors(graph: fx.Graph) -> None:
    """Scalars taken one by one out of a vector become one operation."""
    for node in list(graph.nodes):
        if getattr(node.meta.get("aval"), "ndim", None) != 1:
            continue
        taken = [
            (scalar, 0 if entry.target is ops.first else entry.args[2])
            for entry in node.users
            if entry.target is ops.first or (entry.target is torch.narrow and entry.args[3] == 1)
            for scalar in entry.users
            if scalar.target is torch.reshape and not scalar.args[1]
        ]
        if len(taken) < _FEW:
            continue
        with graph.inserting_after(node):
            parts = graph.call_function(ops.unbind, (node,))
        parts.meta.update({k: v for k, v in node.meta.items() if k != "aval"})
        for scalar, index in taken:
            scalar.target, scalar.args = operator.getitem, (parts, index)


def _key(value: Any) -> Any:
    """A hashable stand-in; 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, tuple | list):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in value.items())
    if isinstance(value, bool | int | float | complex | slice):
        return (type(value), repr(value))
    return value


# Results that may share memory with the first argument.
_VIEWS = {
    ops.dynamic_slice,
    torch.Tensor.__getitem__,
    torch.Tensor.view,
    torch.broadcast_to,
    torch.imag,
    torch.narrow,
    torch.permute,
    torch.real,
    torch.reshape,
    torch.select,
    torch.squeeze,
    torch.t,
    torch.unsqueeze,
}
_CONTROL = {ops.branch, ops.scan, ops.while_loop}  # may hand an operand through


def own_outputs(graph: fx.Graph) -> None:
    """Give every output memory of its own, except those that are an input unchanged.

    Afterwards no output overlaps an input, a constant or another output, or itself (as a
    broadcast does), so a caller may keep the outputs and write to the inputs.
    """
    output = graph.output_node()
    nodes: Any = output.args[0]
    taken: set[fx.Node] = set()
    results = []
    with graph.inserting_before(output):
        for node in nodes:
            root, overlaps = node, False
            while root.op == "call_function" and root.target in _VIEWS:
                overlaps |= root.target is torch.broadcast_to
                root = root.args[0]
            if root.op == "call_function" and root.target is operator.getitem:
                overlaps |= root.args[0].target in _CONTROL
            borrowed = root.op != "call_function" or root in taken or overlaps
            if node.op != "placeholder" and borrowed:
                copy = graph.call_function(
                    torch.clone, (node,), {"memory_format": torch.contiguous_format}
                )
                copy.meta.update(node.meta)
                root = node = copy
            taken.add(root)
            results.append(node)
    output.args = (tuple(results),)
