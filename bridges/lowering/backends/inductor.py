"""Compiled calls: each kind of piece goes through Inductor once, whatever the number of leaves.

A flat piece is compiled for tensors of any length and called for each leaf with its tensors given flat; any other for
its shapes. The compiled code is called directly, without Dynamo's guards: the bridge has checked shapes, dtypes and
devices. Parameters and state are updated in place. Inductor keeps what it compiled on disk, so another process starts
warm.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.backends.body import body_of
from chainrule.bridges.lowering.backends.compile import Compiled, compile_piece
from chainrule.bridges.lowering.executor import Emitted, Registers
from chainrule.bridges.lowering.nodes import args_of, value_of
from chainrule.bridges.lowering.passes.partition import Piece, by_kind, is_apart
from chainrule.bridges.lowering.step_program import StepProgram

_LARGE = 1 << 16
"""From this many elements on, a piece is compiled for all threads."""


def inductor_calls(program: StepProgram, registers: Registers) -> Emitted:
    """The stages as calls, one for each piece; those of a kind share what is compiled."""
    written = {
        (piece.outputs[i], old)
        for stage in program.stages
        for piece in stage
        if _compiles(piece)
        for i, old in piece.updates
    }
    calls = [
        call
        for stage in program.stages
        for kind in by_kind(stage)
        for call in _calls(kind, registers)
    ]
    compiled = [call for call in calls if isinstance(call, _CompiledCall)]
    return Emitted([_Watch(compiled), *calls] if compiled else [*calls], written)


def _compiles(piece: Piece) -> bool:
    return not any(map(is_apart, piece.nodes))


def _calls(pieces: Sequence[Piece], registers: Registers) -> list["_Call | _CompiledCall"]:
    """A call for each piece of one kind."""
    programs: dict[bool, Compiled] = {}
    calls: list[_Call | _CompiledCall] = []
    for piece in pieces:
        compiles = _compiles(piece)
        updates = dict(piece.updates) if compiles else {}
        for i, old in updates.items():
            registers.alias(piece.outputs[i], old)
        outputs = [n for i, n in enumerate(piece.outputs) if i not in updates]
        sizes = [t.numel() for t in map(value_of, piece.inputs) if isinstance(t, Tensor)]
        large = max(sizes, default=0) >= _LARGE
        if large not in programs:
            programs[large] = compile_piece(piece, large) if compiles else _plain(piece)
        inputs = [registers[n] for n in piece.inputs]
        call = _Call(programs[large], inputs, [registers[n] for n in piece.outputs if n in outputs])
        calls.append(_CompiledCall(call, piece, outputs) if compiles else call)
    return calls


def _plain(piece: Piece) -> Compiled:
    """A piece that runs as it is."""
    if piece.nodes[0].target is ops.unbind:
        entries: list[int] = [args_of(n)[1] for n in piece.outputs]

        def entries_of(inputs: list[Any]) -> Sequence[Tensor]:
            parts = ops.unbind(inputs[0])
            return [parts[i] for i in entries]

        return entries_of
    body = body_of(piece)
    return lambda inputs: body(*inputs)


class _Call(NamedTuple):
    """A call of a piece: what it runs, and the registers that it reads and fills."""

    program: Compiled
    inputs: list[int]
    outputs: list[int]

    def __call__(self, memory: list[Any]) -> None:
        results = self.program([memory[i] for i in self.inputs])
        for register, result in zip(self.outputs, results, strict=True):
            memory[register] = result


class _CompiledCall:
    """A call of compiled code, which wants its tensors contiguous: others are copied there and back."""

    def __init__(self, call: _Call, piece: Piece, outputs: list[fx.Node]):
        self.program, self.inputs, self.outputs = call
        self.shapes = [value_of(n).shape for n in outputs] if piece.flat else None
        shapes = {j: value_of(n).shape for j, n in enumerate(piece.inputs) if value_of(n).ndim > 0}
        updated = {piece.inputs.index(old) for _, old in piece.updates}
        self.others = [j for j in shapes if j not in updated]
        # Parameters and state are the same tensors in most steps; to keep a gradient would keep its memory.
        self.updated = {j: shape for j, shape in shapes.items() if j in updated}
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.forget()

    def remembered(self) -> list[tuple[int, torch.Size]]:
        """Registers of the tensors of which it keeps a view, and their shapes."""
        return [(self.inputs[j], shape) for j, shape in self.updated.items()]

    def forget(self) -> None:
        none = torch.empty(0, device="cpu")
        self.seen = dict.fromkeys(self.updated, (none, none))

    def __call__(self, memory: list[Any]) -> None:
        given = [memory[i] for i in self.inputs]
        copies = []
        for j, (known, ready) in self.seen.items():
            x = given[j]
            if x is known:
                given[j] = ready
            elif x.is_contiguous():
                given[j] = self.ready(x)
                self.seen[j] = x, given[j]
            else:
                given[j] = self.ready(x.contiguous())
                copies.append((x, given[j]))
        for j in self.others:
            given[j] = self.ready(given[j].contiguous())
        results = self.program(given)
        for x, new in copies:
            x.copy_(new.view(x.shape))
        if self.shapes is None:
            for register, result in zip(self.outputs, results, strict=True):
                memory[register] = result
            return
        for register, result, shape in zip(self.outputs, results, self.shapes, strict=True):
            memory[register] = result.view(shape) if result.ndim else result

    def ready(self, x: Tensor) -> Tensor:
        return x if self.shapes is None or x.ndim == 1 else x.view(-1)


class _Watch:
    """Tells calls to forget the views that they keep, when tensors have other memory, or the same in another order:
    `p.data = ...`."""

    def __init__(self, calls: Sequence[_CompiledCall]):
        self.calls, self.found = calls, []
        shape_of = {register: shape for call in calls for register, shape in call.remembered()}
        self.turns = sorted(shape_of)
        self.moves = [register for register in self.turns if len(shape_of[register]) > 1]

    def __call__(self, memory: list[Any]) -> None:
        found: list[Any] = [*map(Tensor.data_ptr, map(memory.__getitem__, self.moves))]
        found += map(Tensor.is_contiguous, map(memory.__getitem__, self.turns))
        if found != self.found:
            self.found = found
            for call in self.calls:
                call.forget()
