"""What atoms and chains say of themselves, read from their signatures, docstrings and states."""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import re
import textwrap
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from chainrule import chains, transforms
from chainrule.transforms._checks import BOUNDS

_SIDE = 64
"""Side of the matrices on whose state `_state_bytes` solves for the bytes of a parameter, a tensor and the chain."""


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of an atom or chain."""

    name: str
    default: str
    """As Python writes it; empty where it must be given."""
    bounds: str
    """The interval of its values; empty where it is no number with bounds."""
    live: bool
    """Whether it is an array of the state that may be set between steps."""
    meaning: str
    """What the docstring says of it."""


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """How large a state is as it begins, for float32 matrices."""

    parameter: float
    tensor: float
    once: float

    def __str__(self) -> str:
        sizes = (f"{self.tensor:g} a tensor", self.tensor), (f"{self.once:g} once", self.once)
        return ", ".join(
            [f"{self.parameter:g} a parameter", *(text for text, size in sizes if size)]
        )


@dataclasses.dataclass(frozen=True)
class Entry:
    """An atom or a chain."""

    name: str
    kind: str
    """`"atom"` or `"chain"`."""
    summary: str
    """The first sentence of its docstring."""
    equations: str
    """An atom's update rule; empty for a chain, whose links have theirs."""
    links: list[list[str]]
    """A chain's links, each with its atom and equation; empty for an atom."""
    source: str
    departure: str
    """Where an atom differs from its source."""
    arguments: list[Argument]
    state: list[tuple[str, str]]
    """The fields of an atom's state, and what they are."""
    reads: list[str]
    """What an atom takes from the chain by name, beside the updates."""
    state_bytes: StateBytes
    presets: dict[str, dict[str, str]]
    """For each preset, the arguments that it changes and their values."""


def sections(doc: str) -> tuple[str, dict[str, str]]:
    """A docstring's text up to its first section, and its sections by title, dedented; examples have no title.

    >>> sections("Doubles.\\n\\nArgs:\\n  x: a number.\\n\\n>>> 1\\n1\\n")
    ('Doubles.', {'Args': 'x: a number.', '': '>>> 1\\n1'})
    """
    text, found = "", {}
    parts = re.split(
        r"^(Args|Returns|Raises|References):\n|^(?=>>> )", doc.strip(), flags=re.MULTILINE
    )
    text = parts[0].strip()
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        key = title or ""
        body = textwrap.dedent(body).strip()
        found[key] = f"{found[key]}\n{body}" if key in found else body
    return text, found


def entries(section: str) -> dict[str, str]:
    """The entries `name: meaning` of a section, each on one line.

    >>> entries("b1: decay,\\n  in [0, 1).\\neps: added.")
    {'b1': 'decay, in [0, 1).', 'eps': 'added.'}
    """
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        match = re.match(r"(\*{0,2}\w+): (.*)", line)
        if match:
            name = match[1]
            found[name] = match[2]
        elif name:
            found[name] += f" {line.strip()}"
    return found


