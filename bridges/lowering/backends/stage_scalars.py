"""The scalars of a stage in the kernel: one program for those of all its pieces.

Scalars of leaves are calls of torch that cost more than all else a small tensor needs. What the kernel's scalar
programs know of them, from scalars that are there before the stage, is taken out of the pieces; the rest of a piece
finds it in the words of the program.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from chainrule.bridges.lowering.backends.scalar_ops import operation, type_of
from chainrule.bridges.lowering.backends.scalar_plan import entry, view_of
from chainrule.bridges.lowering.executor import Registers
from chainrule.bridges.lowering.nodes import args_of, value_of
from chainrule.bridges.lowering.op_info import readers
from chainrule.bridges.lowering.passes.partition import Piece, piece_of, read_by
from chainrule.bridges.lowering.step_program import StepProgram
from chainrule.native import _kernel


class StageScalars:
    """A stage's scalars; `rest` are its pieces without them."""

    def __init__(self, program: StepProgram, stage: int, registers: Registers):
        pieces = program.stages[stage]
        self._registers = registers
        self._inside = {node for piece in pieces for node in piece.nodes}
        self._word: dict[fx.Node, int] = {}
        self._initial: list[int] = []
        self._numbers: dict[int, int] = {}
        self._code: list[tuple[str, int, int, int, int]] = []
        self._loads: list[tuple[int, int, int, int]] = []
        self._stores: list[tuple[int, int, int, int]] = []
        self._tensors: dict[int, int] = {}
        """Register -> position among the tensors of the program."""
        self._vectors: set[int] = set()
        self._stacks = [node for node in self._inside if self._is_stack(node)]
        for piece in pieces:
            for node in piece.nodes:
                self._add(node)
        self.taken = {*self._word} & self._inside
        self.written = self._store_updates(program, stage)
        self._store_stacks(registers)
        self.rest = [own for piece in pieces if (own := self._without(piece)) is not None]

    # ---- what is a word ----------------------------------------------------------------------

    def _add(self, node: fx.Node) -> None:
        type_ = type_of(node)
        if type_ and node.target is torch.full:
            self._word[node] = self.number(args_of(node)[1], type_)
            return
        found = operation(node, type_) if type_ else None
        if found is None or not all(map(self._is_there, node.all_input_nodes)):
            return
        name, operands = found
        self._word[node] = self.emit(name, *(self.operand(x, t) for x, t in operands))

    def _is_there(self, node: fx.Node) -> bool:
        return node in self._word or (node not in self._inside and type_of(node) is not None)

    def _is_stack(self, node: fx.Node) -> bool:
        return node.target is torch.stack and all(
            type_of(x) and value_of(x).dtype == value_of(node).dtype for x in args_of(node)[0]
        )

    def number(self, number: Any, type_: str) -> int:
        """The word of a number."""
        with np.errstate(over="ignore"):  # infinite in float32, as in torch
            bits = int(np.float32(number).view(np.uint32)) if type_ == "f" else int(number) % 2**32
        if bits not in self._numbers:
            self._numbers[bits] = self._new(bits)
        return self._numbers[bits]

    def emit(self, name: str, *operands: int) -> int:
        """The word of a result."""
        result = self._new()
        a, b, c = (*operands, 0, 0)[:3]
        self._code.append((name, result, a, b, c))
        return result

    def operand(self, x: Any, type_: str) -> int:
        """The word of a number, or of a scalar that is there, as another type perhaps."""
        if not isinstance(x, fx.Node):
            return self.number(x, type_)
        word, own = self._read(x), type_of(x)
        return word if own == type_ else self.emit(f"to.{own}.{type_}", word)

    def _new(self, value: int = 0) -> int:
        self._initial.append(value)
        return len(self._initial) - 1

    def _read(self, node: fx.Node) -> int:
        if node not in self._word:
            source, offset = entry(node)
            self._word[node] = word = self._new()
            self._loads.append((word, *self._place(source, offset, value_of(node).element_size())))
        return self._word[node]

    def _place(self, tensor: fx.Node, offset: int, size: int) -> tuple[int, int, int]:
        register = self._registers[tensor]
        position = self._tensors.setdefault(register, len(self._tensors))
        if value_of(tensor).ndim:
            self._vectors.add(position)
        return position, offset, size

    # ---- what it is for ----------------------------------------------------------------------

    def _store_updates(self, program: StepProgram, stage: int) -> set[tuple[fx.Node, fx.Node]]:
        """Scalars of the state that it writes: those that nobody reads after it."""
        before = {n for pieces in program.stages[:stage] for p in pieces for n in p.nodes}
        done = before | self.taken
        written = set()
        for new, old in program.updates:
            alike = value_of(new).dtype == value_of(old).dtype and value_of(old).ndim == 0
            if new in self.taken and alike and done.issuperset(readers(old)):
                size = value_of(old).element_size()
                self._stores.append((self._word[new], *self._place(old, 0, size)))
                written.add((new, old))
        return written

    def _store_stacks(self, registers: Registers) -> None:
        """Vectors of scalars that are there, in memory of their own."""
        for node in self._stacks:
            entries = args_of(node)[0]
            if not all(map(self._is_there, entries)):
                continue
            fake = value_of(node)
            vector = torch.empty(fake.shape, dtype=fake.dtype, device="cpu")
            registers.bring(registers[node], vector)
            size = vector.element_size()
            self._stores += [
                (self._read(x), *self._place(node, i, size)) for i, x in enumerate(entries)
            ]
            self.taken.add(node)

    def _without(self, piece: Piece) -> Piece | None:
        nodes = [node for node in piece.nodes if node not in self.taken]
        if len(nodes) in (0, len(piece.nodes)):
            return piece if nodes else None
        outputs = tuple(node for node in piece.outputs if node not in self.taken)
        old_of = {piece.outputs[i]: old for i, old in piece.updates}
        updates = [(i, old_of[node]) for i, node in enumerate(outputs) if node in old_of]
        inputs = tuple(dict.fromkeys((*read_by(nodes), *(old for _, old in updates))))
        return piece_of(nodes, inputs, outputs, updates)

    # ---- the program -------------------------------------------------------------------------

    @functools.cached_property
    def words(self) -> np.ndarray:
        """The memory of the words, when none is added any more."""
        return np.array(self._initial or [0], np.uint32)

    def calls(self) -> "list[ScalarCall]":
        """The call of the program, which makes what the rest of the stage reads, if there is anything to do."""
        for node in self.taken & self._word.keys():
            if not self.taken.issuperset(node.users):
                view = view_of(self._word[node], node, self.words)
                self._registers.bring(self._registers[node], view)
        if not self._code and not self._stores and not self._loads:
            return []
        program = _kernel.ScalarProgram(
            self._code, self._loads, self._stores, self.words, len(self._tensors)
        )
        return [ScalarCall(program, list(self._tensors), sorted(self._vectors))]


class ScalarCall(NamedTuple):
    """A run of a program of scalars."""

    program: Any
    tensors: list[int]
    """Registers of what it loads from or stores to."""
    vectors: list[int]
    """Positions of those that may have gaps, which are only read."""

    def __call__(self, memory: list[Any]) -> None:
        tensors = [memory[register] for register in self.tensors]
        for i in self.vectors:
            tensors[i] = tensors[i].contiguous()
        self.program.run(list(map(Tensor.data_ptr, tensors)))
