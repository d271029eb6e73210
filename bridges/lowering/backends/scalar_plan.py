"""Which scalars of a program are words of the kernel's scalar programs, and in which stage each is there."""

import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.backends.scalar_ops import operation, type_of
from chainrule.bridges.lowering.executor import Registers
from chainrule.bridges.lowering.nodes import args_of, first_arg, value_of
from chainrule.bridges.lowering.step_program import StepProgram
from chainrule.native import _kernel

_VIEWS = {"f": np.float32, "i": np.int32, "b": np.bool_}
_GIVEN = -1  # the stage of inputs and constants


class Word(NamedTuple):
    """A word of the program that is loaded from the memory of a tensor, or stored there."""

    word: int
    tensor: fx.Node
    offset: int
    bytes: int


class Stage(NamedTuple):
    """A program of scalars, and then nodes in torch."""

    program: Any
    tensors: list[int]
    """Registers of what the program loads from or stores to."""
    rest: Callable[..., Sequence[Any]]
    reads: list[int]
    words: list[Tensor]
    """What `rest` takes after these registers: scalars, which are words of the program."""
    results: list[int]

    def __call__(self, memory: list[Any]) -> None:
        given = [memory[p] for p in self.tensors]
        tensors = list(map(Tensor.contiguous, given))
        self.program.run(list(map(Tensor.data_ptr, tensors)))
        if any(map(operator.is_not, tensors, given)):
            for old, new in zip(given, tensors, strict=True):
                old.copy_(new)
        made = self.rest(*[memory[p] for p in self.reads], *self.words)
        for register, value in zip(self.results, made, strict=True):
            memory[register] = value


