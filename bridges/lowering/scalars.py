"""Alike arithmetic on scalars as arithmetic on vectors.

A chain keeps a count for each tensor, say, and does the same with every one. Each operation on a scalar costs a call,
so those that could run at the same time, and are the same operation, run as one on their operands stacked.
"""

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.pieces import POINTWISE
from chainrule.bridges.lowering.simplify import drop_dead

_FEWEST = 4  # below, stacking costs more than it saves
_ARITHMETIC = (torch.add, torch.sub, torch.mul, torch.div)


def batched(
    module: fx.GraphModule, values: dict[fx.Node, Any]
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A module that computes what `module` does, with its alike scalars batched.

    Args:
      module: of nodes that are pure.
      values: a tensor for every node, real or fake.

    Returns:
      The module, and its constants, which it takes after the inputs of `module`.
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

    graph = _Graph(values)
    for _, groups in sorted(levels.items()):
        for key, nodes in groups.items():
            if isinstance(key, fx.Node) or len(nodes) < _FEWEST:
                for node in nodes:
                    graph.copy(node)
            else:
                graph.batch(nodes)
    graph.select_few()
    drop_dead(graph.new)
    return fx.GraphModule(module, graph.new), graph.constants


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
    dtypes = {t.dtype for t in compared}
    if len(dtypes) > 1:
        return None
    # A number beside a float32 tensor counts as one of float32, so that those that differ can be a vector.
    free = dtypes == {torch.float32} and node.target in _ARITHMETIC
    described = [
        t.dtype if t is not None else float if free and type(a) is float else repr(a)
        for a, t in zip(node.args, given, strict=True)
    ]
    return (node.target, tuple(described))


class _Graph:
    """A graph under construction: an old node is a new one, or an entry of a new vector."""

    def __init__(self, values: dict[fx.Node, Any]):
        self.values = values
        self.new = fx.Graph()
        self.last: Any = None  # placeholder
        self.constants: list[Tensor] = []
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.entries: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.stacked: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.lengths: dict[fx.Node, int] = {}
        self.parts: dict[fx.Node, fx.Node] = {}
        self.vectors: dict[tuple[fx.Node, ...], fx.Node] = {}

    def copy(self, node: fx.Node) -> None:
        """The node as it is, or as a vector where that is what it is."""
        source: Any = node.args[0] if node.args else None
        if node.op == "placeholder":
            self.last = self.nodes[node] = self.new.node_copy(node)
        elif node.target is torch.full:
            self.nodes[node] = self._constant(torch.full(*node.args, **node.kwargs))  # pyright: ignore
        elif node.target is ops.unbind:
            self.nodes[node] = self.new.call_function(torch.clone, (self.scalar(source),))
            self.lengths[self.nodes[node]] = self.values[source].shape[0]
        elif node.target is operator.getitem and source.target is ops.unbind:
            self.entries[node] = (self.nodes[source], node.args[1])  # pyright: ignore
        elif node.target is torch.stack and self._is_of_scalars(node):
            self.nodes[node] = self.vector(source)
        else:
            self.nodes[node] = self.new.node_copy(node, self.scalar)

    def batch(self, nodes: Sequence[fx.Node]) -> None:
        """The nodes as one."""
        columns = zip(*(node.args for node in nodes), strict=True)
        vector = self.new.call_function(nodes[0].target, tuple(map(self._column, columns)))  # pyright: ignore
        self.lengths[vector] = len(nodes)
        for i, node in enumerate(nodes):
            self.entries[node] = (vector, i)

    def scalar(self, old: fx.Node) -> fx.Node:
        """The new node for an old one."""
        if old not in self.nodes:
            vector, i = self.entries[old]
            if vector not in self.parts:
                self.parts[vector] = self.new.call_function(torch.unbind, (vector,))
            self.nodes[old] = self.new.call_function(operator.getitem, (self.parts[vector], i))
        return self.nodes[old]

    def vector(self, olds: Sequence[fx.Node]) -> fx.Node:
        """The old nodes, one after another."""
        key = tuple(olds)
        if key not in self.vectors:
            self.vectors[key] = self._vector(key)
            self.lengths[self.vectors[key]] = len(key)
        return self.vectors[key]

    def _place(self, old: fx.Node) -> tuple[fx.Node, int] | None:
        """A vector that it is an entry of, and where."""
        return self.entries.get(old) or self.stacked.get(old)

    def select_few(self) -> None:
        """Takes single entries where few of a vector are needed."""
        for vector, parts in self.parts.items():
            for entry in list(parts.users) if len(parts.users) < _FEWEST else ():
                entry.target, entry.args = torch.select, (vector, 0, entry.args[1])

    def _vector(self, olds: tuple[fx.Node, ...]) -> fx.Node:
        known = {old: found for old in olds if (found := self._place(old))}
        loose = [old for old in dict.fromkeys(olds) if old not in known]
        parts = list(dict.fromkeys(vector for vector, _ in known.values()))
        if loose:
            parts.append(self.new.call_function(torch.stack, ([self.nodes[old] for old in loose],)))
            self.lengths[parts[-1]] = len(loose)
            self.stacked |= {old: (parts[-1], i) for i, old in enumerate(loose)}
            known |= {old: self.stacked[old] for old in loose}
        starts = dict(
            zip(parts, accumulate((self.lengths[p] for p in parts), initial=0), strict=False)
        )
        whole = parts[0] if len(parts) == 1 else self.new.call_function(torch.cat, (parts,))
        picks = [starts[vector] + i for vector, i in map(known.__getitem__, olds)]
        if picks == list(range(sum(self.lengths[p] for p in parts))):
            return whole
        if picks == list(range(picks[0], picks[0] + len(picks))):
            return self.new.call_function(torch.narrow, (whole, 0, picks[0], len(picks)))
        index = self._constant(torch.tensor(picks))
        return self.new.call_function(torch.index_select, (whole, 0, index))

    def _column(self, column: Sequence[Any]) -> Any:
        """One argument of several nodes: what all of them have, or a vector."""
        one = len(set(map(repr, column))) == 1  # 0.0 and -0.0 are two
        if isinstance(column[0], fx.Node):
            return self.scalar(column[0]) if one else self.vector(column)
        return column[0] if one else self._constant(torch.tensor(column))

    def _constant(self, tensor: Tensor) -> fx.Node:
        with self.new.inserting_after(self.last):
            self.last = self.new.placeholder(f"made_{len(self.constants)}")
        self.constants.append(tensor)
        return self.last

    def _is_of_scalars(self, node: fx.Node) -> bool:
        """Whether a stack is of scalars alone, and of enough."""
        stacked: Any = node.args[0]
        dtypes = {(self.values[x].dtype, self.values[x].ndim) for x in stacked}
        return len(dtypes) == 1 and self.values[node].ndim == 1 and len(stacked) >= _FEWEST
