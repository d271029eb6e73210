"""Alike elementwise pieces of all leaves as one program of the compiled kernel, which reads and writes memory once.

Each operation of torch is a call for each leaf, also behind `torch._foreach_*`, and a pass over memory. The kernel
interprets the operations of a piece tile by tile (`chainrule/elements.hpp`), leaf after leaf.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.backends import parts
from chainrule.bridges.lowering.backends.launches import Function
from chainrule.bridges.lowering.backends.liveness import last_reads
from chainrule.bridges.lowering.backends.scalar_ops import type_of
from chainrule.bridges.lowering.backends.stage_scalars import StageScalars
from chainrule.bridges.lowering.executor import Registers
from chainrule.bridges.lowering.nodes import args_of, function_of, value_of
from chainrule.bridges.lowering.passes.partition import Piece
from chainrule.bridges.lowering.passes.signature import is_size
from chainrule.bridges.lowering.passes.simplify import key_of
from chainrule.native import _kernel

_TENSORS, _ROOMS, _NUMBERS = _kernel.ELEMENT_PLACES if _kernel else (0, 0, 0)
_NAMES = frozenset(_kernel.element_ops()) if _kernel else frozenset()
_TRUTHS = {torch.bitwise_and, torch.bitwise_or, torch.bitwise_xor, torch.bitwise_not}
_OTHERS: dict[Any, str] = {
    torch.clamp_min: "maximum",
    torch.clamp_max: "minimum",
    ops.sign: "sign",
}
_SAME = {
    *(torch.add, torch.sub, torch.mul, torch.div, torch.lerp, torch.maximum, torch.minimum),
    *(torch.neg, torch.abs, torch.square, torch.reciprocal, torch.sqrt, torch.rsqrt),
    *(torch.isfinite, torch.clone, torch.where, *_TRUTHS),
    *(torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne),
}
_TENSOR, _ROOM, _NUMBER = range(3)
_Place = tuple[int, int]
_A_THREADS_WORK = 1 << 16
"""So many elements are worth a thread."""


def _operation(node: fx.Node) -> tuple[str, list[Any]] | None:
    """The kernel's name for what a node does, and its operands in order; None if it has none."""
    args, keywords, target = list(args_of(node)), dict(node.kwargs), node.target
    if target in (torch.addcmul, torch.addcdiv):
        return function_of(node).__name__, [*args, keywords.get("value", 1.0)]
    if target is torch.add and "alpha" in keywords:
        return "add_scaled", [*args, keywords["alpha"]]
    if keywords:
        return None
    if target is torch.nan_to_num:
        zeros = all(repr(x) == "0.0" for x in args[1:]) and len(args) == 4
        return ("finite_or_zero", args[:1]) if zeros else None
    if target is torch.Tensor.to:
        to_float = args[1:] == [torch.float32] and value_of(args[0]).dtype == torch.bool
        return ("bitwise_and", [args[0], 1.0]) if to_float else None
    if target is torch.rsub:
        return "sub", args[::-1]
    if target in _OTHERS:
        return _OTHERS[target], args
    return (function_of(node).__name__, args) if target in _SAME else None


class Plan:
    """The steps of a flat piece, and the numbers that they read; `fits` is False where the kernel has none for it."""

    def __init__(self, piece: Piece):
        self.piece = piece
        self.arrays = [n for n in piece.inputs if value_of(n).ndim]
        self.updated = {piece.outputs[i]: old for i, old in piece.updates}
        self.fresh = [n for n in piece.outputs if n not in self.updated]
        self.numbers: dict[Any, int] = {}
        """By what tells numbers apart, their places."""
        self._sources: list[tuple[Any, str]] = []
        """For each of them an input of the piece, a literal or `_SIZE`, and as what it is read."""
        self.steps: list[tuple[str, _Place, list[_Place]]] = []
        self.written: list[int] = []
        """Positions of the tensors that it writes."""
        self._tensors = {n: k for k, n in enumerate((*self.arrays, *self.fresh))}
        self._place = {n: (_TENSOR, k) for n, k in self._tensors.items()}
        self._rooms = 0
        self.fits = self._is_flat() and all(map(self._fits, piece.nodes))
        if self.fits:
            self._emit_all()
            self.fits = (
                len(self._tensors) <= _TENSORS
                and self._rooms <= _ROOMS
                and len(self.numbers) <= _NUMBERS
            )

    def _is_flat(self) -> bool:
        values = [value_of(n) for n in (*self.arrays, *self.piece.nodes)]
        one_shape = len({tuple(x.shape) for x in values}) == 1 and values[0].ndim > 0
        given = all(value_of(n).dtype == torch.float32 for n in (*self.arrays, *self.fresh))
        types = [type_of(n) for n in self.piece.inputs if n not in self._tensors]
        return one_shape and bool(self.arrays) and given and None not in types

    def _fits(self, node: fx.Node) -> bool:
        found = _operation(node)
        if found is None or found[0] not in _NAMES:
            return False
        made, truths = value_of(node).dtype, [_is_truth(x) for x in found[1]]
        if node.target is torch.where:
            return made == torch.float32 and truths == [True, False, False]
        if node.target in _TRUTHS or node.target is torch.Tensor.to:
            return truths[0] and all(truths) == (node.target in _TRUTHS)
        return not any(truths) and made in (torch.float32, torch.bool)

    def _emit_all(self) -> None:
        nodes = self.piece.nodes
        order = {n: i for i, n in enumerate(nodes)}
        last = {x: order[n] for x, n in last_reads(self.piece).items()}
        free: list[int] = []
        for i, node in enumerate(nodes):
            name, operands = _operation(node) or ("", [])
            given = [self._operand(x, node) for x in operands]
            for x in dict.fromkeys(node.all_input_nodes):
                kind, room = self._place.get(x, (_NUMBER, 0))
                if kind == _ROOM and last[x] == i and x not in self.updated:
                    free.append(room)
            old = self.updated.get(node)
            if old is not None and last[old] <= i:
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
        source = what, "b" if _is_truth(x) else "f"
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


def _is_truth(x: Any) -> bool:
    return isinstance(x, bool) or (isinstance(x, fx.Node) and value_of(x).dtype == torch.bool)


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
        self._fresh = [
            (r * self._columns + len(plan.arrays) + k, r * self._columns)
            for r in range(len(rows))
            for k in range(len(plan.fresh))
        ]
        """Positions of tensors that it makes, and of those that they are like."""
        self._steps, self._written = plan.steps, set(plan.written)
        self._rows = [(value_of(tensors[0]).numel(), words) for tensors, words in rows]
        self._threads = max(1, sum(size for size, _ in self._rows) // _A_THREADS_WORK)
        self.written = [(p.outputs[i], old) for p in pieces for i, old in p.updates]
        for new, old in self.written:
            registers.alias(new, old)

    def ready(self, words: np.ndarray) -> None:
        """Makes the program, when the words of the stage are there."""
        columns = self._columns
        rows = [
            (size, list(range(r * columns, (r + 1) * columns)), own)
            for r, (size, own) in enumerate(self._rows)
        ]
        self._program = _kernel.ElementProgram(self._steps, rows, words, len(self._registers))

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
