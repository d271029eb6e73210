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
from chainrule.bridges.lowering.nodes import args_of, is_scalar, mark_like, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.step_program import StepProgram


def scalarise(program: StepProgram) -> StepProgram:
    """Before: elementwise arithmetic on vectors between `torch.stack` and `ops.unbind`. After, on a CPU: arithmetic on
    their entries, each with `meta["entry"]`. (Elsewhere a vector is one launch, and its entries are views.)
    """
    if not program.on_cpu:
        return program
    graph = program.graph
    found = _between(graph)
    entries: dict[fx.Node, list[Any]] = {}
    entry_of: dict[int, Any] = {}  # of the fake vector the fake entry

    def emit(vector: fx.Node, target: Any, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
        """A node for an entry of `vector`."""
        whole = value_of(vector)
        if id(whole) not in entry_of:
            entry_of[id(whole)] = whole.new_empty(())
        node = mark_like(graph.call_function(target, args, kwargs), vector, entry_of[id(whole)])
        node.meta["entry"] = True
        return node

    def entries_of(vector: fx.Node) -> list[Any]:
        if vector not in entries and vector.op == "get_attr":
            entries[vector] = program.attributes[str(vector.target)].tolist()
        elif vector not in entries:  # it stays a vector
            parts = next((user for user in vector.users if user.target is ops.unbind), None)
            with graph.inserting_after(vector):
                parts = parts or graph.call_function(ops.unbind, (vector,))
            parts.meta.setdefault("val", [None] * len(value_of(vector)))
            with graph.inserting_after(parts):
                indices = reversed(range(len(value_of(vector))))
                taken = [emit(vector, operator.getitem, (parts, i)) for i in indices]
            entries[vector] = taken[::-1]
        return entries[vector]

    def with_tensors(vector: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of an entry with tensors where torch takes no number, or would give it its default dtype."""
        numbers = [not isinstance(a, fx.Node) for a in args]
        if not (numbers[0] or (vector.target is torch.where and all(numbers[1:]))):
            return args
        options = {"dtype": value_of(vector).dtype, "device": program.device}
        return tuple(
            emit(vector, torch.full, ((), a), **options) if number else a
            for a, number in zip(args, numbers, strict=True)
        )

    for node in found:
        if node.target is torch.stack:
            entries[node] = list(args_of(node)[0])
            continue
        length = len(value_of(node))
        columns = [entries_of(a) if _is_vector(a) else [a] * length for a in args_of(node)]
        with graph.inserting_before(node):
            rows = [with_tensors(node, args) for args in zip(*columns, strict=True)]
            entries[node] = [emit(node, node.target, args) for args in rows]
    for node in reversed(found):
        for parts in list(node.users):
            for part in list(parts.users):
                part.replace_all_uses_with(entries[node][args_of(part)[1]])
                graph.erase_node(part)
            graph.erase_node(parts)
        graph.erase_node(node)
    return program


def _is_vector(node: Any) -> bool:
    return isinstance(node, fx.Node) and getattr(node.meta.get("val"), "ndim", 0) == 1


def _between(graph: fx.Graph) -> list[fx.Node]:
    """Vectors stacked from scalars, or computed from such entry by entry, that are only taken apart again."""

    def are_scalars(nodes: Any) -> bool:
        return all(is_scalar(value_of(n)) for n in nodes)

    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if not _is_vector(node):
            continue
        vectors = {a for a in node.all_input_nodes if _is_vector(a)}
        others = [a for a in node.all_input_nodes if a not in vectors]
        if node.target is torch.stack:
            begins = are_scalars(args_of(node)[0])
        else:
            begins = info(node).elementwise and not node.kwargs and any(v in found for v in vectors)
            begins = begins and all(len(value_of(v)) == len(value_of(node)) for v in vectors)
        if begins and are_scalars(others):
            found[node] = None
    for node in reversed(list(found)):
        if not all(user in found or user.target is ops.unbind for user in node.users):
            del found[node]
    for node in reversed(list(found)):
        # Compiled with a leaf, an entry may be computed again for each of the leaf's elements.
        if info(node).costly:
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
