"""A chain's program for any list of parameters: what `generalise` makes, and `emit` writes down.

A value belongs to a kind of parameters, and stands for one tensor of each of them, or is shared by all (a step count,
a norm over everything). Shared values reach those of parameters as operands; the other way goes through `Gathered` (a
list with a value of each parameter) and `Folded` (their sum, say).
"""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from chainrule.bridges.export.examples import Role
from chainrule.bridges.export.expressions import Expression
from chainrule.bridges.lowering.nodes import function_of, value_of


@dataclasses.dataclass(eq=False)
class Value:
    """One operation, input or constant of a program.

    Attributes:
      kind: of the parameters that it belongs to; None: it is shared.
      node: in the graph of the first example, for the first parameter of its kind.
      args, kwargs: with values, expressions, gathered and folded values in the place of nodes.
      role: of an input.
      constant: what an array is that the program brings, or an `Expression` for each parameter of a set.
      rank: how often values were gathered before it can be computed.
    """

    kind: int | None
    node: fx.Node
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    role: Role | None = None
    constant: Any = None
    rank: int = 0


class Gathered(NamedTuple):
    """A value of each parameter of a set, in order."""

    set: int
    values: dict[int, Value]
    """By kind."""


class Folded(NamedTuple):
    """What a function of two makes of the values of all parameters of a set, from the first on."""

    function: Any
    first: Any
    """What it begins with, before the first; or None."""
    gathered: Gathered


class PerLeaf(NamedTuple):
    """A vector with a number for each parameter of a set."""

    set: int
    codes: dict[int, Any]
    """By kind: an expression or a number."""
    dtype: torch.dtype


class Generic(NamedTuple):
    """The programs of a chain.

    Attributes:
      sets: the kinds of which a list of values was gathered.
      init, step: (kind, or None for what is shared; name) -> the value; the parameter itself is named "".
    """

    sets: list[frozenset[int]]
    init: dict[tuple[int | None, str], Value]
    step: dict[tuple[int | None, str], Value]


def operands(args: Any) -> list[Any]:
    """The values, expressions, gathered and folded values among arguments."""
    if isinstance(args, (Value, Gathered, Folded)) or hasattr(args, "code"):
        return [args]
    if isinstance(args, dict):
        args = args.values()
    elif isinstance(args, slice):
        args = (args.start, args.stop, args.step)
    elif not isinstance(args, (tuple, list)):
        return []
    return [found for arg in args for found in operands(arg)]


def ranked(results: Mapping[Any, Value]) -> list[Value]:
    """All values that results need, those that they are computed from before them, with their ranks."""
    order: list[Value] = []
    seen: set[int] = set()

    def visit(value: Value) -> None:
        stack: list[tuple[Value, bool]] = [(value, False)]
        while stack:
            current, done = stack.pop()
            if done:
                current.rank = _rank(current)
                order.append(current)
            elif id(current) not in seen:
                seen.add(id(current))
                stack.append((current, True))
                stack += [(v, False) for v in sources(current)]

    for value in results.values():
        visit(value)
    _sink(order)
    return order


def sources(value: Value) -> list[Value]:
    """The values that a value is computed from."""
    found: list[Value] = []
    for operand in operands((value.args, value.kwargs)):
        if isinstance(operand, Value):
            found.append(operand)
        elif isinstance(operand, (Gathered, Folded)):
            gathered = operand.gathered if isinstance(operand, Folded) else operand
            found += gathered.values.values()
            if isinstance(operand, Folded) and operand.first is not None:
                found.append(operand.first)
    return found


def _rank(value: Value) -> int:
    return max(
        (v.rank + (value.kind is None and v.kind is not None) for v in sources(value)), default=0
    )


def _sink(order: Sequence[Value]) -> None:
    """What was copied to be computed again in a later stage is computed there, and so is what a parameter makes of
    shared numbers alone: beside sums, it would keep a function from taking tensors in parts."""
    users: dict[int, list[Value]] = {}
    of_shared: set[int] = set()
    for value in order:
        given = sources(value)
        for source in given:
            users.setdefault(id(source), []).append(value)
        if (
            value.kind is not None
            and given
            and all(x.kind is None or id(x) in of_shared for x in given)
        ):
            of_shared.add(id(value))
    for value in reversed(order):
        own = users.get(id(value), ())
        moves = id(value) in of_shared and all(u.kind is not None for u in own)
        if value.kind is not None and ("rank" in value.node.meta or moves):
            reading = [u.rank for u in own if u.kind is not None]
            value.rank = max(value.rank, min(reading, default=value.rank))


def is_pick(value: Value) -> bool:
    """Whether a value is a parameter's entry of what all share, which whoever calls its function looks up."""
    if value.kind is None or not value.args or not isinstance(value.args[-1], Expression):
        return False
    return value.node.target is operator.getitem


def is_computed(value: Value) -> bool:
    return value.role is None and value.constant is None and not is_pick(value)


def reads_shape(value: Value) -> bool:
    found = operands((value.args, value.kwargs))
    return any(isinstance(x, Expression) and "shape" in x.names for x in found)


def is_sum(value: Value) -> bool:
    """Whether a value sums a whole tensor, whatever its shape."""
    if not is_computed(value) or function_of(value.node) is not torch.sum:
        return False
    return value.args[1] == Expression("tuple(range(len(shape)))", frozenset({"shape"}))


def after_sums(order: Sequence[Value]) -> set[Value]:
    """The numbers that functions make of sums over whole tensors, where all that they make of these are numbers."""
    found: set[Value] = set()
    spoilt: set[tuple[int, int | None]] = set()
    for value in order:
        given = [x for x in operands((value.args, value.kwargs)) if isinstance(x, Value)]
        if not is_computed(value) or value.kind is None:
            continue
        if any(x.rank == value.rank and (x in found or is_sum(x)) for x in given):
            found.add(value)
            if value_of(value.node).ndim or is_sum(value):
                spoilt.add((value.rank, value.kind))
    return {v for v in found if (v.rank, v.kind) not in spoilt}
