"""A step as calls on one memory: the one place where results meet the inputs that they are written into.

Memory is a list with a register for each value: the step's inputs, the buffers and constants that the program brings,
then whatever the calls make. A backend turns pieces of a program into calls; a call reads registers and fills others.
What a backend did not write in place is copied at the end, and an input that another result hands on is kept before
anything is written.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from chainrule.bridges.lowering.nodes import value_of
from chainrule.bridges.lowering.release import dissolve, dissolve_with, graphs_in
from chainrule.bridges.lowering.step_program import StepProgram

InPlace = Callable[[Sequence[Tensor]], None]
"""Takes the flat inputs of a program and writes every result into the input that it updates."""
Call = Callable[[list[Any]], None]
"""Part of a step: reads registers of the memory, fills others, or writes into tensors that are there."""


class Registers:
    """The register of each node: inputs, buffers and constants first, the others as they are asked for."""

    def __init__(self, program: StepProgram):
        self._register = {node: i for i, node in enumerate(program.inputs)}
        self._given = len(self._register) - len(program.buffers)
        self._brought: list[Any] = [*program.buffers]
        self._fixed: set[int] = set()
        for node in program.graph.find_nodes(op="get_attr"):
            self._register[node] = self._new(program.attributes[str(node.target)])

    def _new(self, content: Any = None) -> int:
        self._brought.append(content)
        return self._given + len(self._brought) - 1

    def __getitem__(self, node: fx.Node) -> int:
        if node not in self._register:
            self._register[node] = self._new()
        return self._register[node]

    def alias(self, node: fx.Node, old: fx.Node) -> None:
        """What `node` makes is found where `old` was: it is written into its memory."""
        self._register[node] = self[old]

    def bring(self, register: int, content: Tensor) -> None:
        """What a node makes whose register this is lies in this memory at every step."""
        self._brought[register - self._given] = content
        self._fixed.add(register)

    def brought(self, register: int) -> Tensor | None:
        """Where what a register holds lies at every step; None: it changes."""
        return self._brought[register - self._given] if register in self._fixed else None

    def free(self) -> int:
        """A register that is no node's."""
        return self._new()

    def contents(self) -> list[Any]:
        """What is in memory behind the inputs, before the first call."""
        return list(self._brought)


class Emitted(NamedTuple):
    """What a backend emits for a program; the parts of tensors are in `backends/parts.py`."""

    calls: list[Call]
    written: set[tuple[fx.Node, fx.Node]]
    """Results that the calls write into inputs, with these."""
    graphs: Sequence[fx.Graph] = ()
    """Graphs that live as long as the calls."""


BRANCHES: ContextVar[Callable[[Sequence[Callable[[], None]]], None] | None] = ContextVar(
    "BRANCHES", default=None
)
"""Runs functions that do not depend on each other at the same time, where that can be; None: one after the other."""


class Together:
    """Calls that do not depend on each other.

    They may be on different streams of a device, between a fork and a join. Memory that is free there is used again by
    what follows on its own stream, so none may be freed while another reads it: what calls read of each other the
    step's memory holds until its end, and what a call makes for itself stays on its stream.
    """

    def __init__(self, calls: Sequence[Call]):
        self._calls = calls

    def __call__(self, memory: list[Any]) -> None:
        run = BRANCHES.get()
        if run is not None:
            run([functools.partial(call, memory) for call in self._calls])
            return
        for call in self._calls:
            call(memory)


class _Keep(NamedTuple):
    """Copies of inputs, before they are written."""

    pairs: list[tuple[int, int]]

    def __call__(self, memory: list[Any]) -> None:
        for register, kept in self.pairs:
            memory[kept] = memory[register].clone()


class _Copy(NamedTuple):
    """Values into the tensors that they update."""

    values: list[int]
    targets: list[int]

    def __call__(self, memory: list[Any]) -> None:
        write([memory[i] for i in self.targets], [memory[i] for i in self.values])


class Executor:
    """A program as a function of its flat inputs that writes its results into them."""

    def __init__(
        self, program: StepProgram, registers: Registers, emitted: Emitted, moves: Iterable[Call]
    ):
        left = [
            (new, old)
            for new, old in program.updates
            if new is not old and (new, old) not in emitted.written
        ]
        kept = {new: registers.free() for new, _ in left if new.op == "placeholder"}
        self._calls: list[Call] = list(emitted.calls)
        if kept:
            self._calls.insert(
                0, _Keep([(registers[new], register) for new, register in kept.items()])
            )
        # On a GPU a call for several dtypes would be a launch for each tensor.
        by_dtype: dict[torch.dtype, _Copy] = {}
        for new, old in left:
            copy = by_dtype.setdefault(value_of(new).dtype, _Copy([], []))
            copy.values.append(kept[new] if new in kept else registers[new])
            copy.targets.append(registers[old])
        self._calls += by_dtype.values()
        self._calls += moves
        self._brought = registers.contents()
        dissolve([program.graph])
        dissolve_with(self, [*emitted.graphs, *graphs_in(program.attributes.values())])

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> None:
        memory = [*inputs, *self._brought]
        for call in self._calls:
            call(memory)


def write(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies every value into its target."""
    if targets:
        copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage] -- torch has no public one
        copy(list(targets), list(values))
