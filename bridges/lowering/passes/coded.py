"""Pieces that decode or encode, taken apart: what is left between is a piece over tensors like any other."""

import operator
from typing import NamedTuple

from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.nodes import args_of, first_arg, is_array, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.passes.partition import Piece, piece_of, read_by


class Coded(NamedTuple):
    """A piece that decodes, computes and encodes."""

    inner: Piece
    """What it computes: decoded tensors are among its inputs, and what is encoded among its outputs. One that becomes
    what replaces its codes is updated in place."""
    decoded: tuple[fx.Node, ...]
    encoded: tuple[fx.Node, ...]
    updates: dict[fx.Node, fx.Node]
    """Codes and scales that it writes -> the placeholders that they may be written into."""
    outputs: tuple[fx.Node, ...]
    """What others read of it, or the program returns."""

    @property
    def values(self) -> list[fx.Node]:
        """The tensors that are decoded or encoded."""
        return [*self.decoded, *map(first_arg, self.encoded)]

    @property
    def size(self) -> int:
        """Elements of its tensors, if it is flat."""
        return value_of(self.values[0]).numel()

    @property
    def written(self) -> list[tuple[fx.Node, fx.Node]]:
        """Results that it writes into placeholders, with these."""
        own = [(self.inner.outputs[i], old) for i, old in self.inner.updates]
        return [(n, old) for n, old in own if old not in self.decoded] + [*self.updates.items()]

    @property
    def by_parts(self) -> bool:
        """Whether parts of the tensors can be computed one after the other, and nothing twice is wrong."""
        piece = self.inner
        whole = all(is_array(value_of(n)) for n in (*piece.outputs, *(o for _, o in piece.updates)))
        alone = all(
            info(n).elementwise or not any(is_array(value_of(x)) for x in (n, *n.all_input_nodes))
            for n in piece.nodes
        )
        known = {*piece.inputs, *piece.outputs}
        return piece.flat and whole and alone and known.issuperset(self.values)


def is_coded(piece: Piece) -> bool:
    """Whether a piece decodes or encodes tensors in the kernel."""
    return any(info(node).codes for node in piece.nodes)


def take_apart(piece: Piece) -> Coded:
    """A piece that `is_coded` as what it computes and what it decodes and encodes."""
    decoded = tuple(n for n in piece.nodes if n.target is ops.decode)
    encoded = tuple(n for n in piece.nodes if n.target is ops.encode)
    updated = {piece.outputs[i]: old for i, old in piece.updates}
    coded = {*decoded, *encoded, *(user for n in encoded for user in n.users)}
    nodes = [n for n in piece.nodes if n not in coded]
    inputs = read_by(nodes)
    wanted = {*piece.outputs, *map(first_arg, encoded)}
    outputs = tuple(n for n in nodes if n in wanted)
    own = {*inputs} - {*map(first_arg, encoded)}  # which are read after what is computed
    updates = [(i, updated[n]) for i, n in enumerate(outputs) if updated.get(n) in own]
    taken = {i for i, _ in updates}
    for node in encoded:
        old = _replaced(node, decoded, updated)
        new = first_arg(node)
        if old not in own or new not in outputs or not {old, new}.isdisjoint(piece.outputs):
            continue  # what others read is in memory
        i = outputs.index(new)
        if i not in taken and value_of(new).shape == value_of(old).shape:
            updates.append((i, old))
            taken.add(i)
    inner = piece_of(nodes, inputs, outputs, updates)
    return Coded(
        inner, decoded, encoded, {n: old for n, old in updated.items() if n in coded}, piece.outputs
    )


def _replaced(
    node: fx.Node, decoded: tuple[fx.Node, ...], updated: dict[fx.Node, fx.Node]
) -> fx.Node | None:
    """The decoded tensor whose codes a node replaces."""
    olds = {updated.get(user) for user in node.users}
    return next((d for d in decoded if {*args_of(d)[:2]} == olds), None)


def results_of(node: fx.Node) -> dict[int, fx.Node]:
    """The nodes of the codes, 0, and of the scales, 1, that `encode` makes."""
    return {args_of(u)[1]: u for u in node.users if u.target is operator.getitem}
