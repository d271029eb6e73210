"""What a compiled step moves and computes, counted from its program; nothing is run.

A tensor that several stages read is read by each: a piece of a stage is one pass over its leaf, and one more for every
sum of the whole tensor that it waits for itself. What only some of a piece's own operations hand on to each other
stays in registers, but for products of matrices, sorts and the like, which read and write memory.
"""

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.layouts import Mesh
from chainrule.bridges.lowering.nodes import args_of, function_of, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.passes.infer_values import infer_values
from chainrule.bridges.lowering.passes.join_measures import join_measures
from chainrule.bridges.lowering.passes.overwrite import overwrite
from chainrule.bridges.lowering.passes.partition import Piece, is_apart, partition
from chainrule.bridges.lowering.passes.rematerialise import rematerialise_compiled
from chainrule.bridges.lowering.passes.scalarise import scalarise
from chainrule.bridges.lowering.passes.shard import Sharding
from chainrule.bridges.lowering.passes.take_kernel_moves import take_kernel_moves
from chainrule.bridges.lowering.pipeline import SHARDED
from chainrule.bridges.lowering.program import Lowered
from chainrule.bridges.lowering.step_program import StepProgram
from chainrule.native.operations import contracted, operations_of
from chainrule.native.primitives import OPERATIONS


class Collective(NamedTuple):
    """A collective of a step."""

    kind: str
    """The name of its function in `ops.collectives`."""
    bytes: int
    """Of the result on this device."""
    devices: int
    sent: float
    """Bytes that this device sends: on a ring, the least there is, where all get the same."""


class Traffic(NamedTuple):
    """What a step moves and computes on one device."""

    read: int
    """Bytes, from memory."""
    written: int
    operations: int
    """In floating point: one for each entry that a function makes or a sum adds, 2 m n k for a product."""
    collectives: tuple[Collective, ...]
    uncounted: tuple[str, ...]
    """Functions whose operations are not counted: decompositions, sorts, control flow."""
    stages: tuple[tuple[int, int], ...]
    """Bytes read and written in each stage, then by copies at the end, then in the kernel after the program."""


def traffic(lowered: Lowered, targets: Sequence[int], sharding: Sharding | None = None) -> Traffic:
    """Counts a step that `make_step(lowered, targets, compile=True, sharding=sharding)` would run on a CPU.

    >>> import jax, optax
    >>> from chainrule.bridges.lowering import lower
    >>> aval = jax.ShapeDtypeStruct((1000,), jnp.float32)
    >>> found = traffic(lower(lambda p, g: (p - 0.1 * g,), aval, aval), (0,))
    >>> found.read, found.written, found.operations
    (8000, 4000, 2000)
    """
    program = StepProgram.of(lowered, targets, sharding)
    if sharding is not None:
        for each in SHARDED:
            program = each(program)
    program = join_measures(infer_values(program))
    collectives = tuple(_collectives(program.graph, sharding and sharding.mesh))
    uncounted: set[str] = set()
    operations = sum(_operations(node, uncounted) for node in program.graph.nodes)
    for each in (take_kernel_moves, scalarise, rematerialise_compiled, partition, overwrite):
        program = each(program)
    stages = [_sum(map(_passes, stage)) for stage in program.stages]
    stages += [_copied(program), _moved(program)]
    read, written = _sum(stages)
    return Traffic(read, written, operations, collectives, tuple(sorted(uncounted)), tuple(stages))


# ---- memory ------------------------------------------------------------------------------------


