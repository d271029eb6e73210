"""Which results of a piece may lie where an operand was."""

from collections.abc import Container
from typing import NamedTuple

from torch import fx

from chainrule.bridges.lowering.nodes import args_of, value_of
from chainrule.bridges.lowering.op_info import hands_on, info
from chainrule.bridges.lowering.passes.partition import Piece


def last_reads(piece: Piece) -> dict[fx.Node, fx.Node]:
    """For everything that a piece reads the last of its nodes to read it."""
    return {s: n for n in piece.nodes for s in n.all_input_nodes}


class Aliases(NamedTuple):
    """Results that are computed in the memory of an operand."""

    operand: dict[fx.Node, int]
    """For such a node the position of the operand, 0 or 1."""
    updated: set[fx.Node]
    """Inputs that are updated in place: what they become is computed where they were."""


def aliases_of(piece: Piece, batched: Container[fx.Node]) -> Aliases:
    """The aliases of a piece.

    Args:
      piece: with nodes that make memory of their own, except where they are aliases.
      batched: the nodes that can write into an operand.
    """
    last = last_reads(piece)
    outputs = set(piece.outputs)
    operand: dict[fx.Node, int] = {}
    updated: set[fx.Node] = set()
    for i, old in piece.updates:
        chain: dict[fx.Node, int] = {}
        current = old
        while (found := _heir(current, last, batched, operand)) and found[0] not in chain:
            current, chain[found[0]] = found
            if current in outputs:
                break
        if chain and current is piece.outputs[i]:
            operand |= chain
            updated.add(old)
    for node in piece.nodes:
        # Only these make memory of their own; what others read must stay as it is.
        if node in batched and node not in outputs:
            found = _heir(node, last, batched, operand)
            if found is not None:
                operand[found[0]] = found[1]
    return Aliases(operand, updated)


def _heir(
    x: fx.Node,
    last: dict[fx.Node, fx.Node],
    batched: Container[fx.Node],
    taken: Container[fx.Node],
) -> tuple[fx.Node, int] | None:
    """The last reader of `x` and the position of `x` in it, if it may be computed in its memory."""
    node = last.get(x)
    if node is None or node not in batched or node in taken or list(node.args).count(x) != 1:
        return None
    if any(map(hands_on, x.users)):  # a view of it may be read later
        return None
    index = args_of(node).index(x)
    commutes = info(node).commutes and not node.kwargs
    if index > 1 or (index == 1 and not commutes):
        return None
    a, b = value_of(x), value_of(node)
    return (node, index) if a.shape == b.shape and a.dtype == b.dtype else None