def table(doc: str) -> list[list[str]]:
    """The cells of a docstring's table, its head first."""
    return [
        [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        for line in doc.splitlines()
        if line.startswith("|") and set(line) - set("|-")
    ]


def atoms() -> dict[str, Callable[..., Any]]:
    """The atoms by name: the functions of `chainrule.transforms` with a file of their own."""
    return {
        name: made
        for name in transforms.__all__
        if inspect.isfunction(made := getattr(transforms, name))
        and made.__module__ == f"chainrule.transforms.{name}"
    }


def found(text: str) -> tuple[str, str]:
    """The kind and name that `text` means: a chain, an atom, or `transforms.orthograd` for the atom of that name.

    Raises:
      ValueError: there is none.

    >>> found("stam"), found("orthograd"), found("transforms.orthograd")
    (('chain', 'stam'), ('chain', 'orthograd'), ('atom', 'orthograd'))
    >>> found("stem")
    Traceback (most recent call last):
      ...
    ValueError: no chain or atom 'stem'; did you mean 'stam'? `chainrule list` has all
    """
    room, _, name = text.rpartition(".")
    if name in chains.__all__ and room in ("", "chains"):
        return "chain", name
    if name in atoms() and room in ("", "transforms"):
        return "atom", name
    close = difflib.get_close_matches(text, [*chains.__all__, *atoms()], 1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"no chain or atom {text!r}; {meant}`chainrule list` has all")


@functools.cache
def entry(text: str) -> Entry:
    """What is known of the chain or atom that `text` names (see `found`)."""
    kind, name = found(text)
    factory = getattr(chains if kind == "chain" else transforms, name)
    module = inspect.getmodule(factory)
    assert module is not None
    body, parts = sections(inspect.getdoc(factory) or "")
    header = inspect.getdoc(module) or ""
    tx = example(factory)
    state = tx.init({"w": jnp.zeros((2, 2))})
    live = state.hyperparams if isinstance(state, transforms.LiveState) else {}
    known = {p.name: written(p.default) for p in inspect.signature(factory).parameters.values()}
    return Entry(
        name=name,
        kind=kind,
        summary=" ".join(body.partition("\n\n")[0].split()),
        equations=_equations(header) if kind == "atom" else "",
        links=table(body)[1:] if kind == "chain" else [],
        source=_source(header) if kind == "atom" else " ".join(parts["References"].split()),
        departure=_departure(header) if kind == "atom" else "",
        arguments=_arguments(factory, entries(parts["Args"]), live),
        state=_state_fields(module) if kind == "atom" else [],
        reads=_reads(module) if kind == "atom" else [],
        state_bytes=_state_bytes(tx),
        presets={
            preset: {a: _changed(v, known[a]) for a, v in arguments.items()}
            for preset, arguments in getattr(factory, "presets", {}).items()
        },
    )


def written(value: Any) -> str:
    """A value as Python code: of a dtype its name, of a dataclass the fields that are not its defaults.

    >>> written(jnp.float32), written(transforms.TierPolicy(rounding="half_even"))
    ('float32', "TierPolicy(rounding='half_even')")
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = type(value)()
        parts = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        given = [f"{name}={part!r}" for name, part in parts if part != getattr(plain, name)]
        return f"{type(value).__name__}({', '.join(given)})"
    return value.__name__ if isinstance(value, type(jnp.float32)) else repr(value)


def _changed(value: Any, default: str) -> str:
    same = isinstance(value, str) and value.startswith("`")
    return f"{value if same else written(value)} in place of {default}"


def example(factory: Callable[..., Any]) -> optax.GradientTransformation:
    """The simplest transformation that `factory` makes: around Adam where it wraps another."""
    required = [p for p in inspect.signature(factory).parameters.values() if p.default is p.empty]
    tiers = {2: transforms.scale_by_adam(), 1: optax.identity(), 0: optax.identity()}
    wraps = (
        chains.adam
        if factory.__module__.startswith("chainrule.chains")
        else transforms.scale_by_adam
    )
    return factory(*(tiers if p.name == "tiers" else wraps() for p in required))


def _arguments(
    factory: Callable[..., Any], meanings: Mapping[str, str], live: Mapping[str, Any]
) -> list[Argument]:
    made: list[Argument] = []
    for p in inspect.signature(factory).parameters.values():
        number = isinstance(p.default, (int, float)) and not isinstance(p.default, bool)
        bounds = BOUNDS.get(p.name)
        made.append(
            Argument(
                name=p.name,
                default="" if p.default is p.empty else written(p.default),
                bounds=str(bounds) if bounds and (number or p.default is None) else "",
                live=p.name in live,
                meaning=meanings[p.name],
            )
        )
    return made


def _equations(header: str) -> str:
    """The indented lines of a module's docstring, which are its update rule."""
    return "\n".join(line[4:] for line in header.splitlines() if line.startswith("    "))


def _sentence(header: str, start: str) -> str:
    match = re.search(rf"{start}(.*?)(?=\s(?:Departures?|Source)\b|\n\n|\Z)", header, re.DOTALL)
    return " ".join(match[1].split()) if match else ""


def _source(header: str) -> str:
    return _sentence(header, r"Source:\s")


def _departure(header: str) -> str:
    return _sentence(header, r"Departures?(?: from optax)?[:,] ?")


def _trees(module: types.ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def _state_fields(module: types.ModuleType) -> list[tuple[str, str]]:
    """The fields of the state class in an atom's file, each with the string that stands under it."""
    rows: list[tuple[str, str]] = []
    for node in _trees(module).body:
        if not isinstance(node, ast.ClassDef) or not node.name.endswith("State"):
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                rows.append(
                    (
                        ast.unparse(field.target),
                        " ".join(str(ast.literal_eval(below.value)).split()),
                    )
                )
    return rows


def _reads(module: types.ModuleType) -> list[str]:
    """The extra arguments that an atom's `update` names."""
    return [
        arg.arg
        for node in ast.walk(_trees(module))
        if isinstance(node, ast.FunctionDef) and node.name == "update"
        for arg in node.args.kwonlyargs
    ]


def _state_bytes(tx: optax.GradientTransformation) -> StateBytes:
    def size(tensors: int, side: int) -> int:
        params = {str(i): jax.ShapeDtypeStruct((_SIDE, side), jnp.float32) for i in range(tensors)}
        return sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params))
        )

    small, large, two = size(1, _SIDE), size(1, 2 * _SIDE), size(2, _SIDE)
    parameter = (large - small) / _SIDE**2
    tensor = two - small - parameter * _SIDE**2
    return StateBytes(parameter, tensor, small - tensor - parameter * _SIDE**2)