def _sum(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    read = written = 0
    for more, new in pairs:
        read, written = read + more, written + new
    return read, written


def _copied(program: StepProgram) -> tuple[int, int]:
    """Results that no piece writes where they belong: the executor copies them at the end."""
    in_place = {
        (piece.outputs[i], old)
        for piece in itertools.chain(*program.stages)
        if not any(map(is_apart, piece.nodes))
        for i, old in piece.updates
    }
    left = [pair for pair in program.updates if pair[0] is not pair[1] and pair not in in_place]
    # An input that another result hands on is kept first.
    times = [1 + (new.op == "placeholder") for new, _ in left]
    sizes = [(_size(value_of(new)), _size(value_of(old))) for new, old in left]
    return _sum((n * new, n * old) for n, (new, old) in zip(times, sizes, strict=True))


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(map(_size, value))
    return 0


def _moved(program: StepProgram) -> tuple[int, int]:
    """Of what the kernel does in place: it reads every tensor, and writes all but the gradients."""
    inputs = program.inputs
    read = written = 0
    for move in program.moves:
        for role, positions in move.tensors.items():
            size = sum(_size(value_of(inputs[i])) for i in positions)
            read, written = read + size, written + (role != "gradients") * size
    return read, written


def _is_stream(node: fx.Node) -> bool:
    """Whether it works on what passes by: entry by entry, a sum, a view, or what is made of nothing."""
    facts = info(node)
    made = not node.all_input_nodes or node.target in (ops.iota_2x32, operator.getitem)
    return facts.elementwise or facts.reduces or facts.view or made


def _passes(piece: Piece) -> tuple[int, int]:
    """Bytes that a piece reads and writes."""
    inside = set(piece.nodes)
    level: dict[fx.Node, int] = {}
    readers: dict[fx.Node, set[Any]] = {}

    def read_by(source: fx.Node, reader: int | fx.Node) -> None:
        """Notes that a pass, or an operation that works on memory, reads what `source` stands for."""
        if reader in readers.get(source, ()):
            return
        if source in inside and _is_stream(source) and isinstance(reader, int):
            if level[source] == reader:
                return  # in registers
            if source not in piece.outputs and not info(source).reduces:
                for earlier in source.all_input_nodes:  # made again
                    read_by(earlier, reader)
                return
        readers.setdefault(source, set()).add(reader)

    for node in piece.nodes:
        level[node] = max(
            (level[s] + info(s).reduces for s in node.all_input_nodes if s in inside), default=0
        )
    for node in reversed(piece.nodes):  # in the pass that needs it
        if info(node).elementwise:
            level[node] = min((level[u] for u in node.users if u in inside), default=level[node])
    for node in piece.nodes:
        for source in node.all_input_nodes:
            read_by(source, level[node] if _is_stream(node) else node)
    read = sum(_size(value_of(source)) * len(by) for source, by in readers.items())
    made = (
        node
        for node in piece.nodes
        if node in readers or node in piece.outputs or not _is_stream(node)
        if not info(node).host and node.target is not operator.getitem
    )
    return read, sum(_size(value_of(node)) for node in made)


# ---- operations ----------------------------------------------------------------------------------


def _operations(node: fx.Node, uncounted: set[str]) -> int:
    if node.op != "call_function":
        return 0
    value, facts = value_of(node), info(node)
    if node.target is ops.kernel_call:
        return _of_form(node)
    if node.target in (torch.mm, torch.bmm, torch.dot, ops.wide_mm):
        return 2 * _entries(value) * value_of(args_of(node)[0]).shape[-1]
    if node.target is ops.dot_general:
        a, _, axes = args_of(node)[:3]
        return 2 * _entries(value) * contracted(value_of(a).shape, (axes, ()))
    if facts.reduces:
        return sum(_entries(value_of(s)) for s in node.all_input_nodes)
    if facts.elementwise:
        return _entries(value) if getattr(value, "is_floating_point", lambda: False)() else 0
    moves = facts.view or facts.free or _is_stream(node) or node.target in _MOVES
    if not moves and not facts.collective:
        uncounted.add(function_of(node).__name__)
    return 0


_MOVES = {torch.cat, torch.flip, ops.pad, ops.gather, ops.scatter, ops.dynamic_update_slice}


def _entries(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _of_form(node: fx.Node) -> int:
    """Of a call of the kernel: those of its form in JAX."""
    name, params, operands = args_of(node)[:3]

    def struct(x: Any) -> jax.ShapeDtypeStruct:
        if not isinstance(x, fx.Node):
            return jax.ShapeDtypeStruct((), jnp.float32)
        value = value_of(x)
        return jax.ShapeDtypeStruct(value.shape, jnp.dtype(str(value.dtype).removeprefix("torch.")))

    form = OPERATIONS[name].form
    jaxpr = jax.make_jaxpr(lambda *xs: form(*xs, **dict(params)))(*map(struct, operands))
    return operations_of(jaxpr.jaxpr, set())


# ---- collectives -----------------------------------------------------------------------------


def _collectives(graph: fx.Graph, mesh: Mesh | None) -> Iterator[Collective]:
    if mesh is None:
        return
    sizes = dict(zip(mesh.groups, (*mesh.shape, math.prod(mesh.shape)), strict=True))
    for node in graph.nodes:
        if not info(node).collective:
            continue
        xs, *_ = args = args_of(node)
        devices = next(sizes[a] for a in args if isinstance(a, str) and a in sizes)
        others = 1 - 1 / devices
        if node.target is ops.all_reduce:  # goes around twice
            size = sum(_size(value_of(x)) for x in xs)
            yield Collective("all_reduce", size, devices, 2 * size * others)
        elif node.target is ops.all_gather:
            width = [value_of(x).element_size() for x in xs]
            size = sum(math.prod(s) * w for s, w in zip(args[1], width, strict=True))
            yield Collective("all_gather", size, devices, size * others)
        else:
            assert node.target is ops.exchange
            size = sent = 0
            for away, _, shape, dtype in args[1]:
                size += math.prod(shape) * dtype.itemsize
                parcels = (spans for rank, spans in away if rank != mesh.rank)
                sent += (
                    sum(math.prod(b - a for a, b in spans) for spans in parcels) * dtype.itemsize
                )
            yield Collective("exchange", size, devices, sent)
