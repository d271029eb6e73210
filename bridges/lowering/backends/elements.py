"""Alike elementwise pieces of all leaves as one program of the compiled kernel, which reads and writes memory once.

Each operation of torch is a call for each leaf, also behind `torch._foreach_*`, and a pass over memory. The kernel
interprets the operations of a piece tile by tile (`chainrule/elements.hpp`), leaf after leaf. A piece may end in sums
of all elements; `passes/cut_at_sums.py` makes such.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from chainrule.bridges.lowering.backends import parts
from chainrule.bridges.lowering.backends.element_ops import is_sum, is_truth, operation, takes
from chainrule.bridges.lowering.backends.launches import Function
from chainrule.bridges.lowering.backends.liveness import last_reads
from chainrule.bridges.lowering.backends.scalar_ops import type_of
from chainrule.bridges.lowering.backends.stage_scalars import StageScalars
from chainrule.bridges.lowering.executor import Registers
from chainrule.bridges.lowering.nodes import value_of
from chainrule.bridges.lowering.passes.partition import Piece
from chainrule.bridges.lowering.passes.signature import is_size
from chainrule.bridges.lowering.passes.simplify import key_of
from chainrule.native import _kernel

_TENSORS, _ROOMS, _NUMBERS, _SUMS = _kernel.ELEMENT_PLACES if _kernel else (0, 0, 0, 0)
_TENSOR, _ROOM, _NUMBER, _SUM = range(4)
_Place = tuple[int, int]
_A_THREADS_WORK = 1 << 16
"""So many elements are worth a thread."""


class Plan:
    """The steps of a flat piece, and the numbers that they read; `fits` is False where the kernel has none for it."""

    def __init__(self, piece: Piece):
        self.piece = piece
        self.arrays = [n for n in piece.inputs if value_of(n).ndim]
        self.sums = [n for n in piece.nodes if is_sum(n)]
        self.updated = {piece.outputs[i]: old for i, old in piece.updates if value_of(old).ndim > 0}
        self.fresh = [n for n in piece.outputs if n not in (*self.updated, *self.sums)]
        self.numbers: dict[Any, int] = {}
        """By what tells numbers apart, their places."""
        self._sources: list[tuple[Any, str]] = []
        """For each of them an input of the piece, a literal or `_SIZE`, and as what it is read."""
        self.steps: list[tuple[str, _Place, list[_Place]]] = []
        self.written: list[int] = []
        """Positions of the tensors that it writes."""
        self._tensors = {n: k for k, n in enumerate((*self.arrays, *self.fresh))}
        self._place = {n: (_TENSOR, k) for n, k in self._tensors.items()}
        self._place |= {n: (_SUM, k) for k, n in enumerate(self.sums)}
        self._rooms = 0
        self.fits = self._is_flat() and all(map(takes, piece.nodes))
        if self.fits:
            self._emit_all()
            self.fits = (
                len(self._tensors) <= _TENSORS
                and self._rooms <= _ROOMS
                and len(self.numbers) <= _NUMBERS
                and len(self.sums) <= _SUMS
            )

    def _is_flat(self) -> bool:
        read = {x for n in self.piece.nodes for x in n.all_input_nodes}
        if not read.isdisjoint(self.sums):
            return False
        values = [value_of(n) for n in (*self.arrays, *self.piece.nodes) if n not in self.sums]
        one_shape = len({tuple(x.shape) for x in values}) == 1 and values[0].ndim > 0
        given = all(value_of(n).dtype == torch.float32 for n in (*self.arrays, *self.fresh))
        types = [type_of(n) for n in self.piece.inputs if n not in self._tensors]
        return one_shape and bool(self.arrays) and given and None not in types

    def _emit_all(self) -> None:
        nodes = self.piece.nodes
        order = {n: i for i, n in enumerate(nodes)}
        last = {x: order[n] for x, n in last_reads(self.piece).items()}
        free: list[int] = []
        for i, node in enumerate(nodes):
            name, operands = operation(node) or ("", [])
            given = [self._operand(x, node) for x in operands]
            for x in dict.fromkeys(node.all_input_nodes):
                kind, room = self._place.get(x, (_NUMBER, 0))
                if kind == _ROOM and last[x] == i and x not in self.updated:
                    free.append(room)
            old = self.updated.get(node)
            if old is not None and last.get(old, -1) <= i:
                self._place[node] = self._place[old]
            elif node not in self._place:
                self._place[node] = (_ROOM, free.pop() if free else self._new_room())
            self.steps.append((name, self._place[node], given))
        for node, old in self.updated.items():
            if self._place[node] != self._place[old]:
                self.steps.append(("clone", self._place[old], [self._place[node]]))
        self.written = sorted({k for _, (kind, k), _ in self.steps if kind == _TENSOR})

    def _new_room(self) -> int:
        self._rooms += 1
        return self._rooms - 1

    def _operand(self, x: Any, node: fx.Node) -> _Place:
        if x in self._place:
            return self._place[x]
        what = _SIZE if is_size(x, node, value_of(node).numel()) else x
        source = what, "b" if is_truth(x) else "f"
        key = key_of(what) if what is not _SIZE else what, source[1]
        if key not in self.numbers:
            self.numbers[key] = len(self.numbers)
            self._sources.append(source)
        return _NUMBER, self.numbers[key]

    @property
    def function(self) -> Function:
        """What the program takes for a leaf, as of a compiled function."""
        fresh = range(len(self.fresh))
        arrays = [("input", self.piece.inputs.index(n)) for n in self.arrays]
        buffers = tuple(value_of(n).dtype for n in self.fresh)
        return Function(0, (*arrays, *(("buffer", k) for k in fresh)), buffers, (*fresh,))

    def row(self, piece: Piece, scalars: StageScalars) -> tuple[list[fx.Node], list[int]]:
        """The tensors of a piece of the same kind, and the words of its numbers."""
        own = {n: piece.inputs[i] for i, n in enumerate(self.piece.inputs)}
        made = dict(zip(self.piece.outputs, piece.outputs, strict=True))
        tensors = [own[n] for n in self.arrays] + [made[n] for n in self.fresh]
        words = []
        for x, type_ in self._sources:
            x = value_of(tensors[0]).numel() if x is _SIZE else own.get(x, x)
            word = scalars.operand(x, type_)
            words.append(scalars.emit("neg.i", word) if type_ == "b" else word)
        return tensors, words


_SIZE = object()
"""A number that is how many elements a piece has."""


class Elements:
    """A call of the kernel for pieces of one kind.

    Tensors that do not lie alike in memory without gaps are copied there and back.
    """

    def __init__(
        self, plan: Plan, pieces: Sequence[Piece], registers: Registers, scalars: StageScalars
    ):
        rows = [plan.row(piece, scalars) for piece in pieces]
        self._columns = len(rows[0][0])
        self._registers = [registers[n] for tensors, _ in rows for n in tensors]
        at = [plan.piece.nodes.index(n) for n in plan.sums]
        sums = [registers[piece.nodes[k]] for piece in pieces for k in at]
        self._sums = torch.empty(len(sums), device="cpu")
        for register, sum_ in zip(sums, self._sums.unbind(), strict=True):
            registers.bring(register, sum_)
        self._fresh = [
            (r * self._columns + len(plan.arrays) + k, r * self._columns)
            for r in range(len(rows))
            for k in range(len(plan.fresh))
        ]
        """Positions of tensors that it makes, and of those that they are like."""
        self._steps, self._written = plan.steps, set(plan.written)
        self._rows = [(value_of(tensors[0]).numel(), words) for tensors, words in rows]
        self._threads = max(1, sum(size for size, _ in self._rows) // _A_THREADS_WORK)
        self.written = [
            (p.outputs[i], old) for p in pieces for i, old in p.updates if value_of(old).ndim > 0
        ]
        for new, old in self.written:
            registers.alias(new, old)

    def ready(self, words: np.ndarray) -> None:
        """Makes the program, when the words of the stage are there."""
        columns = self._columns
        rows = [
            (size, list(range(r * columns, (r + 1) * columns)), own)
            for r, (size, own) in enumerate(self._rows)
        ]
        self._program = _kernel.ElementProgram(
            self._steps, rows, words, len(self._registers), self._sums.numpy()
        )

    def __call__(self, memory: list[Any]) -> None:
        for position, like in self._fresh:
            memory[self._registers[position]] = torch.empty_like(memory[self._registers[like]])
        tensors = [memory[register] for register in self._registers]
        back = [] if all(map(Tensor.is_contiguous, tensors)) else self._lay_out(tensors)
        threads = min(torch.get_num_threads(), self._threads)
        self._program.run(list(map(Tensor.data_ptr, tensors)), threads)
        for x, new in back:
            x.copy_(new)

    def _lay_out(self, tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Puts contiguous copies in the place of tensors that need them; returns those written, with their copies."""
        back = []
        for start in range(0, len(tensors), self._columns):
            own = tensors[start : start + self._columns]
            if len({x.stride() for x in own}) == 1 and parts.flat(own[0]) is not None:
                continue
            for k, x in enumerate(own):
                tensors[start + k] = new = x.contiguous()
                if k in self._written and new is not x:
                    back.append((x, new))
        return back


def element_calls(
    kind: Sequence[Piece], registers: Registers, scalars: StageScalars
) -> Elements | None:
    """A call for the pieces of a kind, or None where the kernel lacks something of them."""
    plan = Plan(kind[0]) if kind[0].flat else None
    return Elements(plan, kind, registers, scalars) if plan and plan.fits else None
