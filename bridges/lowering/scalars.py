"""Scalars of a program outside torch: counts, bias corrections, rates, which a chain finds for each tensor.

An operation on a scalar costs torch a call, and several times that where the step before has emptied the cache; a chain
has hundreds. Those that the compiled kernel knows (`chainrule/scalars.hpp`) are here one call of it. What else there
is, sums over gradients and control flow, runs in torch: a program becomes stages, each of scalars first, then the rest
that they allow.
"""

import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.pieces import POINTWISE
from chainrule.bridges.lowering.program import Lowered
from chainrule.bridges.lowering.release import dissolve_with
from chainrule.native import _kernel

_TYPES = {torch.float32: "f", torch.int32: "i", torch.bool: "b"}
_VIEWS = {"f": np.float32, "i": np.int32, "b": np.bool_}
_NAMES = {torch.clamp_min: "maximum", torch.clamp_max: "minimum", torch.rsub: "sub"}
_TRUTHS = ("lt", "le", "gt", "ge", "eq", "ne", "isfinite")
_OPERATIONS = frozenset(_kernel.scalar_ops()) if _kernel else frozenset()
_GIVEN = -1  # the stage of inputs and constants


def scalar_step(
    lowered: Lowered, targets: Sequence[int], values: dict[fx.Node, Any]
) -> Callable[[Sequence[Tensor]], None]:
    """A program on the CPU as a function that writes its outputs into its inputs, its scalars outside torch.

    Args:
      lowered: the program.
      targets: for every output, the position of the input that it renews.
      values: a tensor for every node, real or fake.

    Returns:
      A function of the flat inputs. It raises `TypeError` for a scalar of another dtype, shape or device, before it
      writes.
    """
    plan = _Plan(lowered, values)
    results: Any = lowered.graph.graph.output_node().args[0]
    stores: list[_Place] = []
    copies: list[tuple[fx.Node, int]] = []
    for i, target in enumerate(targets):
        if lowered.passthrough.get(i) == target:
            continue
        places = plan.places(results[i], plan.inputs[target])
        stores += places
        copies += [] if places else [(results[i], target)]
    stages = plan.stages(stores, [result for result, _ in copies])
    copied = [(plan.position[x], t) for x, t in copies]
    borrowed = [plan.position[x] for x, _ in copies if x.op == "placeholder"]
    scalars = [plan.position[x] for x in plan.given(stores)]
    expected = [(values[plan.inputs[p]].dtype, values[plan.inputs[p]].shape, True) for p in scalars]

    @torch.no_grad()
    def step(inputs: Sequence[Tensor]) -> None:
        found = [inputs[p] for p in scalars]
        if list(map(_described, found)) != expected:
            raise _changed(found, expected)
        memory: list[Any] = [*inputs, *plan.constants, *plan.later]
        # An output that is another input unchanged must be read before that input is renewed.
        kept = {p: inputs[p].clone() for p in borrowed}
        for stage in stages:
            stage.run(memory)
        if copied:
            copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            copy(
                [inputs[t] for _, t in copied],
                [kept[p] if p in kept else memory[p] for p, _ in copied],
            )

    for module in plan.modules:
        dissolve_with(step, module)
    return step


_described = operator.attrgetter("dtype", "shape", "is_cpu")


def _changed(found: Sequence[Tensor], expected: Sequence[Any]) -> TypeError:
    pairs = ((t, wanted) for t, wanted in zip(found, expected, strict=True))
    got, (dtype, shape, _) = next((t, wanted) for t, wanted in pairs if _described(t) != wanted)
    return TypeError(
        f"a scalar of the state must be {dtype} of shape {tuple(shape)} on the CPU, as when the step was made, got "
        f"{got.dtype} of shape {tuple(got.shape)} on {got.device}; fill it in place, or use load_state_dict"
    )


class _Place(NamedTuple):
    """A word in the memory of a tensor."""

    word: int
    tensor: fx.Node
    offset: int
    bytes: int


class _Stage(NamedTuple):
    """A program of scalars, and then nodes in torch; positions are those of `_Plan.position`."""

    program: Any
    tensors: list[int]
    """What the program loads from or stores to."""
    rest: Callable[..., Sequence[Any]]
    reads: list[int]
    words: list[Tensor]
    """What `rest` takes after these: scalars, which are words of the program."""
    results: slice

    def run(self, memory: list[Any]) -> None:
        given = [memory[p] for p in self.tensors]
        tensors = list(map(Tensor.contiguous, given))
        self.program.run(list(map(Tensor.data_ptr, tensors)))
        if any(map(operator.is_not, tensors, given)):
            for old, new in zip(given, tensors, strict=True):
                old.copy_(new)
        memory[self.results] = self.rest(*[memory[p] for p in self.reads], *self.words)


