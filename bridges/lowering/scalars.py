"""Alike arithmetic on scalars as arithmetic on vectors.

A chain keeps a count for each tensor, say, and does the same with every one. Each operation on a scalar costs a call,
so those that could run at the same time, and are the same operation, run as one on their operands stacked.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from chainrule.bridges.lowering.pieces import POINTWISE

_FEWEST = 4  # below, stacking costs more than it saves


def batched(module: fx.GraphModule, values: dict[fx.Node, Any]) -> fx.GraphModule:
    """A module that computes what `module` does, with its alike scalars batched.

    Args:
      module: of nodes that are pure.
      values: a tensor for every node, real or fake.
    """
    levels: dict[int, dict[Any, list[fx.Node]]] = {}
    depth: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        depth[node] = 1 + max((depth[s] for s in node.all_input_nodes), default=0)
        if node.op in ("placeholder", "get_attr"):
            depth[node] = 0
        if node.op == "output":
            depth[node] = len(values) + 1
        key = _kind(node, values) or node
        levels.setdefault(depth[node], {}).setdefault(key, []).append(node)

    graph = _Graph()
    for _, groups in sorted(levels.items()):
        for key, nodes in groups.items():
            if isinstance(key, fx.Node) or len(nodes) < _FEWEST:
                for node in nodes:
                    graph.copy(node)
            else:
                graph.batch(nodes)
    return fx.GraphModule(module, graph.new)


def _kind(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Equal for scalar operations that can be one; None for others."""
    value = values.get(node)
    if node.target not in POINTWISE or not isinstance(value, Tensor) or value.ndim or node.kwargs:
        return None
    given = [values[a] if isinstance(a, fx.Node) else None for a in node.args]
    tensors = [t for t in given if t is not None]
    if any(t.ndim for t in tensors) or any(isinstance(a, (tuple, list)) for a in node.args):
        return None
    # Among tensors of one type, vectors and scalars are promoted alike.
    compared = tensors[1:] if node.target is torch.where else tensors
    if len({t.dtype for t in compared}) > 1:
        return None
    described = [repr(a) if t is None else t.dtype for a, t in zip(node.args, given, strict=True)]
    return (node.target, tuple(described))


class _Graph:
    """A graph under construction: an old node is a new one, or an entry of a new vector."""

    def __init__(self):
        self.new = fx.Graph()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.entries: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.parts: dict[fx.Node, fx.Node] = {}

    def scalar(self, old: fx.Node) -> fx.Node:
        """The new node for an old one."""
        if old not in self.nodes:
            vector, i = self.entries[old]
            if vector not in self.parts:
                self.parts[vector] = self.new.call_function(torch.unbind, (vector,))
            self.nodes[old] = self.new.call_function(operator.getitem, (self.parts[vector], i))
        return self.nodes[old]

    def vector(self, olds: Sequence[fx.Node]) -> fx.Node:
        """The old nodes, one after another, as a vector; or as the scalar that all of them are."""
        if len(set(olds)) == 1:
            return self.scalar(olds[0])
        entries = [self.entries.get(old) for old in olds]
        source, start = entries[0] or (None, 0)
        if entries == [(source, start + k) for k in range(len(olds))] and source is not None:
            return self.new.call_function(torch.narrow, (source, 0, start, len(olds)))
        return self.new.call_function(torch.stack, ([self.scalar(old) for old in olds],))

    def copy(self, node: fx.Node) -> None:
        """The node as it is."""
        self.nodes[node] = self.new.node_copy(node, self.scalar)

    def batch(self, nodes: Sequence[fx.Node]) -> None:
        """The nodes as one."""
        columns = zip(*(node.args for node in nodes), strict=True)
        args = [self.vector(c) if isinstance(c[0], fx.Node) else c[0] for c in columns]  # pyright: ignore
        vector = self.new.call_function(nodes[0].target, tuple(args))  # pyright: ignore
        for i, node in enumerate(nodes):
            self.entries[node] = (vector, i)
