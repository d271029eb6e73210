"""A program in pieces: what belongs to one leaf, what is shared, and which pieces are alike.

A chain over N parameters is N copies of one program, tied together by scalars (counts, bias corrections, a global
norm). Cutting the graph at the scalars that several leaves share leaves pieces that touch one leaf each. Alike pieces
are one `kind`: they run batched (``foreach``) or are compiled once (``inductor``).
"""

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.convert import physical_shape, torch_dtype
from chainrule.bridges.lowering.kernel import kernel_call
from chainrule.bridges.lowering.program import Lowered

HOST = {ops.branch, ops.scan, ops.while_loop, kernel_call}
"""Nodes that run Python control flow or the compiled kernel."""

POINTWISE = {
    *(ops.cbrt, ops.erf_inv, ops.float_to_int, ops.half_precision, ops.int_div, ops.int_rem),
    *(ops.population_count, ops.reduce_precision, ops.round_away, ops.shift_left),
    *(ops.shift_right_arithmetic, ops.shift_right_logical, ops.sign, ops.threefry2x32),
    *(torch.abs, torch.add, torch.bitwise_and, torch.bitwise_left_shift, torch.bitwise_not),
    *(torch.bitwise_or, torch.bitwise_right_shift, torch.bitwise_xor, torch.ceil, torch.clamp),
    *(torch.clamp_max, torch.clamp_min, torch.clone, torch.cos, torch.div, torch.eq, torch.erf),
    *(torch.exp, torch.expm1, torch.floor, torch.fmod, torch.ge, torch.gt, torch.isfinite),
    *(torch.le, torch.log, torch.log1p, torch.lt, torch.maximum, torch.minimum, torch.mul),
    *(torch.ne, torch.neg, torch.pow, torch.reciprocal, torch.round, torch.rsqrt, torch.rsub),
    *(torch.sgn, torch.sigmoid, torch.sign, torch.sin, torch.sqrt, torch.square, torch.sub),
    *(torch.tanh, torch.where, torch.Tensor.to, torch.lerp, torch.addcmul, torch.addcdiv),
    torch.nan_to_num,
}
"""Functions that work element by element, so that their operands may be given flat."""

_MANY_SCALARS = 8
_FEW_BITS = 4096

FULL_REDUCTIONS = {torch.sum, torch.amax, torch.amin, torch.any, torch.all}

SHARED, _MANY = "shared", "many"


