"""Compiled calls: each kind of piece goes through Inductor once, whatever the number of leaves.

A flat piece is compiled for tensors of any length and called for each leaf with its tensors given flat; any other for
its shapes. The calls of a kind are one loop where that can be: see `launches.py`. The compiled code is called directly,
without Dynamo's guards: the bridge has checked shapes, dtypes and devices. Parameters and state are updated in place.
Inductor keeps what it compiled on disk, so another process starts warm.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.backends.calls import CompiledCall, Launched, PlainCall
from chainrule.bridges.lowering.backends.coded import Tiles, fits_tiles, whole_calls
from chainrule.bridges.lowering.backends.compile import compile_piece, lengths_for
from chainrule.bridges.lowering.backends.reduced import Reduced, entries_of, vector_for
from chainrule.bridges.lowering.backends.unbind import Unbind
from chainrule.bridges.lowering.executor import Call, Emitted, Registers, Together
from chainrule.bridges.lowering.nodes import args_of, value_of
from chainrule.bridges.lowering.passes.coded import Coded, is_coded, take_apart
from chainrule.bridges.lowering.passes.partition import Piece, by_kind, is_apart
from chainrule.bridges.lowering.step_program import StepProgram


def inductor_calls(program: StepProgram, registers: Registers) -> Emitted:
    """The stages as calls, one for each piece; those of a kind share what is compiled."""
    homes = _homes(program, registers)
    written: set[tuple[fx.Node, fx.Node]] = set()
    stages: list[list[Call]] = []
    for stage in program.stages:
        coded = [take_apart(piece) for piece in stage if is_coded(piece)]
        plain = [piece for piece in stage if not is_coded(piece)]
        written |= {(p.outputs[i], old) for p in plain if _compiles(p) for i, old in p.updates}
        written |= {pair for piece in coded for pair in piece.written}
        calls = [call for kind in by_kind(plain) for call in _calls(kind, registers, homes)]
        stages.append(calls + _coded_calls(coded, registers, homes))
    if program.on_cpu:
        return Emitted(list(itertools.chain.from_iterable(stages)), written)
    # The largest first, so that none of them is left when the others are done.
    calls: list[Call] = [Together(sorted(stage, key=_size, reverse=True)) for stage in stages]
    return Emitted(calls, written)


def _size(call: Call) -> int:
    """Elements of its largest input."""
    return call.size if isinstance(call, CompiledCall) else 0


def _homes(program: StepProgram, registers: Registers) -> dict[fx.Node, Tensor]:
    """Scalars that compiled pieces make as entries of the vector that they are stacked to, or sent in, and the vectors
    for the nodes that do so; to stack them is no call.
    """
    pieces = [piece for stage in program.stages for piece in stage]
    made = {n for piece in pieces if _compiles(piece) for n in piece.outputs}
    made -= {piece.outputs[i] for piece in pieces for i, _ in piece.updates}
    homes: dict[fx.Node, Tensor] = {}
    for piece in pieces:
        node = piece.nodes[0]
        if node.target is ops.all_reduce and program.on_cpu:
            homes |= _sent(node, made - {*homes})
        if not _is_stack(piece) or not program.on_cpu:
            continue
        entries = list(args_of(node)[0])
        if len({*entries} & made - {*homes}) == len(entries):
            fake = value_of(node)
            vector = torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)
            homes |= {entry: vector[i] for i, entry in enumerate(entries)} | {node: vector}
            registers.bring(registers[node], vector)
    return homes


def _sent(node: fx.Node, made: Collection[fx.Node]) -> dict[fx.Node, Tensor]:
    """The vector that an all-reduce sends, and its entries for the scalars among `made`."""
    xs: list[fx.Node] = args_of(node)[0]
    vector = vector_for(xs)
    pairs = zip(xs, entries_of(vector, xs), strict=True)
    return {x: entry for x, entry in pairs if x in made and not entry.ndim} | {node: vector}


def _is_stack(piece: Piece) -> bool:
    (node, *others) = piece.nodes
    if node.target is not torch.stack or others or not is_apart(node):
        return False
    return all(
        value_of(x).ndim == 0 and value_of(x).dtype == value_of(node).dtype
        for x in args_of(node)[0]
    )


def _compiles(piece: Piece) -> bool:
    return not any(map(is_apart, piece.nodes))


def _calls(
    pieces: Sequence[Piece], registers: Registers, homes: Mapping[fx.Node, Tensor]
) -> list[Call]:
    """A call for each piece of one kind, or one for all of them."""
    if not _compiles(pieces[0]):
        return [_plain(p, registers, homes) for p in pieces if not _is_made(p, homes)]
    calls: list[Call] = []
    for large in (False, True):
        alike = [piece for piece in pieces if _is_large(piece) == large]
        if not alike:
            continue
        program, function = compile_piece(alike[0], large)
        compiled = [CompiledCall(program, piece, registers, homes) for piece in alike]
        if function is None or len(compiled) == 1:
            calls += compiled
        else:
            pure = not large and _is_pure(alike[0])
            calls.append(Launched(function, compiled, registers, pure))
    return calls


def _coded_calls(
    pieces: Sequence[Coded], registers: Registers, homes: Mapping[fx.Node, Tensor]
) -> list[Call]:
    """Calls of pieces that decode and encode: alike ones in tiles in one loop, else each with whole tensors."""
    calls: list[Call] = []
    kinds: dict[Any, list[Coded]] = {}
    for piece in pieces:
        in_tiles = fits_tiles(piece)
        kinds.setdefault(
            (piece.inner.kind, in_tiles, not in_tiles and _is_large(piece.inner)), []
        ).append(piece)
    for (_, in_tiles, large), alike in kinds.items():
        if not alike[0].inner.nodes:
            calls += [call for p in alike for call in whole_calls(p, [], registers)]
            continue
        program, function = compile_piece(alike[0].inner, large)
        if in_tiles and function is not None:
            tiles = Tiles(function, alike, registers)
            tiles.ready(function.address)
            calls.append(tiles)
            continue
        for piece in alike:
            inner = CompiledCall(program, piece.inner, registers, homes)
            calls += whole_calls(piece, [inner], registers)
    return calls


def _is_large(piece: Piece) -> bool:
    sizes = [t.numel() for t in map(value_of, piece.inputs) if isinstance(t, Tensor)]
    return max(sizes, default=0) >= lengths_for(piece).large_from


def _is_pure(piece: Piece) -> bool:
    """Whether calls may run at the same time: code of Inductor tells of an integer divided by 0 in a global."""
    return not any(n.target in (ops.int_div, ops.int_rem) for n in piece.nodes)


def _is_made(piece: Piece, homes: Mapping[fx.Node, Tensor]) -> bool:
    """Whether it is a vector that others write the entries of."""
    return _is_stack(piece) and piece.nodes[0] in homes


def _plain(piece: Piece, registers: Registers, homes: Mapping[fx.Node, Tensor]) -> Call:
    """A piece that runs as it is."""
    node = piece.nodes[0]
    if node.target is ops.all_reduce and node in homes:
        return Reduced(piece, registers, homes[node], homes)
    if node.target is ops.unbind:
        return Unbind(piece, registers)
    return PlainCall(piece, registers)
