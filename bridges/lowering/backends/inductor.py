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
from chainrule.bridges.lowering.backends.body import body_of
from chainrule.bridges.lowering.backends.compile import Compiled, compile_piece, lengths_for
from chainrule.bridges.lowering.backends.launches import Function
from chainrule.bridges.lowering.backends.reduced import Reduced, entries_of, vector_for
from chainrule.bridges.lowering.executor import Call, Emitted, Registers, Together
from chainrule.bridges.lowering.nodes import args_of, first_arg, value_of
from chainrule.bridges.lowering.passes.partition import Piece, by_kind, is_apart
from chainrule.bridges.lowering.step_program import StepProgram
from chainrule.native import _kernel

_A_THREADS_WORK = 1 << 16
"""So many elements of small pieces are worth a thread."""


def inductor_calls(program: StepProgram, registers: Registers) -> Emitted:
    """The stages as calls, one for each piece; those of a kind share what is compiled."""
    written = {
        (piece.outputs[i], old)
        for stage in program.stages
        for piece in stage
        if _compiles(piece)
        for i, old in piece.updates
    }
    homes = _homes(program, registers)
    stages = [
        [call for kind in by_kind(stage) for call in _calls(kind, registers, homes)]
        for stage in program.stages
    ]
    if program.on_cpu:
        return Emitted(list(itertools.chain.from_iterable(stages)), written)
    # The largest first, so that none of them is left when the others are done.
    calls: list[Call] = [Together(sorted(stage, key=_size, reverse=True)) for stage in stages]
    return Emitted(calls, written)


def _size(call: Call) -> int:
    """Elements of its largest input."""
    return call.size if isinstance(call, _CompiledCall) else 0


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
        compiled = [_CompiledCall(program, piece, registers, homes) for piece in alike]
        if function is None or len(compiled) == 1:
            calls += compiled
        else:
            pure = not large and _is_pure(alike[0])
            calls.append(_Launched(function, compiled, registers, pure))
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
        return _Unbind(piece, registers)
    return _Call(piece, registers)


class _Unbind:
    """Entries of a vector: views, made once, of a copy of it."""

    def __init__(self, piece: Piece, registers: Registers):
        source = first_arg(piece.nodes[0])
        fake = value_of(source)
        self.source = registers[source]
        self.vector = torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)
        for node in piece.outputs:
            registers.bring(registers[node], self.vector[args_of(node)[1]])

    def __call__(self, memory: list[Any]) -> None:
        self.vector.copy_(memory[self.source])


class _Call:
    """A call of a piece: what it runs, and the registers that it reads and fills."""

    def __init__(self, piece: Piece, registers: Registers):
        self.body = body_of(piece)
        self.inputs = [registers[n] for n in piece.inputs]
        self.outputs = [registers[n] for n in piece.outputs]

    def __call__(self, memory: list[Any]) -> None:
        results = self.body(*[memory[i] for i in self.inputs])
        for register, result in zip(self.outputs, results, strict=True):
            memory[register] = result


class _CompiledCall:
    """A call of compiled code, which wants its tensors contiguous: others are copied there and back."""

    def __init__(
        self,
        program: Compiled,
        piece: Piece,
        registers: Registers,
        homes: Mapping[fx.Node, Tensor],
    ):
        self.program, self.flat = program, piece.flat
        self.inputs = [registers[n] for n in piece.inputs]
        updates = dict(piece.updates)
        for i, old in updates.items():
            registers.alias(piece.outputs[i], old)
        made = [n for i, n in enumerate(piece.outputs) if i not in updates]
        self.outputs = [(registers[n], value_of(n)) for n in made]
        """Registers that it fills, and what with."""
        self.homes = {registers[n]: homes[n] for n in made if n in homes}
        self.updated = [piece.inputs.index(old) for old in updates.values()]
        self.size = max((x.numel() for x in map(value_of, piece.inputs) if x.ndim), default=0)

    def __call__(self, memory: list[Any]) -> None:
        given = [memory[i] for i in self.inputs]
        ready = [x.contiguous() for x in given]
        copies = [(given[j], ready[j]) for j in self.updated if ready[j] is not given[j]]
        results = self.program([x.view(-1) if self.flat and x.ndim > 1 else x for x in ready])
        for x, new in copies:
            x.copy_(new)
        for (register, like), result in zip(self.outputs, results, strict=True):
            memory[register] = result.view(like.shape) if result.ndim else result
        for register, home in self.homes.items():
            memory[register] = home.copy_(memory[register])


