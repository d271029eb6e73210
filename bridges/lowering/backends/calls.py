"""What a backend's pieces run as: plain calls, calls of compiled code, and those of a kind in one loop."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from chainrule.bridges.lowering.backends.body import body_of
from chainrule.bridges.lowering.backends.compile import Compiled
from chainrule.bridges.lowering.backends.launches import Function
from chainrule.bridges.lowering.executor import Registers
from chainrule.bridges.lowering.nodes import value_of
from chainrule.bridges.lowering.passes.partition import Piece
from chainrule.native import _kernel

_A_THREADS_WORK = 1 << 16
"""So many elements of small pieces are worth a thread."""


class PlainCall:
    """A call of a piece: what it runs, and the registers that it reads and fills."""

    def __init__(self, piece: Piece, registers: Registers):
        self.body = body_of(piece)
        self.inputs = [registers[n] for n in piece.inputs]
        self.outputs = [registers[n] for n in piece.outputs]

    def __call__(self, memory: list[Any]) -> None:
        results = self.body(*[memory[i] for i in self.inputs])
        for register, result in zip(self.outputs, results, strict=True):
            memory[register] = result


class CompiledCall:
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


class Launched:
    """Calls of a kind in one loop over the C++ function that they have in common.

    One with a tensor that is not contiguous is made by itself. Scalars that the function makes have one memory for all
    steps, since nothing reads them after its step.
    """

    def __init__(
        self,
        function: Function,
        calls: Sequence[CompiledCall],
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

    def _scalars(self, call: CompiledCall, registers: Registers) -> dict[int, Tensor]:
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
        self.apart: list[CompiledCall] = []
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

    def _number(self, kind: str, which: int, call: CompiledCall, kept: Mapping[int, Tensor]) -> int:
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
