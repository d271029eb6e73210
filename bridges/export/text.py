"""Functions, and what calls them in order, as Python text."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chainrule.bridges.export import render
from chainrule.bridges.export.examples import Role
from chainrule.bridges.export.functions import Function, Functions, Numbers, role_name
from chainrule.bridges.export.generic import Folded, Gathered, PerLeaf, Value, is_computed, operands
from chainrule.bridges.lowering.nodes import function_of, value_of

_WIDTH = 100
_NAMES = ("place", "offset", "count", "size")


def call(head: str, arguments: Sequence[str], tail: str = "", indent: str = "") -> list[str]:
    """The lines of a call or a signature."""
    line = f"{indent}{head}({', '.join(arguments)}){tail}"
    if len(line) <= _WIDTH:
        return [line]
    return [f"{indent}{head}(", *(f"{indent}    {a}," for a in arguments), f"{indent}){tail}"]


class FunctionText:
    """One function."""

    def __init__(self, functions: Functions, function: Function):
        self.functions, self.function = functions, function
        self.names: dict[Value, str] = dict(functions.names)
        self.inlined: dict[Value, str] = {}
        inside = set(function.values)
        uses = Counter[Value]()
        as_numbers = Counter[Value]()
        for value in function.values:
            own = [x for x in operands((value.args, value.kwargs)) if isinstance(x, Value)]
            uses.update(own)
            as_numbers.update(render.number_operands(value))
        self.floats = {v for v in as_numbers if v not in inside and as_numbers[v] == uses[v]}
        self.numbers = set(as_numbers)
        kept = {*function.outputs, *(v for v, _ in function.updates)}
        self.once = {v for v in function.values if uses[v] == 1 and v not in kept and _is_scalar(v)}
        self._item: set[Value] = set()

    def name(self, x: Any) -> str:
        if isinstance(x, Value):
            if x in self.inlined:
                return f"{self.inlined[x]}.item()" if x in self._item else self.inlined[x]
            return f"{self.names[x]}.item()" if x in self._item else self.names[x]
        if isinstance(x, Gathered):
            return self.gathered(x)
        if isinstance(x, Folded):
            first = "" if x.first is None else f", {self.name(x.first)}"
            return f"functools.reduce({render.path_of(x.function)}, {self.gathered(x.gathered)}{first})"
        raise AssertionError(x)

    def gathered(self, x: Gathered) -> str:
        return gathered_name(self.functions, x)

    def parameters(self) -> list[str]:
        found: list[str] = []
        for x in self.function.inputs:
            if isinstance(x, str):
                found.append(f"{x}: {'Sequence[int]' if x == 'shape' else 'int'}")
            elif isinstance(x, Gathered):
                found.append(f"{self.gathered(x)}: list[Tensor]")
            elif isinstance(x, Numbers):
                found.append(f"{self.functions.names[x.value]}_of_each: Sequence[float]")
            else:
                kind = "float" if x in self.floats else type_of(x)
                found.append(f"{self.names[x]}: {kind}")
        found += [f"{role_name(role)}: Tensor" for role in missing_olds(self.function)]
        if self.uses_device():
            found.append("device: torch.device")
        return found

    def uses_device(self) -> bool:
        return any(
            isinstance(v.constant, (Tensor, PerLeaf))
            or any(map(_has_device, (*v.args, *v.kwargs.values())))
            for v in self.function.values
        )

    def lines(self) -> list[str]:
        function = self.function
        body: list[str] = []
        link = ""
        for value in function.values:
            where = str(value.node.meta.get("link") or "")
            text = self.statement(value)
            if text is None:
                continue
            if where and where != link:
                body.append(f"    # {where}")
                link = where
            body += [f"    {line}" for line in text]
        for value, role in function.updates:
            if self.names[value] != role_name(role):
                body.append(f"    {role_name(role)}.copy_({self.name(value)})")
        outputs = [self.names[v] for v in function.outputs]
        if outputs:
            body += (
                [f"    return {outputs[0]}"]
                if len(outputs) == 1
                else call("return ", outputs, indent="    ")
            )
        kinds = [type_of(v) for v in function.outputs]
        result = (
            "None" if not kinds else kinds[0] if len(kinds) == 1 else f"tuple[{', '.join(kinds)}]"
        )
        head = call(f"def {function.name}", self.parameters(), f" -> {result}:")
        return [*head, f'    """{self.summary()}"""', *body]

    def summary(self) -> str:
        links = dict.fromkeys(str(v.node.meta.get("link") or "") for v in self.function.values)
        listed = ", ".join(f"`{link}`" for link in links if link) or "the new parameter"
        return f"{'What all parameters share' if self.function.kind is None else 'One parameter'}: {listed}."

    def statement(self, value: Value) -> list[str] | None:
        if isinstance(value.constant, PerLeaf):
            name, dtype = self.names[value], value.constant.dtype
            return [f"{name} = torch.tensor({name}_of_each, dtype={dtype}, device=device)"]
        if isinstance(value.constant, Tensor):
            array = value.constant
            entries = render.literal(array.tolist(), self.name)
            return [
                f"{self.names[value]} = torch.tensor({entries}, dtype={array.dtype}, device=device)"
            ]
        self._item = {x for x in render.number_operands(value) if x not in self.floats}
        operand = self.function.in_place.get(value)
        if operand is not None:
            target = value.args[operand]
            text = render.in_place(value, operand, self.name)
            self.names[value] = self.name(target)
            return [text]
        text = render.expression(value, self.name)
        self._item = set()
        if value in self.once and len(text) <= 60:
            infix = function_of(value.node) in (*render.INFIX, torch.rsub, torch.neg)
            self.inlined[value] = f"({text})" if infix else text
            return None
        head, _, rest = text.partition("(")
        if re.fullmatch(r"[\w.]+", head) and len(text) > _WIDTH - 30 and _closes_last(text):
            return call(f"{self.names[value]} = {head}", _split(rest[:-1]))
        return [f"{self.names[value]} = {text}"]


def _split(arguments: str) -> list[str]:
    """The arguments of a call, which commas at the top level divide."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(arguments):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            found.append(arguments[start:i].strip())
            start = i + 1
    return [*found, arguments[start:].strip()]


def _closes_last(text: str) -> bool:
    """Whether the first bracket of a text closes at its end."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and c == ")":
            return i == len(text) - 1
    return False


def _has_device(x: Any) -> bool:
    if isinstance(x, (tuple, list)):
        return any(map(_has_device, x))
    return isinstance(x, torch.device)


def _is_scalar(value: Value) -> bool:
    own = value_of(value.node)
    return is_computed(value) and isinstance(own, Tensor) and own.ndim == 0


def type_of(value: Value) -> str:
    """The annotation of a value."""
    own = value_of(value.node)
    return "Tensor" if isinstance(own, Tensor) else "Sequence[Tensor]"


def missing_olds(function: Function) -> list[Role]:
    """What a function writes without reading it."""
    given = {(x.role.kind, x.role.name) for x in function.inputs if isinstance(x, Value) and x.role}
    return [role for _, role in function.updates if (role.kind, role.name) not in given]


def gathered_name(functions: Functions, x: Gathered) -> str:
    first = x.values[min(x.values)]
    name = functions.names[first]
    return f"{name}_of_all" if x.set == 0 else f"{name}_of_set_{x.set}"