class _Plan:
    """Which nodes are words of the scalar programs, which stay in torch, and when each is there.

    A word is there for the programs of its stage and later ones, and for torch in its stage. What torch makes in a
    stage is there for torch in that stage, and can be loaded into a word in the next.
    """

    def __init__(self, lowered: Lowered, values: dict[fx.Node, Any]):
        self.values, self._module = values, lowered.graph
        self.modules: list[fx.GraphModule] = []
        nodes = list(lowered.graph.graph.nodes)
        self.inputs = [node for node in nodes if node.op == "placeholder"]
        self.position = {node: i for i, node in enumerate(self.inputs)}
        """Of inputs, constants, and what torch makes and another stage or the caller reads, in one list."""
        self.constants: list[Tensor] = []
        self.later: list[None] = []
        self._stage: dict[fx.Node, int] = {}
        """Of nodes in torch the one they run in, of words the first in which they are there."""
        self._word: dict[fx.Node, int] = {}
        self._words: list[int] = []
        """What each is at first."""
        self._loaded: dict[fx.Node, tuple[int, int]] = {}
        self._numbers: dict[int, int] = {}
        self._code: list[tuple[int, tuple[str, int, int, int, int]]] = []
        self._loads: list[tuple[int, _Place]] = []
        for node in nodes:
            if node.op != "output" and not self._add_scalar(node):
                self._add_other(node)

    # ---- what each node becomes ------------------------------------------------------------

    def _add_other(self, node: fx.Node) -> None:
        before = max((self._stage[x] for x in node.all_input_nodes), default=0)
        self._stage[node] = max(before, 0) if node.op == "call_function" else _GIVEN
        if node.op == "get_attr" and isinstance(self.values[node], Tensor):
            self.position[node] = len(self.inputs) + len(self.constants)
            self.constants.append(operator.attrgetter(str(node.target))(self._module))

    def _add_scalar(self, node: fx.Node) -> bool:
        """Makes a node an instruction, or a number, if it can be one."""
        type_ = self._type(node)
        if type_ and node.target is torch.full:
            self._word[node], self._stage[node] = self._number(node.args[1], type_), 0
            return True
        found = self._operation(node, type_) if type_ else None
        if found is None:
            return False
        name, operands = found
        read = [self._operand(operand, as_type) for operand, as_type in operands]
        stage = max(ready for _, ready in read)
        self._word[node], self._stage[node] = self._emit(stage, name, [w for w, _ in read]), stage
        return True

    def _operation(self, node: fx.Node, type_: str) -> tuple[str, list[tuple[Any, str]]] | None:
        """The kernel's name for what a node does, and its operands with the types to give them in."""
        args: Any = node.args
        moves = node.target in (torch.Tensor.to, torch.clone)
        if node.target not in POINTWISE or (node.kwargs and not moves):
            return None
        if moves or (node.target is ops.float_to_int and type_ == "i"):
            args = args[:1]
        types: Any = [self._type(a) if isinstance(a, fx.Node) else _type_of(a) for a in args]
        if None in types:
            return None
        name: str = _NAMES.get(node.target) or node.target.__name__  # pyright: ignore
        if moves:
            name, wanted = f"to.{types[0]}.{type_}", types
        elif node.target is ops.float_to_int:
            name, wanted = "float_to_int.f", ["f"]
        elif node.target is torch.where:
            name, wanted = f"where.{type_}", ["b", type_, type_]
        else:
            # What torch promotes them to; a quotient of integers is a float32.
            common = "f" if node.target is torch.div else min(types, key="fib".index)
            if type_ != ("b" if name in _TRUTHS else common):
                return None
            name, wanted = f"{name}.{common}", [common] * len(args)
        operands = list(zip(args, wanted, strict=True))
        if name not in _OPERATIONS or not all(self._fits(*operand) for operand in operands):
            return None
        return name, operands[::-1] if node.target is torch.rsub else operands

    def _fits(self, operand: Any, type_: str) -> bool:
        if isinstance(operand, fx.Node):
            return f"to.{self._type(operand)}.{type_}" in _OPERATIONS
        return type_ != "i" or -(2**31) <= operand < 2**31

    def _type(self, node: fx.Node) -> str | None:
        """f, i or b; None for what is no scalar of these."""
        value = self.values.get(node)
        return _TYPES.get(value.dtype) if isinstance(value, Tensor) and value.ndim == 0 else None

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
        (word, stage), own = self._read(operand), self._type(operand)
        return (word if own == type_ else self._emit(stage, f"to.{own}.{type_}", [word])), stage

    def _read(self, node: fx.Node) -> tuple[int, int]:
        """The word of a scalar, and the first stage in which it is there; it is loaded if torch makes it."""
        if node in self._word:
            return self._word[node], self._stage[node]
        if node not in self._loaded:
            source, offset = _element(node, self.values)
            word, stage = self._new_word(), self._stage[source] + 1
            self._loads.append((stage, self._place(word, node, source, offset)))
            self._loaded[node] = word, stage
        return self._loaded[node]

    def _place(self, word: int, like: fx.Node, tensor: fx.Node, offset: int) -> _Place:
        return _Place(word, tensor, offset, self.values[like].element_size())

    # ---- stages ----------------------------------------------------------------------------

    def places(self, result: fx.Node, target: fx.Node) -> list[_Place]:
        """Where the words of a result go that is a scalar or a stack of them; none for others."""
        entries: Any = result.args[0] if result.target is torch.stack else [result]
        dtype = self.values[result].dtype
        if self.values[result].ndim != (result.target is torch.stack) or not all(
            self._type(x) and self.values[x].dtype == dtype for x in entries
        ):
            return []
        return [self._place(self._read(x)[0], x, target, k) for k, x in enumerate(entries)]

    def given(self, stores: Iterable[_Place]) -> list[fx.Node]:
        """The inputs whose memory the programs read or write."""
        places = [*(place for _, place in self._loads), *stores]
        return list(dict.fromkeys(p.tensor for p in places if p.tensor.op == "placeholder"))

    def stages(self, stores: Sequence[_Place], results: Sequence[fx.Node]) -> list[_Stage]:
        """All stages, the last of which writes the stores.

        Args:
          stores: of `places`.
          results: nodes for which the caller asks, at their `position`.
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
            start = len(self.inputs) + len(self.constants) + len(self.later)
            self.position |= {n: start + i for i, n in enumerate(exported)}
            self.later += [None] * len(exported)
            program, tensors = self._program(k, stores if k == last else (), words)
            run, reads, views = self._torch(nodes, exported, words)
            made = slice(start, start + len(exported))
            stages.append(_Stage(program, tensors, run, reads, views, made))
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
        self, stage: int, stores: Sequence[_Place], words: np.ndarray
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
        return program, [self.position[node] for node in tensors]

    def _torch(
        self, nodes: Sequence[fx.Node], exported: Sequence[fx.Node], words: np.ndarray
    ) -> tuple[Callable[..., Sequence[Any]], list[int], list[Tensor]]:
        """A function of some positions and words that makes `exported`."""
        if not nodes:
            return (lambda: ()), [], []
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        read = dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in nodes)
        given = [x for x in read if x in self.position]
        scalars = [x for x in read if x in self._word]
        for x in (*given, *scalars):
            new[x] = graph.placeholder(f"read_{len(new)}")
        for x in read:
            if x not in new:  # a body of control flow
                new[x] = graph.node_copy(x)
        for node in nodes:
            new[node] = graph.node_copy(node, new.__getitem__)
        graph.output(tuple(new[x] for x in exported))
        self.modules.append(fx.GraphModule(self._module, graph))
        run = self.modules[-1].forward
        return run, [self.position[x] for x in given], [self._view(x, words) for x in scalars]

    def _view(self, node: fx.Node, words: np.ndarray) -> Tensor:
        """The memory of a word as a scalar of torch."""
        type_ = self._type(node)
        view = torch.from_numpy(words.view(_VIEWS[type_]))  # pyright: ignore
        word = self._word[node]
        if type_ == "b":  # the lowest byte
            return view[4 * word + (0 if sys.byteorder == "little" else 3)]
        return view[word]


def _type_of(number: Any) -> str | None:
    return {bool: "b", int: "i", float: "f"}.get(type(number))


def _element(node: fx.Node, values: dict[fx.Node, Any]) -> tuple[fx.Node, int]:
    """A scalar that torch makes as an element of a tensor."""
    source: Any = node.args[0] if node.args else None
    if node.target is operator.getitem and source.target is ops.unbind:
        return source.args[0], node.args[1]  # pyright: ignore
    if node.target is torch.reshape and values[source].numel() == 1:
        return source, 0
    return node, 0
