"""Stages that read less memory: what is cheap to compute again is not carried from one to the next.

A chain that needs a scalar of a whole tensor before it can scale an update (an alignment, a trust ratio) falls into
stages with the tensor's update between them. Written and read again, that costs two passes over fresh memory; made again
from the moments, which are in memory anyway, it costs reading them.
"""

from collections.abc import Sequence

import torch
from torch import fx

from chainrule.bridges.lowering.pieces import POINTWISE, SHARED, is_array, places
from chainrule.bridges.lowering.simplify import drop_dead

_WRITE_AND_READ = 2
"""Passes that carrying a tensor costs; it is computed again from no more new tensors than that."""


def recompute(graph: fx.Graph, values: dict[fx.Node, torch.Tensor], targets: Sequence[int]) -> None:
    """Changes a graph so that elementwise results of an early stage are made again where a later one reads them.

    Args:
      graph: the program; changed in place.
      values: a fake tensor for every node; those of new nodes are added.
      targets: for every output, the position of the input that it renews.
    """
    results = graph.output_node().args[0]
    inputs = list(graph.find_nodes(op="placeholder"))
    where = places(graph, values)
    renewed = {
        inputs[t]: where[r][1]
        for r, t in zip(results, targets, strict=True)  # pyright: ignore
        if r.op != "placeholder"
    }
    stored = {*results}  # pyright: ignore
    read: dict[tuple[object, int], set[fx.Node]] = {}
    for node, place in where.items():
        if node.op == "call_function":
            tensors = (s for s in node.all_input_nodes if s.op == "placeholder" or s in stored)
            read.setdefault(place, set()).update(tensors)
    again: dict[tuple[fx.Node, int], fx.Node] = {}

    def sources(node: fx.Node, stage: int) -> set[fx.Node] | None:
        """The tensors that `node` can be computed from in `stage`; None if it cannot."""
        if not is_array(values[node]) or node in stored or where[node][1] == stage:
            return {node} if is_array(values[node]) else set()
        if node.op == "placeholder":
            return {node} if renewed.get(node, stage) >= stage else None
        if node.op != "call_function" or node.target not in POINTWISE:
            return None
        found = [sources(s, stage) for s in node.all_input_nodes]
        return None if None in found else set().union(*found)  # pyright: ignore

    def remade(node: fx.Node, stage: int) -> fx.Node:
        kept = node.op != "call_function" or not is_array(values[node]) or node in stored
        if kept or where[node][1] == stage:
            return node
        if (node, stage) not in again:
            new = graph.node_copy(node, lambda s: remade(s, stage))
            new.meta["rank"] = stage
            values[new] = values[node]
            again[node, stage] = new
        return again[node, stage]

    for node, (owner, stage) in list(where.items()):
        if node.op != "call_function" or owner is SHARED or not is_array(values[node]):
            continue
        for source in node.all_input_nodes:
            if where[source][0] != owner or where[source][1] == stage:
                continue
            if source.op == "placeholder" or source in stored or not is_array(values[source]):
                continue
            found = sources(source, stage)
            if found is None or len(found - read[owner, stage]) > _WRITE_AND_READ:
                continue
            read[owner, stage] |= found
            with graph.inserting_before(node):
                node.replace_input_with(source, remade(source, stage))
    drop_dead(graph)