class Plan:
    """Which nodes are words of the scalar programs, which stay in torch, and when each is there.

    A word is there for the programs of its stage and later ones, and for torch in its stage. What torch makes in a
    stage is there for torch in that stage, and can be loaded into a word in the next.
    """

    def __init__(self, program: StepProgram, registers: Registers):
        self.registers, self._attributes = registers, program.attributes
        self.modules: list[fx.GraphModule] = []
        self._kept: set[fx.Node] = set()
        """Constants, and what torch makes and another stage or the caller reads."""
        self._stage: dict[fx.Node, int] = {}
        """Of nodes in torch the one they run in, of words the first in which they are there."""
        self._word: dict[fx.Node, int] = {}
        self._words: list[int] = []
        """What each is at first."""
        self._loaded: dict[fx.Node, tuple[int, int]] = {}
        self._numbers: dict[int, int] = {}
        self._code: list[tuple[int, tuple[str, int, int, int, int]]] = []
        self._loads: list[tuple[int, Word]] = []
        for node in program.graph.nodes:
            if node.op != "output" and not self._add_scalar(node):
                self._add_other(node)

    # ---- what each node becomes ------------------------------------------------------------

    def _add_other(self, node: fx.Node) -> None:
        before = max((self._stage[x] for x in node.all_input_nodes), default=0)
        self._stage[node] = max(before, 0) if node.op == "call_function" else _GIVEN
        if node.op == "placeholder" or (
            isinstance(value_of(node), Tensor) and node.op == "get_attr"
        ):
            self._kept.add(node)

    def _add_scalar(self, node: fx.Node) -> bool:
        """Makes a node an instruction, or a number, if it can be one."""
        type_ = type_of(node)
        if type_ and node.target is torch.full:
            self._word[node], self._stage[node] = self._number(node.args[1], type_), 0
            return True
        found = operation(node, type_) if type_ else None
        if found is None:
            return False
        name, operands = found
        read = [self._operand(operand, as_type) for operand, as_type in operands]
        stage = max(ready for _, ready in read)
        self._word[node], self._stage[node] = self._emit(stage, name, [w for w, _ in read]), stage
        return True

    # ---- words -----------------------------------------------------------------------------

    def _new_word(self, value: int = 0) -> int:
        self._words.append(value)
        return len(self._words) - 1

    def _number(self, number: Any, type_: str) -> int:
        with np.errstate(over="ignore"):  # infinite in float32, as in torch
            bits = int(np.float32(number).view(np.uint32)) if type_ == "f" else int(number) % 2**32
        if bits not in self._numbers:
            self._numbers[bits] = self._new_word(bits)
        return self._numbers[bits]

    def _emit(self, stage: int, name: str, operands: Sequence[int]) -> int:
        result = self._new_word()
        a, b, c = (*operands, 0, 0)[:3]
        self._code.append((stage, (name, result, a, b, c)))
        return result

    def _operand(self, operand: Any, type_: str) -> tuple[int, int]:
        """The word of a number or scalar, in another type perhaps, and the first stage in which it is there."""
        if not isinstance(operand, fx.Node):
            return self._number(operand, type_), 0
        (word, stage), own = self._read(operand), type_of(operand)
        return (word if own == type_ else self._emit(stage, f"to.{own}.{type_}", [word])), stage

    def _read(self, node: fx.Node) -> tuple[int, int]:
        """The word of a scalar, and the first stage in which it is there; it is loaded if torch makes it."""
        if node in self._word:
            return self._word[node], self._stage[node]
        if node not in self._loaded:
            source, offset = _element(node)
            word, stage = self._new_word(), self._stage[source] + 1
            self._loads.append((stage, self._at(word, node, source, offset)))
            self._loaded[node] = word, stage
        return self._loaded[node]

    def _at(self, word: int, like: fx.Node, tensor: fx.Node, offset: int) -> Word:
        return Word(word, tensor, offset, value_of(like).element_size())

    # ---- stages ----------------------------------------------------------------------------

    def words_of(self, result: fx.Node, target: fx.Node) -> list[Word]:
        """Where the words of a result go that is a scalar or a stack of them; none for others."""
        entries: Any = result.args[0] if result.target is torch.stack else [result]
        dtype = value_of(result).dtype
        if value_of(result).ndim != (result.target is torch.stack) or not all(
            type_of(x) and value_of(x).dtype == dtype for x in entries
        ):
            return []
        return [self._at(self._read(x)[0], x, target, k) for k, x in enumerate(entries)]

    def given(self, stores: Iterable[Word]) -> list[fx.Node]:
        """The inputs whose memory the programs read or write."""
        words = [*(word for _, word in self._loads), *stores]
        return list(dict.fromkeys(w.tensor for w in words if w.tensor.op == "placeholder"))

    def stages(self, stores: Sequence[Word], results: Sequence[fx.Node]) -> list[Stage]:
        """All stages, the last of which writes the stores.

        Args:
          stores: of `words_of`.
          results: nodes for which the caller asks, in their registers.
        """
        asked = [*results, *(place.tensor for _, place in self._loads)]
        rest = self._needed(asked)
        ends = [*(self._stage[n] + 1 for n in rest), *(s for s, _ in (*self._code, *self._loads))]
        last = max(ends, default=0)
        words = np.array(self._words, np.uint32)
        stages = []
        for k in range(last + 1):
            nodes = [n for n in rest if self._stage[n] == k]
            exported = [
                n
                for n in nodes
                if n in asked or any(user in rest and self._stage[user] > k for user in n.users)
            ]
            self._kept |= set(exported)
            program, tensors = self._program(k, stores if k == last else (), words)
            run, reads, views = self._torch(nodes, exported, words)
            made = [self.registers[n] for n in exported]
            stages.append(Stage(program, tensors, run, reads, views, made))
        return stages

    def _needed(self, asked: Iterable[fx.Node]) -> dict[fx.Node, None]:
        """The nodes that run in torch, in order."""
        needed, open_ = set(), list(asked)
        while open_:
            node = open_.pop()
            if node.op == "call_function" and node not in self._word and node not in needed:
                needed.add(node)
                open_ += node.all_input_nodes
        return {node: None for node in self._stage if node in needed}

    def _program(
        self, stage: int, stores: Sequence[Word], words: np.ndarray
    ) -> tuple[Any, list[int]]:
        code = [step for at, step in self._code if at == stage]
        loads = [place for at, place in self._loads if at == stage]
        tensors = {p.tensor: None for p in (*loads, *stores)}
        index = {node: i for i, node in enumerate(tensors)}
        moves = [
            [(p.word, index[p.tensor], p.offset, p.bytes) for p in places]
            for places in (loads, stores)
        ]
        program = _kernel.ScalarProgram(code, moves[0], moves[1], words, len(tensors))
        return program, [self.registers[node] for node in tensors]

    def _torch(
        self, nodes: Sequence[fx.Node], exported: Sequence[fx.Node], words: np.ndarray
    ) -> tuple[Callable[..., Sequence[Any]], list[int], list[Tensor]]:
        """A function of some positions and words that makes `exported`."""
        if not nodes:
            return (lambda: ()), [], []
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        read = dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in nodes)
        given = [x for x in read if x in self._kept]
        scalars = [x for x in read if x in self._word]
        for x in (*given, *scalars):
            new[x] = graph.placeholder(f"read_{len(new)}")
        for x in read:
            if x not in new:  # a body of control flow
                new[x] = graph.node_copy(x)
        for node in nodes:
            new[node] = graph.node_copy(node, new.__getitem__)
        graph.output(tuple(new[x] for x in exported))
        self.modules.append(fx.GraphModule(self._attributes, graph))
        run = self.modules[-1].forward
        return run, [self.registers[x] for x in given], [self._view(x, words) for x in scalars]

    def _view(self, node: fx.Node, words: np.ndarray) -> Tensor:
        return view_of(self._word[node], node, words)


def view_of(word: int, node: fx.Node, words: np.ndarray) -> Tensor:
    """The memory of a word as the scalar of torch that a node is."""
    type_ = type_of(node)
    assert type_ is not None  # it has a word
    view = torch.from_numpy(words.view(_VIEWS[type_]))
    if type_ == "b":  # the lowest byte
        return view[4 * word + (0 if sys.byteorder == "little" else 3)]
    return view[word]


def entry(node: fx.Node) -> tuple[fx.Node, int]:
    """What holds a scalar: the vector that it is taken out of, and which entry it is there, or itself."""
    if node.target is operator.getitem and first_arg(node).target is ops.unbind:
        return first_arg(first_arg(node)), args_of(node)[1]
    return node, 0


def _element(node: fx.Node) -> tuple[fx.Node, int]:
    """A scalar that torch makes as an element of a tensor: that, and which of its elements."""
    if node.target is torch.reshape and value_of(first_arg(node)).numel() == 1:
        return first_arg(node), 0
    return entry(node)
