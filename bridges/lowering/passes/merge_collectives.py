"""One collective in the place of several."""

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.nodes import args_of, function_of, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.step_program import StepProgram


def merge_collectives(program: StepProgram) -> StepProgram:
    """Before: a collective for each value; `meta["level"]` of a node is the number of collectives that it waits for.
    After: those of a level, kind, dtype and group are one, and each waits for the one before it, because all ranks must
    call them in the same order and what is between them differs.
    """
    if program.sharding is None:
        return program
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    last: fx.Node | None = None
    levels: dict[int, list[fx.Node]] = {}
    for node in program.graph.nodes:
        levels.setdefault(node.meta.get("level", 0), []).append(node)
    output = program.graph.output_node()
    for _, nodes in sorted(levels.items()):
        for node in nodes:
            if node is not output and not info(node).collective and node not in new:
                new[node] = graph.node_copy(node, new.__getitem__)
        for alike in _alike(nodes):
            last = _one(graph, new, alike, last)
    graph.output(fx.map_arg(output.args[0], new.__getitem__))
    program.graph = graph
    names = Counter(node.target.__name__ for node in graph.nodes if info(node).collective)
    program.log.append(f"    collectives a step: {dict(names) or 'none'}")
    return program


_LISTS: dict[Any, int] = {ops.all_reduce: 0, ops.all_gather: 2, ops.exchange: 1}
"""How many lists with an entry for every tensor a collective takes behind the tensors."""


def _alike(nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    groups: dict[Any, list[fx.Node]] = {}
    for node in (node for node in nodes if info(node).collective):
        (x, *_), *rest = args_of(node)
        dtype = value_of(x).dtype if node.target is ops.all_reduce else None
        groups.setdefault((node.target, dtype, *rest[_LISTS[node.target] :]), []).append(node)
    yield from groups.values()


def _one(
    graph: fx.Graph,
    new: dict[fx.Node, fx.Node],
    nodes: Sequence[fx.Node],
    last: fx.Node | None,
) -> fx.Node:
    """Puts one call for all of `nodes` into the graph, after `last`, and what takes its results; returns the first."""
    first = nodes[0]
    xs = [new[x] for node in nodes for x in args_of(node)[0]]
    count = 1 + _LISTS[first.target]
    lists = [tuple(own for node in nodes for own in args_of(node)[k]) for k in range(1, count)]
    alike = args_of(first)[count:]
    call = graph.call_function(function_of(first), (xs, *lists, *alike, last))
    call.meta.update(first.meta)
    call.meta["val"] = [value_of(node)[0] for node in nodes]
    results = []
    for i, node in enumerate(nodes):
        results.append(graph.call_function(operator.getitem, (call, i)))
        for user in node.users:
            results[i].meta.update(user.meta)
            new[user] = results[i]
    return results[0]
