"""One operation as Python text, and the source of the helpers that it needs."""

import ast
import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch

from chainrule.bridges.export.errors import CannotExport
from chainrule.bridges.export.expressions import Expression
from chainrule.bridges.export.generic import Folded, Gathered, Value
from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.nodes import function_of, is_array, value_of
from chainrule.bridges.lowering.op_info import info

Name = Callable[[Any], str]
"""What a value or a list of values is called where a text stands."""

INFIX: dict[Any, str] = {
    torch.add: "+", torch.sub: "-", torch.mul: "*", torch.div: "/", torch.bitwise_and: "&", torch.bitwise_or: "|",
    torch.bitwise_xor: "^", torch.eq: "==", torch.ne: "!=", torch.lt: "<", torch.le: "<=", torch.gt: ">",
    torch.ge: ">=",
}  # fmt: skip
_WORDS = {
    "add": "total", "sub": "difference", "mul": "product", "div": "quotient", "rsub": "rest", "sqrt": "root",
    "rsqrt": "inverse_root", "pow": "power", "where": "chosen", "to": "cast", "abs": "size", "square": "square",
    "lerp": "average", "reshape": "reshaped", "broadcast_to": "spread", "getitem": "item", "sum": "total",
    "mm": "matrix", "dot_general": "matrix", "full": "constant", "neg": "negative", "stack": "vector",
    "isfinite": "finite", "reciprocal": "inverse", "maximum": "larger", "minimum": "smaller", "clone": "copy",
    "bitwise_and": "both", "bitwise_or": "either", "lt": "below", "gt": "above", "ge": "at_least", "le": "at_most",
    "eq": "equal", "ne": "differs", "threefry2x32": "random", "permute": "turned", "t": "transposed",
}  # fmt: skip


def is_own(function: Any) -> bool:
    """Whether a function is of this package, so that a file brings it."""
    return str(getattr(function, "__module__", "")).startswith("chainrule.")


def word_for(value: Value) -> str:
    """What a result may be called."""
    name = str(getattr(value.node.target, "__name__", "value")).strip("_")
    word = _WORDS.get(name, name if name.isidentifier() else "value")
    return f"{word}_value" if word in vars(ops) or is_own(value.node.target) else word


def literal(value: Any, name: Name) -> str:
    """An argument as text."""
    if isinstance(value, (Value, Gathered, Folded)):
        return name(value)
    if isinstance(value, Expression):
        return value.code
    if isinstance(value, (tuple, list)):
        inner = [literal(v, name) for v in value]
        if isinstance(value, list):
            return f"[{', '.join(inner)}]"
        return f"({inner[0]},)" if len(inner) == 1 else f"({', '.join(inner)})"
    if isinstance(value, slice):
        return (
            f"slice({', '.join(literal(x, name) for x in (value.start, value.stop, value.step))})"
        )
    if isinstance(value, float) and not math.isfinite(value):
        return "math.nan" if math.isnan(value) else "math.inf" if value > 0 else "-math.inf"
    if isinstance(value, torch.device):
        return "device"
    return repr(value)


def takes_numbers(value: Value) -> bool:
    """Whether the bridge runs an operation with numbers in the place of its 0-d operands."""
    batched, result = info(value.node).batched, value_of(value.node)
    if batched is None or not is_array(result) or set(value.kwargs) - batched.keywords:
        return False
    for key, arg in (*enumerate(value.args), *value.kwargs.items()):
        if not isinstance(arg, Value):
            if key == 0:
                return False
            continue
        own = value_of(arg.node)
        scalar = own.ndim == 0
        if own.dtype != result.dtype or (scalar and not _is_number(key, batched, value.kwargs)):
            return False
    return True


def _is_number(key: int | str, batched: Any, named: Any) -> bool:
    if key == 1 and batched.shares and not named:
        return True
    return key in (batched.number, "value", "alpha")


def number_operands(value: Value) -> list[Value]:
    """The 0-d operands that an operation takes as numbers."""
    if not takes_numbers(value):
        return []
    given = [*value.args, *value.kwargs.values()]
    return [x for x in given if isinstance(x, Value) and value_of(x.node).ndim == 0]


def expression(value: Value, name: Name) -> str:
    """The right side of the line that computes a value."""
    if value.args and isinstance(value.args[0], Folded):
        return literal(value.args[0], name)
    target = function_of(value.node)
    args = [literal(x, name) for x in value.args]
    named = [f"{key}={literal(x, name)}" for key, x in value.kwargs.items()]
    if not named and len(args) == 2 and any(isinstance(x, Value) for x in value.args):
        if target in INFIX:
            return f"{args[0]} {INFIX[target]} {args[1]}"
        if target is torch.rsub:
            return f"{args[1]} - {args[0]}"
    if target is torch.neg:
        return f"-{args[0]}"
    if target is operator.getitem or target is torch.Tensor.__getitem__:
        return f"{args[0]}[{args[1]}]"
    if target in (torch.Tensor.to, torch.Tensor.view):
        return f"{args[0]}.{target.__name__}({', '.join([*args[1:], *named])})"
    bare = [
        without_brackets(a) if isinstance(x, Value) else a
        for a, x in zip(args, value.args, strict=True)
    ]
    return f"{path_of(target)}({', '.join([*bare, *named])})"


def without_brackets(text: str) -> str:
    """A text without the brackets around all of it."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[1:-1] if i == len(text) - 1 and i else text
    return text


def in_place(value: Value, operand: int, name: Name) -> str:
    """The line that computes a value in the memory of an operand."""
    args = [literal(x, name) for x in value.args]
    args[0], args[operand] = args[operand], args[0]
    named = [f"{key}={literal(x, name)}" for key, x in value.kwargs.items()]
    method = f"{function_of(value.node).__name__}_"
    if method == "maximum_" or method == "minimum_":
        return f"torch.{method[:-1]}({', '.join(args)}, out={args[0]})"
    return f"{args[0]}.{method}({', '.join([*args[1:], *named])})"


def path_of(function: Any) -> str:
    """A function as a file that imports torch names it."""
    name = function.__name__
    if is_own(function):
        return name
    for prefix, module in (("torch", torch), ("torch.linalg", torch.linalg)):
        if getattr(module, name, None) is function:
            return f"{prefix}.{name}"
    raise CannotExport(
        f"export: no name for the function {function!r}; this is a defect of chainrule"
    )


def helpers(functions: Iterable[Any]) -> str:
    """The source of functions of this package, and of what they use of it."""
    found: dict[str, str] = {}
    for function in functions:
        _add(function.__name__, inspect.getmodule(function), found)
    return "\n\n".join(found.values())


def _add(name: str, module: Any, found: dict[str, str]) -> None:
    assert isinstance(module, ModuleType)
    source = inspect.getsource(module)
    statements = ast.parse(source).body
    homes: dict[str, Any] = {}
    for statement in statements:
        if isinstance(statement, ast.ImportFrom) and str(statement.module).startswith("chainrule."):
            homes |= dict.fromkeys(
                (a.name for a in statement.names), sys.modules[str(statement.module)]
            )
    for statement in statements:
        is_it = (isinstance(statement, ast.FunctionDef) and statement.name == name) or (
            isinstance(statement, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == name for t in statement.targets)
        )
        if not is_it or name in found:
            continue
        if isinstance(statement, ast.FunctionDef):
            statement.decorator_list = []  # such as the way to the kernel, which a file does not have
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id != name and node.id in vars(module):
                _add(node.id, homes.get(node.id, module), found)
        text = ast.get_source_segment(source, statement)
        assert text is not None
        found[name] = text
