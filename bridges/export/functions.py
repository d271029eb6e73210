"""A generic program as functions: for each kind and rank one of a parameter's tensors, for each rank one of what all
share.

What a parameter's function updates it updates in place, unless somebody reads the old value later.
"""

import dataclasses
import keyword
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from chainrule.bridges.export import render
from chainrule.bridges.export.examples import Role
from chainrule.bridges.export.expressions import Expression
from chainrule.bridges.export.generic import (
    Folded,
    Gathered,
    PerLeaf,
    Value,
    after_sums,
    is_computed,
    is_sum,
    operands,
    ranked,
    reads_shape,
    sources,
)
from chainrule.bridges.lowering.backends.liveness import aliases_of
from chainrule.bridges.lowering.nodes import function_of, is_array, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.passes.partition import Piece
from chainrule.bridges.lowering.passes.signature import flat_shape

Results = Mapping[tuple[int | None, str], Value]


class Numbers(NamedTuple):
    """The numbers of a `PerLeaf` vector, as a list."""

    value: Value


@dataclasses.dataclass(eq=False)
class Function:
    """A function of the file.

    Attributes:
      name: of it.
      kind, rank: of its values.
      values: which it computes, in order.
      inputs: values, gathered values and names (`shape`, `place_0`, ...) that it takes.
      outputs: values that it returns.
      updates: (new value, role of what it replaces) that it writes.
      in_place: value -> the position of the operand in whose memory it is computed.
      in_parts: whether it may be given parts of the tensors, one after the other; its results are then summed.
      in_batches: whether it may be given the tensors of several parameters of one shape at once.
      flat: whether it may be given tensors as vectors.
    """

    name: str
    kind: int | None
    rank: int
    values: list[Value]
    inputs: list[Any] = dataclasses.field(default_factory=list)
    outputs: list[Value] = dataclasses.field(default_factory=list)
    updates: list[tuple[Value, Role]] = dataclasses.field(default_factory=list)
    in_place: dict[Value, int] = dataclasses.field(default_factory=dict)
    in_parts: bool = False
    in_batches: bool = False
    flat: bool = False