class Piece(NamedTuple):
    """Some nodes of the graph, in order, that can run together."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    """Nodes of other pieces, placeholders and constants that it reads, in order of first use."""
    outputs: tuple[fx.Node, ...]
    """Its nodes that others read or the program returns."""
    renews: tuple[tuple[int, fx.Node], ...]
    """Pairs of an output's position and the placeholder that it renews, which no other piece reads at this stage or
    later."""
    flat: bool
    """Whether it is elementwise over one shape, up to reductions of everything: the tensors may be given flat."""
    kind: Any
    """Equal for pieces that are alike, whatever their shapes if they are `flat`."""


class Program(NamedTuple):
    """A lowered program in stages of pieces; the pieces of one stage do not depend on each other."""

    stages: tuple[tuple[Piece, ...], ...]
    placeholders: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    values: dict[fx.Node, Any]
    """A fake tensor for every node: its shape, dtype and device."""


def cut(graph: fx.Graph, targets: Sequence[int], values: dict[fx.Node, Any]) -> Program:
    """Cuts a program into pieces.

    Args:
      graph: the program.
      targets: for every output, the position of the input that it renews.
      values: a fake tensor for every node.

    Returns:
      The pieces. Those that renew an input in place are its last readers.
    """
    placeholders = tuple(graph.find_nodes(op="placeholder"))
    results: tuple[fx.Node, ...] = tuple(graph.output_node().args[0])  # pyright: ignore
    where = places(graph, values)
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_module"):
            groups.setdefault(where[node], []).append(node)
    renewed = {r: placeholders[t] for r, t in zip(results, targets, strict=True)}
    returned = set(results)
    # A piece reads only from the shared scalars, which come first, and from pieces of a lower rank.
    stage_of = {node: -1 if owner == SHARED else rank for node, (owner, rank) in where.items()}
    stages: dict[int, list[Piece]] = {}
    for nodes in groups.values():
        piece = _piece(nodes, renewed, returned, values, stage_of)
        stages.setdefault(stage_of[nodes[0]], []).append(piece)
    ordered = tuple(tuple(pieces) for _, pieces in sorted(stages.items()))
    return Program(ordered, placeholders, results, values)


def fake_values(lowered: Lowered, device: torch.device) -> dict[fx.Node, Any]:
    """A fake tensor for every node of a program."""
    run = _Propagate(lowered.graph)
    run.device = device
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        run.run(*map(run.fake, lowered.in_avals))
    return run.values


class _Propagate(fx.Interpreter):
    """Runs a graph on fake tensors and keeps all of them."""

    device: torch.device

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def fake(self, aval: Any) -> torch.Tensor:
        return torch.empty(physical_shape(aval), dtype=torch_dtype(aval.dtype), device=self.device)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.target in HOST:
            items: dict[Any, fx.Node] = {user.args[1]: user for user in n.users}
            count = max(items, default=-1) + 1
            self.values[n] = [
                self.fake(items[i].meta["aval"]) if i in items else None for i in range(count)
            ]
        else:
            self.values[n] = super().run_node(n)
        return self.values[n]


def is_apart(node: Any, values: dict[fx.Node, Any]) -> bool:
    """Whether a node is a piece of its own, with what unpacks its results, which runs as it is.

    Such are control flow, the compiled kernel, the way from scalars of many leaves to a vector and back, and on a CPU a
    few random bits, for whose hundred operations the compiler takes half a minute. (On a GPU it takes a second, and to
    launch them costs more than all the rest of a step.)
    """
    if not isinstance(node, fx.Node):
        return False
    if node.target is torch.stack:
        return len(node.args[0]) >= _MANY_SCALARS  # pyright: ignore
    if node.target is ops.threefry2x32:
        words = [values[s] for s in node.all_input_nodes]
        return all(w.device.type == "cpu" and w.numel() <= _FEW_BITS for w in words)
    return node.target in HOST or node.target is ops.unbind


def is_array(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim > 0
    return isinstance(value, (tuple, list)) and any(is_array(v) for v in value)


def places(graph: fx.Graph, values: dict[fx.Node, Any]) -> dict[fx.Node, tuple[Any, int]]:
    """Each node's owner (a leaf, the shared scalars, or many leaves) and its rank.

    A node's `meta["rank"]` is the least that it may have.
    """
    parent: dict[fx.Node, fx.Node] = {}

    def leaf_of(node: fx.Node) -> fx.Node:
        root = node
        while parent.setdefault(root, root) is not root:
            root = parent[root]
        while parent[node] is not root:
            parent[node], node = root, parent[node]
        return root

    apart = {node for node in graph.nodes if is_apart(node, values)}

    def unpacks(node: fx.Node) -> bool:
        return node.target is operator.getitem and node.args[0] in apart

    def joins(node: fx.Node) -> bool:
        is_own = node.op != "get_attr" and node not in apart and not unpacks(node)
        return is_own and is_array(values[node])

    for node in graph.nodes:
        if node.op == "call_function" and joins(node):
            for source in node.all_input_nodes:
                if joins(source):
                    parent[leaf_of(source)] = leaf_of(node)

    owners: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node in apart:
            owners[node] = node
        elif unpacks(node):
            owners[node] = node.args[0]
        elif node.op != "get_attr" and is_array(values.get(node)):
            owners[node] = leaf_of(node)
        else:
            found = {owners[s] for s in node.all_input_nodes} - {SHARED}
            owners[node] = found.pop() if len(found) == 1 else _MANY if found else SHARED
    for node in reversed(graph.nodes):
        # A scalar from elsewhere that only one leaf reads is computed there.
        readers = {owners[user] for user in node.users}
        owner = owners[node]
        from_many = owner == _MANY or (owner in apart and owner is not node and not unpacks(node))
        if from_many and len(readers) == 1:
            (reader,) = readers
            if reader not in (SHARED, _MANY) and reader not in apart:
                owners[node] = reader

    where: dict[fx.Node, tuple[Any, int]] = {}
    for node in graph.nodes:
        rank = node.meta.get("rank", 0)
        for source in node.all_input_nodes:
            if source.op != "placeholder":
                owner, before = where[source]
                rank = max(rank, before + (owner not in (SHARED, owners[node])))
        where[node] = owners[node], rank
    return {node: place for node, place in where.items() if node.op != "output"}


def _piece(
    nodes: list[fx.Node],
    renewed: dict[fx.Node, fx.Node],
    returned: set[fx.Node],
    values: dict[fx.Node, Any],
    stage_of: dict[fx.Node, int],
) -> Piece:
    inside = set(nodes)
    stage = stage_of[nodes[0]]

    def is_last(user: fx.Node) -> bool:
        return user in inside or stage_of.get(user, stage) < stage

    inputs = tuple(dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in inside))
    outputs = tuple(n for n in nodes if n in returned or any(u not in inside for u in n.users))
    renews = []
    for i, node in enumerate(outputs):
        old = renewed.get(node)
        if (
            old in inputs
            and all(map(is_last, old.users))
            and values[old].shape == values[node].shape
            and values[old].dtype == values[node].dtype
        ):
            renews.append((i, old))
    tensors = [values[n] for n in (*nodes, *inputs)]
    flat = all(isinstance(t, torch.Tensor) for t in tensors) and all(
        _is_flat(n, values) for n in nodes
    )
    shapes = {tuple(t.shape) for t in tensors if t.ndim} if flat else set()
    if len(shapes) > 1:  # next to a tensor's first element
        shapes = {shape for shape in shapes if math.prod(shape) != 1}
    flat = len(shapes) == 1
    shape = next(iter(shapes)) if flat else None
    kind = _kind(nodes, inputs, outputs, tuple(renews), values, shape)
    return Piece(tuple(nodes), inputs, outputs, tuple(renews), flat, kind)


def _is_flat(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    if node.op != "call_function" or not isinstance(values[node], torch.Tensor):
        return False
    arrays = [s for s in node.all_input_nodes if is_array(values[s])]
    if not arrays and not is_array(values[node]):
        return True
    if node.target in FULL_REDUCTIONS and values[node].ndim == 0:
        return True
    return (node.target in POINTWISE or node.target is ops.first) and bool(arrays)


def reduces_all(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether a node of a flat piece reduces a tensor to a scalar."""
    return node.target in FULL_REDUCTIONS and is_array(values[node.args[0]])  # pyright: ignore


