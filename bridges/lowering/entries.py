"""Arithmetic on vectors that hold a scalar of each leaf, entry by entry.

A chain computes what it keeps for each parameter side by side, as vectors. To fill a vector and to take it apart costs
two calls with an argument for each leaf. Compiled code has no such cost where the arithmetic on an entry is part of the
code of its leaf, so there it goes back to the leaves.
"""

import operator
from typing import Any

import torch
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.pieces import POINTWISE

_COSTLY = {torch.pow}
"""Compiled with a leaf, an entry may be computed again for each of its elements; with these that takes longer than all
the rest of a step."""


def split_vectors(module: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Replaces elementwise arithmetic between `torch.stack` and `ops.unbind` by arithmetic on the entries.

    Args:
      module: of nodes that are pure.
      values: a fake tensor for every node; those of new nodes are added.
    """
    graph = module.graph
    found = _between(graph, values)
    entries: dict[fx.Node, list[Any]] = {}

    def emit(vector: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
        """A node for an entry of `vector`."""
        entry = graph.call_function(target, args)
        entry.meta.update({k: v for k, v in vector.meta.items() if k != "aval"})
        values[entry] = values[vector].new_empty(())
        return entry

    def entries_of(vector: fx.Node) -> list[Any]:
        if vector not in entries and vector.op == "get_attr":
            entries[vector] = getattr(module, str(vector.target)).tolist()
        elif vector not in entries:  # it stays a vector
            parts = next((user for user in vector.users if user.target is ops.unbind), None)
            with graph.inserting_after(vector):
                parts = parts or graph.call_function(ops.unbind, (vector,))
            values.setdefault(parts, [None] * len(values[vector]))
            with graph.inserting_after(parts):
                indices = reversed(range(len(values[vector])))
                taken = [emit(vector, operator.getitem, (parts, i)) for i in indices]
            entries[vector] = taken[::-1]
        return entries[vector]

    for node in found:
        if node.target is torch.stack:
            entries[node] = list(node.args[0])  # pyright: ignore[reportArgumentType]
            continue
        length = len(values[node])
        columns = [entries_of(a) if _is_vector(a, values) else [a] * length for a in node.args]  # pyright: ignore
        with graph.inserting_before(node):
            entries[node] = [emit(node, node.target, args) for args in zip(*columns, strict=True)]
    for node in reversed(found):
        for parts in list(node.users):
            for part in list(parts.users):
                part.replace_all_uses_with(entries[node][part.args[1]])  # pyright: ignore
                graph.erase_node(part)
            graph.erase_node(parts)
        graph.erase_node(node)


def _is_vector(node: Any, values: dict[fx.Node, Any]) -> bool:
    return isinstance(node, fx.Node) and getattr(values[node], "ndim", 0) == 1


def _between(graph: fx.Graph, values: dict[fx.Node, Any]) -> list[fx.Node]:
    """Vectors stacked from scalars, or computed from such entry by entry, that are only taken apart again."""

    def are_scalars(nodes: Any) -> bool:
        return all(isinstance(values[n], torch.Tensor) and values[n].ndim == 0 for n in nodes)

    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if not _is_vector(node, values):
            continue
        vectors = {a for a in node.all_input_nodes if _is_vector(a, values)}
        others = [a for a in node.all_input_nodes if a not in vectors]
        if node.target is torch.stack:
            begins = are_scalars(node.args[0])
        else:
            pointwise = node.target in POINTWISE and not node.kwargs
            begins = pointwise and any(v in found for v in vectors)
            begins = begins and all(len(values[v]) == len(values[node]) for v in vectors)
        if begins and are_scalars(others):
            found[node] = None
    for node in reversed(list(found)):
        if not all(user in found or user.target is ops.unbind for user in node.users):
            del found[node]
    for node in reversed(list(found)):
        if node.target in _COSTLY:
            _drop(node, found)
    return list(found)


def _drop(node: fx.Node, found: dict[fx.Node, None]) -> None:
    """Removes a node and all that it is connected with."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node in found:
            del found[node]
            waiting += [*node.all_input_nodes, *node.users]