class Functions:
    """The functions of one part of a program, `init` or the step.

    Attributes:
      functions: in the order in which they run.
      homes: value -> the role that it has updated, from the next rank on.
    """

    def __init__(self, results: Results, words: Mapping[str, str], update: bool):
        """Args:
        results: the part.
        words: what functions are called: `leaf` and `shared`, each a prefix.
        update: whether the results replace what the parameters and the state were.
        """
        self.results, self.update = results, update
        self.order = ranked(results)
        self.users: dict[Value, list[Value]] = {}
        for value in self.order:
            for source in sources(value):
                self.users.setdefault(source, []).append(value)
        self.homes: dict[Value, Role] = {}
        self.names = self._named()
        groups: dict[tuple[int, bool, int, bool], list[Value]] = {}
        last = after_sums(self.order) if self.update else set()
        for value in self.order:
            if is_computed(value) or value.constant is not None:
                kind = -1 if value.kind is None else value.kind
                key = value.rank, value.kind is not None, kind, value in last
                groups.setdefault(key, []).append(value)
        ranks = sorted({rank for rank, of_leaf, *_ in groups if of_leaf})
        kinds = {kind for _, of_leaf, kind, _ in groups if of_leaf}
        self.functions: list[Function] = []
        for (rank, of_leaf, kind, is_last), values in sorted(
            groups.items(), key=lambda item: item[0]
        ):
            prefix = words["leaf" if of_leaf else "shared"]
            if of_leaf and len(ranks) > 1 and rank < ranks[-1]:
                prefix = words["early"]
            name = f"{prefix}_{rank}" if len(ranks) > 1 or not of_leaf else prefix
            if of_leaf and len(kinds) > 1:
                name += f"_of_{kind}"
            name += "_of_sums" * is_last
            function = Function(name, kind if of_leaf else None, rank, values)
            self._complete(function)
            self.functions.append(function)

    def _named(self) -> dict[Value, str]:
        taken: Counter[str] = Counter()
        names: dict[Value, str] = {}
        results = {id(v): name for (_, name), v in self.results.items()}
        for value in self.order:
            if value.role is not None:
                names[value] = word = role_name(value.role)
                taken[word] = 1
        for value in self.order:
            if value.role is not None:
                continue
            if is_computed(value) and id(value) in results and self.update:
                word = f"new_{identifier(results[id(value)]) or 'param'}"
            else:
                word = render.word_for(value)
            taken[word] += 1
            names[value] = word if taken[word] == 1 else f"{word}_{taken[word]}"
        return names

    # ---- what a function takes and gives -------------------------------------------------------

    def _complete(self, function: Function) -> None:
        inside = set(function.values)
        taken: dict[Any, Any] = {}
        for value in function.values:
            if isinstance(value.constant, PerLeaf):
                taken[Numbers, value] = Numbers(value)
                continue
            for operand in operands((value.args, value.kwargs)):
                for x in (
                    (operand.first, operand.gathered) if isinstance(operand, Folded) else (operand,)
                ):
                    if isinstance(x, Expression):
                        taken |= dict.fromkeys(sorted(x.names))
                    elif isinstance(x, Gathered) or (x is not None and x not in inside):
                        taken[_key(x)] = x
        function.inputs = [key if x is None else x for key, x in taken.items()]
        final = {id(v) for v in self.results.values()}
        if self.update and function.kind is not None:
            self._write(function)
        written = {id(v) for v, _ in function.updates}
        function.outputs = [
            v
            for v in function.values
            if (any(u not in inside for u in self.users.get(v, ())) and v not in self.homes)
            or (id(v) in final and id(v) not in written)
        ]
        if function.kind is not None:
            self._alias(function)

    def _old(self, kind: int, name: str) -> Role:
        return Role("state", None, name) if name else Role("param")

    def _write(self, function: Function) -> None:
        """Finds the updates that a function may write: nobody reads the old value later."""
        kind = function.kind
        assert kind is not None
        inside = set(function.values)
        seen: set[int] = set()
        for (owner, name), value in self.results.items():
            if owner != kind or value not in inside or id(value) in seen:
                continue
            seen.add(id(value))
            role = self._old(kind, name)
            readers = [
                user
                for old in self.order
                if old.kind == kind and old.role is not None and _alike(old.role, role)
                for user in self.users.get(old, ())
            ]
            if all(u in inside or _runs_before(u, function) for u in readers):
                gone = any(
                    v.kind == kind and v.role is not None and _alike(v.role, role)
                    for v in self.results.values()
                )
                if not gone:
                    function.updates.append((value, role))
                    self.homes[value] = role

    def _alias(self, function: Function) -> None:
        own = [v for v in function.values if is_computed(v)]
        function.in_batches = (
            self.update
            and all(not isinstance(x, str) or x == "shape" for x in function.inputs)
            and not any(isinstance(v.constant, (torch.Tensor, PerLeaf)) for v in function.values)
            and not any(render.is_own(function_of(v.node)) for v in own)
        )
        nodes = [v.node for v in function.values]
        given = [x for x in function.inputs if isinstance(x, Value)]
        if len(set(nodes)) < len(nodes):
            return
        olds = {_short(x.role): x for x in given if x.role is not None}
        outputs = [*function.outputs, *(v for v, _ in function.updates)]
        outputs = list(dict.fromkeys(outputs))
        updates = tuple(
            (outputs.index(v), olds[_short(role)].node)
            for v, role in function.updates
            if _short(role) in olds and v not in function.outputs and _same(v, olds[_short(role)])
        )
        piece = Piece(
            tuple(nodes),
            tuple(x.node for x in given),
            tuple(v.node for v in outputs),
            updates,
            False,
            None,
        )
        aliases = aliases_of(piece, {v.node for v in function.values if render.takes_numbers(v)})
        at = {v.node: v for v in function.values}
        function.in_place = {at[node]: operand for node, operand in aliases.operand.items()}
        function.flat = (
            self.update
            and all(isinstance(x, Value) or x == "shape" for x in function.inputs)
            and flat_shape(nodes, [x.node for x in given]) is not None
            and all(is_sum(v) or not reads_shape(v) for v in function.values)
        )
        function.in_parts = (
            function.flat
            and all(v in function.outputs for v in function.values if is_sum(v))
            and all(is_sum(v) for v in function.outputs)
            and all(_is_elementwise(v) or is_sum(v) for v in function.values)
        )


def _runs_before(value: Value, function: Function) -> bool:
    return value.rank < function.rank + (value.kind is None)


def _is_elementwise(value: Value) -> bool:
    node = value.node
    return info(node).elementwise or not any(
        is_array(value_of(x)) for x in (node, *node.all_input_nodes)
    )


def _same(new: Value, old: Value) -> bool:
    x, y = value_of(new.node), value_of(old.node)
    return x.shape == y.shape and x.dtype == y.dtype


def _short(role: Role | None) -> tuple[str, str]:
    assert role is not None
    return role.kind, role.name


def _alike(x: Role, y: Role) -> bool:
    return _short(x) == _short(y)


def _key(x: Any) -> Any:
    return (
        x if isinstance(x, Value) else (x.set, *x.values.values()) if isinstance(x, Gathered) else x
    )


def identifier(name: str) -> str:
    """A name of the state as one of Python."""
    text = "".join(c if c.isalnum() else "_" for c in name).strip("_")
    text = f"_{text}" if text[:1].isdigit() else text
    return f"{text}_" if keyword.iskeyword(text) else text


def role_name(role: Role) -> str:
    """What an input is called."""
    if role.kind in ("state", "group", "live"):
        return identifier(role.name)
    return {"param": "param", "grad": "grad", "multiplier": "lr", "loss": "loss"}[role.kind]


def updates_left(functions: Functions) -> Sequence[tuple[int | None, str, Value]]:
    """The results that no function writes."""
    written = {(f.kind, role.name) for f in functions.functions for _, role in f.updates}
    return [
        (kind, name, value)
        for (kind, name), value in functions.results.items()
        if (kind, name) not in written
    ]
