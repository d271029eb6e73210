"""A chain from the text of a command line, such as `chains.stam(learning_rate=3e-4)`; nothing else is run."""

import ast
from typing import Any

import optax

import chainrule
from chainrule import chains, transforms
from chainrule.bridges.step.function import as_transformation

ROOTS = {"chains": chains, "transforms": transforms, "chainrule": chainrule, "optax": optax}


def chain_of(text: str) -> optax.GradientTransformation:
    """The chain that an expression makes: calls of public functions of chainrule and optax on literals and such calls.

    Raises:
      ValueError: it is no such expression, or makes no chain; the message says what may be written.

    >>> chain_of("optax.chain(optax.clip(1.0), chains.stam(3e-4))").init({}) is not None
    True
    >>> chain_of("__import__('os').system('true')")
    Traceback (most recent call last):
      ...
    ValueError: `__import__` in "__import__('os').system('true')" is none of chainrule, chains, optax, transforms; write
    a call such as chains.stam(learning_rate=3e-4)
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no expression: {error.msg}") from None
    made = _value(tree, text)
    try:
        return as_transformation(made)
    except TypeError as error:
        raise ValueError(f"{text!r} makes no chain: {error}") from None


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call):
        function = _named(node.func, text)
        args = [_value(arg, text) for arg in node.args]
        keywords = {k.arg: _value(k.value, text) for k in node.keywords if k.arg}
        return function(*args, **keywords)
    if isinstance(node, ast.Attribute):
        return _named(node, text)
    if isinstance(node, ast.Dict):
        keys = [ast.literal_eval(key) for key in node.keys if key]
        return dict(zip(keys, [_value(v, text) for v in node.values], strict=True))
    if isinstance(node, (ast.List, ast.Tuple)):
        return tuple(_value(item, text) for item in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(
            f"{ast.unparse(node)!r} in {text!r} is no literal; write numbers, strings, and calls such as "
            "chains.stam(learning_rate=3e-4)"
        ) from None


def _named(node: ast.expr, text: str) -> Any:
    """What a dotted name of one of the `ROOTS` stands for; nothing private."""
    names: list[str] = []
    inner = node
    while isinstance(inner, ast.Attribute):
        names.insert(0, inner.attr)
        inner = inner.value
    root = inner.id if isinstance(inner, ast.Name) else ast.unparse(inner)
    if root not in ROOTS or not names:
        source = inner.func if isinstance(inner, ast.Call) else inner
        raise ValueError(
            f"`{ast.unparse(source)}` in {text!r} is none of {', '.join(sorted(ROOTS))}; write a call such as "
            "chains.stam(learning_rate=3e-4)"
        )
    found: Any = ROOTS[root]
    for name in names:
        if name.startswith("_") or not hasattr(found, name):
            raise ValueError(f"`{ast.unparse(node)}` in {text!r}: {root} has no public {name!r}")
        found = getattr(found, name)
    owner = str(getattr(found, "__module__", "")).partition(".")[0]
    if owner not in ("chainrule", "optax"):
        raise ValueError(f"`{ast.unparse(node)}` in {text!r} is no function of chainrule or optax")
    return found
