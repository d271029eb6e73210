"""A piece as a Python function, without its graph."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from chainrule.bridges.lowering.nodes import args_of, value_of
from chainrule.bridges.lowering.passes.partition import Piece
from chainrule.bridges.lowering.passes.signature import is_size, reduces_all, spanning


class Ref(int):
    """An argument that is an input or node of a piece, by its position among them."""


class _Size(int):
    """An argument that is the number of elements of what stands at a position."""


def without_nodes(args: Any, position: dict[fx.Node, Ref]) -> Any:
    """Arguments with positions in the place of nodes."""
    return fx.map_arg(args, position.__getitem__)


def filled(value: Any, read: Callable[[int], Any]) -> Any:
    """An argument with what is read at its positions."""
    if type(value) is Ref:
        return read(value)
    if type(value) is _Size:
        return read(value).numel()
    if isinstance(value, (tuple, list)):
        return type(value)([filled(v, read) for v in value])
    return value


def body_of(piece: Piece) -> Callable[..., list[Tensor]]:
    """A function of the piece's inputs that runs its nodes and returns its outputs; a flat piece takes tensors given
    flat, of any length.
    """
    position = {n: Ref(k) for k, n in enumerate((*piece.inputs, *piece.nodes))}
    # An input spans the piece, since nothing in it makes more elements of fewer.
    whole = spanning(piece.inputs) if piece.flat else []
    size = value_of(whole[0]).numel() if whole else 0

    def args_for(node: fx.Node) -> Any:
        args = args_of(node)
        if piece.flat and reduces_all(node):
            args = (args[0], (0,), *args[2:])
        if whole:
            measured = _Size(position[whole[0]])
            args = tuple(measured if is_size(a, node, size) else a for a in args)
        return without_nodes(args, position)

    calls: list[tuple[Any, Any, Any]] = [
        (node.target, args_for(node), without_nodes(dict(node.kwargs), position))
        for node in piece.nodes
    ]
    outputs = [position[n] for n in piece.outputs]

    def run(*inputs: Tensor) -> list[Tensor]:
        found: list[Any] = list(inputs)
        read = found.__getitem__
        for function, args, kwargs in calls:
            named = {name: filled(x, read) for name, x in kwargs.items()}
            found.append(function(*(filled(x, read) for x in args), **named))
        return [found[k] for k in outputs]

    return run
