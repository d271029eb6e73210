"""What runs the functions of a file in order, as Python text."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from chainrule.bridges.export.examples import Role
from chainrule.bridges.export.expressions import Expression
from chainrule.bridges.export.functions import Function, Functions, Numbers, role_name, updates_left
from chainrule.bridges.export.generic import Gathered, PerLeaf, Value, is_pick
from chainrule.bridges.export.text import FunctionText, call, missing_olds
from chainrule.bridges.hyperparameters import key_of
from chainrule.bridges.lowering.nodes import value_of

_NAMES = ("place", "offset", "count", "size")


class Driver:
    """The function that runs all others."""

    def __init__(self, functions: Functions, sets: Sequence[frozenset[int]], kinds: Iterable[int]):
        self.functions, self.sets = functions, sets
        self.kinds = sorted(kinds)
        self.used_sets: set[int] = set()
        self.used_kinds: set[int] = set()

    def access(self, x: Any) -> str:
        """What a value is in this function; of a parameter's in a loop over `leaf`."""
        if isinstance(x, str):
            return self.number(x)
        if isinstance(x, Gathered):
            return self.listed(x)
        if isinstance(x, Numbers):
            return self.per_leaf(x.value.constant)
        if x.role is not None:
            return self.role(x.role)
        if x in self.functions.homes:
            return self.role(self.functions.homes[x])
        if is_pick(x):
            return f"{self.access(x.args[0])}[{self.numbers_in(x.args[1].code)}]"
        name = self.functions.names[x]
        return name if x.kind is None else f'leaf.values["{name}"]'

    @staticmethod
    def role(role: Role) -> str:
        return {
            "param": "leaf.param",
            "grad": "leaf.grad",
            "state": f'leaf.state["{role.name}"]',
            "group": f'group["{role.name}"]',
            "live": f'rates["{key_of(role.name)}"]',
            "multiplier": 'rates["lr"]',
            "loss": "loss",
        }[role.kind]

    def number(self, name: str) -> str:
        if name == "shape":
            return "leaf.param.shape"
        what, _, k = name.rpartition("_")
        number = int(k)
        self.used_sets.add(number)
        if what in ("place", "offset"):
            return f"leaf.{what}s[{number}]"
        listed = f"set_{number}"
        return (
            f"len({listed})" if what == "count" else f"sum(leaf.param.numel() for leaf in {listed})"
        )

    def numbers_in(self, code: str) -> str:
        pattern = rf"\b(shape|(?:{'|'.join(_NAMES)})_\d+)\b"
        return re.sub(pattern, lambda match: self.number(match.group()), code)

    def choose(self, by_kind: dict[int, str]) -> str:
        """The text for the kind of `leaf`."""
        texts = list(dict.fromkeys(by_kind.values()))
        found = texts[-1]
        for text in texts[-2::-1]:
            kinds = tuple(kind for kind, own in by_kind.items() if own == text)
            found = f"{text} if leaf.kind in {kinds!r} else {found}"
        return found

    def listed(self, x: Gathered) -> str:
        self.used_sets.add(x.set)
        found = self.choose({kind: self.access(v) for kind, v in x.values.items()})
        return f"[{found} for leaf in set_{x.set}]"

    def per_leaf(self, x: PerLeaf) -> str:
        self.used_sets.add(x.set)
        texts = {
            kind: self.numbers_in(code.code) if isinstance(code, Expression) else repr(code)
            for kind, code in x.codes.items()
        }
        return f"[{self.choose(texts)} for leaf in set_{x.set}]"

    def lines(self, name: str, store: Callable[[int | None, str, Value, str], str]) -> list[str]:
        """The whole function; `store` writes a result."""
        body: list[str] = []
        for function in self.functions.functions:
            body += self.calls(function)
        left = updates_left(self.functions)
        snapshots, finals = self.finals(left, store)
        starts = [
            f"set_{k} = _placed(leaves, {tuple(sorted(self.sets[k]))!r}, {k})"
            for k in sorted(self.used_sets)
        ]
        starts += [
            f"kind_{k} = [leaf for leaf in leaves if leaf.kind == {k}]"
            for k in sorted(self.used_kinds)
        ]
        text = [*starts, *snapshots, *body, *finals]
        if any("device" in line for line in text):
            text.insert(0, "device = leaves[0].param.device")
        loss = ", rates: Mapping[str, Tensor], loss: Tensor" if name == "_step" else ""
        head = f"def {name}(leaves: Sequence[_Leaf], group: dict[str, Tensor]{loss}) -> None:"
        deleted = [n for n in ("group", "rates", "loss") if n in head and not _mentions(text, n)]
        if deleted:
            text.insert(0, f"del {', '.join(deleted)}")
        return [head, *(f"    {line}" for line in text)]

    def calls(self, function: Function) -> list[str]:
        text = FunctionText(self.functions, function)
        arguments = [
            f"{self.access(x)}.item()"
            if isinstance(x, Value) and x in text.floats
            else self.access(x)
            for x in function.inputs
        ]
        arguments += [self.role(role) for role in missing_olds(function)]
        if text.uses_device():
            arguments.append("device")
        if function.kind is None:
            outputs = [self.functions.names[v] for v in function.outputs]
            return call(f"{', '.join(outputs)} = {function.name}", arguments)
        self.used_kinds.add(function.kind)
        names = [self.functions.names[v] for v in function.outputs]
        if not function.in_batches:
            target = ", ".join(f'leaf.values["{name}"]' for name in names)
            head = f"{target} = {function.name}" if names else function.name
            return [f"for leaf in kind_{function.kind}:", *call(head, arguments, indent="    ")]
        arguments = [_of_batch(text) for text in arguments]
        head = [f"for batch in _batches(kind_{function.kind}):"]
        if not function.in_parts:
            if not names:
                return [*head, *call(function.name, arguments, indent="    ")]
            made = call(f"results = {function.name}", arguments, indent="    ")
            return [*head, *made, f"    _keep(batch, {tuple(names)!r}, results)"]
        target, cut, arguments = self.parts(function, text, arguments)
        if not names:
            loop = call(f"for {target} in _parts", cut, ":", "    ")
            return [*head, *loop, *call(function.name, arguments, indent="        ")]
        each = f"{function.name}({', '.join(arguments)}) for {target} in parts"
        return [
            *head,
            *call("parts = _parts", cut, indent="    "),
            "    results = _total(",
            f"        {each}",
            "    )",
            f"    _keep(batch, {tuple(names)!r}, results)",
        ]

    def parts(
        self, function: Function, text: FunctionText, arguments: list[str]
    ) -> tuple[str, list[str], list[str]]:
        """What the parts of a batch's tensors are called, what is cut, and the arguments for a part."""
        arrays = [isinstance(x, Value) and value_of(x.node).ndim > 0 for x in function.inputs]
        arrays += [True] * (len(arguments) - len(arrays))
        names = [p.partition(":")[0] for p in text.parameters()]
        cut = [n for n, is_array in zip(names, arrays, strict=True) if is_array]
        given = [a for a, is_array in zip(arguments, arrays, strict=True) if is_array]
        passed = [
            n if is_array else f"{cut[0]}.shape" if n == "shape" else a
            for n, a, is_array in zip(names, arguments, arrays, strict=True)
        ]
        return f"{cut[0]}," if len(cut) == 1 else ", ".join(cut), given, passed

    def finals(
        self, left: Sequence[tuple[int | None, str, Value]], store: Callable[..., str]
    ) -> tuple[list[str], list[str]]:
        """What is kept of inputs before the step, and what is written after it."""
        snapshots: list[str] = []
        finals: list[str] = []
        for kind, name, value in left:
            own = "leaf." if kind is not None else "group["
            text = self.access(value)
            role = value.role
            if role is not None and role.kind in ("param", "state", "group"):
                if role.kind == "group" and kind is None and role.name == name:
                    continue
                if (
                    role.kind != "group"
                    and (role.kind == "param") == (name == "")
                    and role.name == name
                ):
                    continue
                kept = (
                    f'leaf.values["old {role.name}"]'
                    if role.kind != "group"
                    else f"old_{role_name(role)}"
                )
                line = f"{kept} = {text}.clone()"
                if role.kind != "group":
                    assert kind is not None
                    self.used_kinds.add(kind)
                    snapshots += [f"for leaf in kind_{kind}:", f"    {line}"]
                else:
                    snapshots.append(line)
                text = kept
            line = store(kind, name, value, text)
            del own
            if kind is None:
                finals.append(line)
            else:
                self.used_kinds.add(kind)
                finals += [f"for leaf in kind_{kind}:", f"    {line}"]
        return snapshots, _merged(finals)


def _of_batch(text: str) -> str:
    """What a text for `leaf` is for a batch."""
    if text == "leaf.param.shape":
        return "batch[0].param.shape"
    return f"_each({text} for leaf in batch)" if _mentions([text], "leaf") else text


def _merged(lines: list[str]) -> list[str]:
    """Loops over the same, one after the other, as one."""
    found: list[str] = []
    last = ""
    for line in lines:
        if line.startswith("for "):
            if line == last:
                continue
            last = line
        elif not line.startswith("    "):
            last = ""
        found.append(line)
    return found


def _mentions(lines: Sequence[str], word: str) -> bool:
    return any(re.search(rf"\b{word}\b", line) for line in lines)