class _Launched:
    """Calls of a kind in one loop over the C++ function that they have in common.

    One with a tensor that is not contiguous is made by itself. Scalars that the function makes have one memory for all
    steps, since nothing reads them after its step.
    """

    def __init__(
        self,
        function: Function,
        calls: Sequence[_CompiledCall],
        registers: Registers,
        parallel: bool,
    ):
        self.function, self.calls = function, calls
        self.work = sum(call.size for call in calls) if parallel else 0
        self.results: dict[int, Tensor] = {}
        """By the register that gets a new tensor each step, one like it."""
        self.kept = [self._scalars(call, registers) for call in calls]
        every = {r: registers.brought(r) for call in calls for r in call.inputs}
        self.fixed = {r: memory for r, memory in every.items() if memory is not None}
        self.registers = sorted({*every, *self.results} - {*self.fixed})
        self.contiguous: list[bool] = []

    def _scalars(self, call: _CompiledCall, registers: Registers) -> dict[int, Tensor]:
        """The function's buffers that are scalars; those that are results are handed out."""
        made = dict(zip(self.function.results, call.outputs, strict=True))
        kept = {}
        for i, dtype in enumerate(self.function.buffers):
            if i in made and made[i][1].ndim:
                self.results |= [made[i]]
                continue
            home = call.homes.get(made[i][0]) if i in made else None
            kept[i] = torch.empty((), dtype=dtype, device="cpu") if home is None else home
            if i in made:
                call.homes[made[i][0]] = kept[i]
                registers.bring(made[i][0], kept[i])
        return kept

    def _sort(self, contiguous: list[bool]) -> None:
        """Which calls are in the loop, given which of the registers hold contiguous tensors."""
        position = {register: i for i, register in enumerate(self.registers)}
        rows: list[list[int]] = []
        numbers: list[int] = []
        self.apart: list[_CompiledCall] = []
        for call, kept in zip(self.calls, self.kept, strict=True):
            if not all(contiguous[position[r]] for r in call.inputs if r in position):
                self.apart.append(call)
                continue
            made = dict(zip(self.function.results, (r for r, _ in call.outputs), strict=True))
            row = []
            for kind, which in self.function.arguments:
                if kind == "input" and call.inputs[which] in position:
                    row.append(position[call.inputs[which]])
                elif kind == "buffer" and which not in kept:
                    row.append(position[made[which]])
                else:
                    row.append(len(position) + len(numbers))
                    numbers.append(self._number(kind, which, call, kept))
            rows.append(row)
        self.launches = _kernel.Launches(self.function.address, rows, numbers, len(position))
        self.contiguous = contiguous

    def _number(
        self, kind: str, which: int, call: _CompiledCall, kept: Mapping[int, Tensor]
    ) -> int:
        """An argument that is the same at every step."""
        if kind == "input":
            return self.fixed[call.inputs[which]].data_ptr()
        if kind == "buffer":
            return kept[which].data_ptr()
        return call.size if kind == "size" else which

    def threads(self) -> int:
        """On how many threads to run."""
        return max(1, min(torch.get_num_threads(), self.work // _A_THREADS_WORK))

    def __call__(self, memory: list[Any]) -> None:
        for register, like in self.results.items():
            memory[register] = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        tensors = list(map(memory.__getitem__, self.registers))
        contiguous = list(map(Tensor.is_contiguous, tensors))
        if contiguous != self.contiguous:
            self._sort(contiguous)
        self.launches.run(list(map(Tensor.data_ptr, tensors)), self.threads())
        for call in self.apart:
            call(memory)
