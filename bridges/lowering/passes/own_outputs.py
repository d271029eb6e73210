"""The second pass, over every graph when it is made: outputs that share no memory."""

import operator
from typing import Any

import torch
from torch import fx

from chainrule.bridges.lowering.nodes import first_arg, results_of, return_
from chainrule.bridges.lowering.op_info import info


def own_outputs(graph: fx.Graph) -> None:
    """Give every output memory of its own, except those that are an input unchanged.

    Afterwards no output overlaps an input, a constant or another output, or itself (as a
    broadcast does), so a caller may keep the outputs and write to the inputs.
    """
    taken: set[fx.Node] = set()
    results = []
    with graph.inserting_before(graph.output_node()):
        for node in results_of(graph):
            root, overlaps = node, False
            while info(root).view:
                overlaps |= root.target is torch.broadcast_to
                root = first_arg(root)
            if root.target is operator.getitem:
                overlaps |= info(first_arg(root)).control
            borrowed = root.op != "call_function" or root in taken or overlaps
            if node.op != "placeholder" and borrowed:
                contiguous: Any = {"memory_format": torch.contiguous_format}
                copy = graph.call_function(torch.clone, (node,), contiguous)
                copy.meta.update(node.meta)
                root = node = copy
            taken.add(root)
            results.append(node)
    return_(graph, results)