def _described(value: Any, node: fx.Node, number: dict[fx.Node, int], size: int | None) -> Any:
    """A hashable description of an argument of `node`; a number that is `size` is the size, whatever it is."""
    if isinstance(value, fx.Node):
        return ("node", number[value])
    if isinstance(value, (tuple, list)):
        return tuple(_described(v, node, number, size) for v in value)
    if isinstance(value, dict):
        return tuple((k, _described(v, node, number, size)) for k, v in value.items())
    if size is not None and is_size(value, node, size):
        return "size"
    return (type(value).__name__, repr(value))


def _kind(nodes, inputs, outputs, renews, values, shape) -> Any:
    """A hashable description of a piece, without its shape if one is given."""
    number = {n: i for i, n in enumerate((*inputs, *nodes))}
    size = 1
    for length in shape or ():
        size *= length

    def described(value: Any, node: fx.Node) -> Any:
        return _described(value, node, number, None if shape is None else size)

    def body(node: fx.Node) -> Any:
        args: Any = node.args
        if shape is not None and node.target in FULL_REDUCTIONS and is_array(values[args[0]]):
            args = (args[0], "all", *args[2:])
        return (node.target, described(args, node), described(node.kwargs, node))

    def outer(node: fx.Node) -> Any:
        value = values[node]
        if not isinstance(value, torch.Tensor):  # a loop's results, or its body
            return (node.target, id(value) if node.op == "get_attr" else str(value))
        flat = shape is not None and value.ndim > 0
        own = ("flat", value.numel() < 2) if flat else tuple(value.shape)
        constant = node.target if node.op == "get_attr" else None
        return (str(value.dtype), own, constant)

    return (
        shape is not None,
        size < 2 if shape is not None else None,
        tuple(map(outer, inputs)),
        tuple(map(body, nodes)),
        tuple(number[n] for n in outputs),
        tuple((i, number[old]) for i, old in renews),
    )


def is_size(value: Any, node: fx.Node, size: int) -> bool:
    """Whether a literal is the number of elements that a mean divides by."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return node.target is torch.div and is_number and size > 16 and value == size


def body_of(piece: Piece, values: dict[fx.Node, Any]) -> Any:
    """A function of the piece's inputs that runs its nodes and returns its outputs."""
    array = next((n for n in (*piece.inputs, *piece.nodes) if is_array(values[n])), None)
    size = values[array].numel() if piece.flat and array is not None else 0

    # No closure that calls itself: it would be a cycle, and hold each call's tensors until the collector comes.
    def given(value: Any, node: fx.Node, env: dict[fx.Node, Any], again: Any) -> Any:
        if isinstance(value, fx.Node):
            return env[value]
        if isinstance(value, (tuple, list)):
            return type(value)(again(v, node, env, again) for v in value)
        if size and array in env and is_size(value, node, size):
            return env[array].numel()
        return value

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        env: dict[fx.Node, Any] = dict(zip(piece.inputs, inputs, strict=True))
        for node in piece.nodes:
            args = tuple(given(a, node, env, given) for a in node.args)
            if piece.flat and reduces_all(node, values):
                args = (args[0], (0,), *args[2:])
            kwargs = {k: given(v, node, env, given) for k, v in node.kwargs.items()}
            env[node] = node.target(*args, **kwargs)  # pyright: ignore
        return [env[n] for n in piece.outputs]

    return run


def by_kind(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The pieces of a stage, those of one kind together."""
    groups: dict[Any, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.kind, []).append(piece)
    yield from groups.values()
