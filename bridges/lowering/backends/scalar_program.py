"""Scalars of a program outside torch: counts, bias corrections, rates, which a chain finds for each tensor.

An operation on a scalar costs torch a call, and several times that where the step before has emptied the cache; a chain
has hundreds. Those that the compiled kernel knows (`chainrule/scalars.hpp`) are here one call of it. What else there
is, sums over gradients and control flow, runs in torch: a program becomes stages, each of scalars first, then the rest
that they allow.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx

from chainrule.bridges.lowering.backends.scalar_plan import Plan, Word
from chainrule.bridges.lowering.executor import Emitted, Registers
from chainrule.bridges.lowering.nodes import first_arg, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.step_program import StepProgram

_SMALL = 1024


def only_scalars(program: StepProgram) -> bool:
    """Whether a program makes nothing but scalars and the like, of which each call costs more than the work."""
    made = [n for n in program.graph.nodes if n.op == "call_function" and not _is_free(n)]
    sizes = (value_of(n).numel() for n in made if isinstance(value_of(n), Tensor))
    return all(size <= _SMALL for size in sizes)


def _is_free(node: fx.Node) -> bool:
    taken = node.target is operator.getitem and info(first_arg(node)).free
    return taken or info(node).free


def scalar_calls(program: StepProgram, registers: Registers) -> Emitted:
    """A program on the CPU as stages, its scalars outside torch.

    The first call raises `TypeError` for a scalar of another dtype, shape or device, before anything is written.
    """
    plan = Plan(program, registers)
    stores: list[Word] = []
    copied: list[fx.Node] = []
    written = set()
    for result, old in program.updates:
        if result is old:
            continue
        words = plan.words_of(result, old)
        stores += words
        if words:
            written.add((result, old))
        else:
            copied.append(result)
    stages = plan.stages(stores, copied)
    given = plan.given(stores)
    expected = [(value_of(x).dtype, value_of(x).shape, True) for x in given]
    check = _Check([registers[x] for x in given], expected)
    return Emitted([check, *stages], written, [module.graph for module in plan.modules])


class _Check(NamedTuple):
    """Refuses scalars that are not what the program was made for."""

    registers: list[int]
    expected: list[Any]

    def __call__(self, memory: list[Any]) -> None:
        found = [memory[register] for register in self.registers]
        if list(map(_described, found)) != self.expected:
            raise _changed(found, self.expected)


_described = operator.attrgetter("dtype", "shape", "is_cpu")


def _changed(found: Sequence[Tensor], expected: Sequence[Any]) -> TypeError:
    pairs = ((t, wanted) for t, wanted in zip(found, expected, strict=True))
    got, (dtype, shape, _) = next((t, wanted) for t, wanted in pairs if _described(t) != wanted)
    return TypeError(
        f"a scalar of the state must be {dtype} of shape {tuple(shape)} on the CPU, as when the step was made, got "
        f"{got.dtype} of shape {tuple(got.shape)} on {got.device}; fill it in place, or use load_state_dict"
    )
