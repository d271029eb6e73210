"""A program in pieces: what belongs to one leaf, what is shared, and which pieces are alike.

A chain over N parameters is N copies of one program, tied together by scalars (counts, bias corrections, a global
norm). Cutting the graph at the scalars that several leaves share leaves pieces that touch one leaf each. Alike pieces
are one `kind`: they run batched (`foreach`) or are compiled once (`inductor`).
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.nodes import args_of, first_arg, is_array, mark_like, value_of
from chainrule.bridges.lowering.op_info import info, readers
from chainrule.bridges.lowering.passes.signature import flat_shape, signature
from chainrule.bridges.lowering.step_program import StepProgram

_MANY_SCALARS = 8
_FEW_BITS = 4096

SHARED, _MANY = "shared", "many"


class Piece(NamedTuple):
    """Some nodes of the graph, in order, that can run together."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    """Nodes of other pieces, placeholders and constants that it reads, in order of first use."""
    outputs: tuple[fx.Node, ...]
    """Its nodes that others read or the program returns."""
    updates: tuple[tuple[int, fx.Node], ...]
    """Pairs of an output's position and the placeholder that it may be written into: no other piece reads that at this
    stage or later."""
    flat: bool
    """Whether it is elementwise over one shape, up to reductions of everything: the tensors may be given flat."""
    kind: Any
    """Equal for pieces that are alike, whatever their shapes if they are `flat`."""


def partition(program: StepProgram) -> StepProgram:
    """Before: a graph. After: `stages` holds its nodes in pieces; those of one stage do not depend on each other, and a
    piece that updates an input in place is the last to read it.
    """
    where = owners_and_ranks(program.graph)
    groups: dict[Any, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            groups.setdefault(where[node], []).append(node)
    old_of = dict(program.updates)
    # A piece reads only from the shared scalars, which come first, and from pieces of a lower rank.
    stage_of = {node: -1 if owner == SHARED else rank for node, (owner, rank) in where.items()}
    stages: dict[int, list[Piece]] = {}
    for nodes in groups.values():
        stages.setdefault(stage_of[nodes[0]], []).append(_piece(nodes, old_of, stage_of))
    program.stages = tuple(tuple(pieces) for _, pieces in sorted(stages.items()))
    return program


def copy_constants(program: StepProgram) -> StepProgram:
    """Before: arrays made of constants alone are shared. After, but for a CPU: each node that reads one makes its own.

    An identity matrix that many leaves add would make one piece of them all. To make it again is part of the kernel
    that reads it; pieces run at the same time. (On a CPU they do not, and each operation is a pass over memory.)
    """
    if program.on_cpu:
        return program
    graph = program.graph
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        known = all(s in constant or s.op == "get_attr" for s in node.all_input_nodes)
        if node.op == "call_function" and known and is_array(value_of(node)) and not is_apart(node):
            constant.add(node)
    for node in reversed(graph.nodes):
        if node not in constant:
            continue
        for user in [user for user in node.users if user.op != "output"]:
            with graph.inserting_before(user):
                new = mark_like(graph.node_copy(node), node, value_of(node))
            user.replace_input_with(node, new)
        if not node.users:
            graph.erase_node(node)
    return program


def is_apart(node: Any) -> bool:
    """Whether a node is a piece of its own, with what unpacks its results, which runs as it is.

    Such are control flow, the compiled kernel, the way from scalars of many leaves to a vector and back, and on a CPU a
    few random bits, for whose hundred operations the compiler takes half a minute. (On a GPU it takes a second, and to
    launch them costs more than all the rest of a step.)
    """
    if not isinstance(node, fx.Node):
        return False
    if node.target is torch.stack:
        return len(args_of(node)[0]) >= _MANY_SCALARS
    if node.target is ops.threefry2x32:
        words = [value_of(s) for s in node.all_input_nodes]
        return all(w.device.type == "cpu" and w.numel() <= _FEW_BITS for w in words)
    return info(node).host or node.target is ops.unbind


def owners_and_ranks(graph: fx.Graph) -> dict[fx.Node, tuple[Any, int]]:
    """Each node's owner (a leaf, the shared scalars, or many leaves) and its rank.

    A node's `meta["rank"]` is the least that it may have; who reads one with `meta["ends"]` has a higher.
    """
    parent: dict[fx.Node, fx.Node] = {}

    def leaf_of(node: fx.Node) -> fx.Node:
        root = node
        while parent.setdefault(root, root) is not root:
            root = parent[root]
        while parent[node] is not root:
            parent[node], node = root, parent[node]
        return root

    apart = {node for node in graph.nodes if is_apart(node)}

    def unpacks(node: fx.Node) -> bool:
        return node.target is operator.getitem and first_arg(node) in apart

    def joins(node: fx.Node) -> bool:
        is_own = node.op != "get_attr" and node not in apart and not unpacks(node)
        return is_own and is_array(value_of(node))

    for node in graph.nodes:
        if node.op == "call_function" and joins(node):
            for source in node.all_input_nodes:
                if joins(source) and not _is_key(source, node):
                    parent[leaf_of(source)] = leaf_of(node)

    owners: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node in apart:
            owners[node] = node
        elif unpacks(node):
            owners[node] = node.args[0]
        elif node.op != "get_attr" and is_array(node.meta.get("val")):
            owners[node] = leaf_of(node)
        else:
            found = {owners[_summed(s)] for s in node.all_input_nodes} - {SHARED}
            # What is made of the results of a piece apart is no part of it.
            found = {_MANY if owner in apart else owner for owner in found}
            owners[node] = found.pop() if len(found) == 1 else _MANY if found else SHARED
    for node in reversed(graph.nodes):
        # A scalar from elsewhere, or of its own, that only one leaf reads is computed there.
        readers = {owners[user] for user in node.users}
        is_own = owners[node] == SHARED and "entry" in node.meta
        if (owners[node] == _MANY or is_own) and len(readers) == 1:
            (reader,) = readers
            if reader not in (SHARED, _MANY) and reader not in apart:
                owners[node] = reader

    where: dict[fx.Node, tuple[Any, int]] = {}
    for node in graph.nodes:
        rank = node.meta.get("rank", 0)
        for source in node.all_input_nodes:
            if source.op != "placeholder":
                owner, before = where[source]
                later = owner not in (SHARED, owners[node]) or _is_read_again(source, node)
                rank = max(rank, before + later)
        where[node] = owners[node], rank
    _join_ranks(where, {SHARED, _MANY, *apart})
    return {node: place for node, place in where.items() if node.op != "output"}


def _join_ranks(where: dict[fx.Node, tuple[Any, int]], no_leaves: set[Any]) -> None:
    """Raises what a leaf computes for itself alone to the rank at which it needs that.

    A statistic of a leaf does not wait for random draws, but the step that reads both does. In one piece, step follows
    statistic leaf by leaf, and finds in the cache what that has read.
    """
    groups: dict[Any, dict[int, list[fx.Node]]] = {}
    for node, (owner, rank) in where.items():
        if node.op == "call_function" and owner not in no_leaves:
            groups.setdefault(owner, {}).setdefault(rank, []).append(node)
    for owner, ranks in groups.items():
        later, *others = sorted(ranks, reverse=True)
        for rank in others:
            users = {u for node in ranks[rank] for u in node.users if u.op != "output"}
            again = any(_is_read_again(s, u) for u in users for s in u.all_input_nodes)
            if again or any(where[u][0] != owner for u in users):
                later = rank
            where.update(dict.fromkeys(ranks[rank], (owner, later)))


def _is_key(source: fx.Node, node: fx.Node) -> bool:
    """Whether a node rounds by a key, which many leaves have from one array."""
    return node.target is ops.encode and args_of(node)[1] is source


def _is_read_again(source: fx.Node, node: fx.Node) -> bool:
    """Whether a node reads what is whole when its piece has ended: codes that it decodes, or what `ends` that."""
    return source.meta.get("ends", False) or (
        node.target is ops.decode and source.target is operator.getitem
    )


def _summed(node: fx.Node) -> fx.Node:
    """What a result of a collective sums over the ranks: what is made of it belongs to the same leaf. Other nodes."""
    if node.target is operator.getitem and first_arg(node).target is ops.all_reduce:
        xs, *_ = args_of(first_arg(node))
        return xs[args_of(node)[1]]
    return node


def _piece(
    nodes: list[fx.Node], old_of: dict[fx.Node, fx.Node], stage_of: dict[fx.Node, int]
) -> Piece:
    inside = set(nodes)
    stage = stage_of[nodes[0]]

    def is_last(user: fx.Node) -> bool:
        return user in inside or stage_of.get(user, stage) < stage

    inputs = read_by(nodes)
    outputs = tuple(n for n in nodes if n in old_of or any(u not in inside for u in n.users))
    updates = []
    for i, node in enumerate(outputs):
        old = old_of.get(node)
        if old is None or old not in inputs or not all(map(is_last, readers(old))):
            continue
        now, before = value_of(node), value_of(old)
        if (now.shape, now.dtype) == (before.shape, before.dtype):
            updates.append((i, old))
    return piece_of(nodes, inputs, outputs, updates)


def read_by(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """What nodes read that is not among them, in order of first use."""
    inside = set(nodes)
    return tuple(dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in inside))


def piece_of(
    nodes: Sequence[fx.Node],
    inputs: tuple[fx.Node, ...],
    outputs: tuple[fx.Node, ...],
    updates: Sequence[tuple[int, fx.Node]],
) -> Piece:
    """A piece, with what follows from its nodes."""
    shape = flat_shape(nodes, inputs)
    kind = signature(nodes, inputs, outputs, updates, shape)
    return Piece(tuple(nodes), inputs, outputs, tuple(updates), shape is not None, kind)


def by_kind(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The pieces of a stage, those of one kind together."""
    groups: dict[Any, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.kind, []).append(piece)
    yield from groups.values()
