"""Numbers that depend on the shapes: found as expressions of them, by their values for several parameters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from chainrule.bridges.export.errors import Unlike
from chainrule.bridges.lowering.passes.simplify import key_of


class Expression(NamedTuple):
    """Python code for a number or a tuple, in terms of `names`."""

    code: str
    names: frozenset[str]
    """Of `shape`; `place_k`, `offset_k` (a leaf's position among those of set k, and the elements before it);
    `count_k`, `size_k` (leaves and elements of set k)."""


class Where(NamedTuple):
    """One parameter, or all of a list, that an expression is evaluated for."""

    shape: tuple[int, ...] | None
    """None: what is evaluated is no single parameter's."""
    numbers: Mapping[str, int]
    """Values of the other names."""


def expression_of(values: Sequence[Any], places: Sequence[Where]) -> Any:
    """The constant that `values` all are, or an expression that has these values at these places.

    Raises:
      Unlike: there is none.
    """
    if len({key_of(value) for value in values}) == 1:
        return values[0]
    first = values[0]
    kinds = {type(value) for value in values}
    if all(isinstance(value, (tuple, list)) for value in values):
        return _of_tuples([tuple(value) for value in values], places)
    if kinds == {slice}:
        parts = [expression_of(p, places) for p in zip(*map(_parts, values), strict=True)]
        return slice(*parts)
    if kinds <= {int, float} and not any(isinstance(v, bool) for v in values):
        for found in _numbers(values, places):
            return found
    raise Unlike(f"{first!r} here and {values[-1]!r} there")


def _parts(value: slice) -> tuple[Any, Any, Any]:
    return value.start, value.stop, value.step


def _of_tuples(values: Sequence[tuple[Any, ...]], places: Sequence[Where]) -> Any:
    if len({len(value) for value in values}) == 1:
        try:
            return tuple(expression_of(column, places) for column in zip(*values, strict=True))
        except Unlike:
            pass
    for code in _TUPLES:
        if _holds(code, values, places):
            return Expression(code, frozenset({"shape"}))
    raise Unlike(f"{values[0]} here and {values[-1]} there")


_TUPLES = (
    "tuple(shape)",
    "tuple(range(len(shape)))",
    "(1,) * len(shape)",
    "(0,) * len(shape)",
    "(math.prod(shape),)",
    "tuple(shape[:-1])",
    "tuple(shape[1:])",
    "(*shape[:-1], 1)",
    "(1, *shape[1:])",
    "tuple(shape[::-1])",
    "tuple(range(len(shape)))[::-1]",
    "(*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)",
    "tuple(range(len(shape) - 1))",
    "tuple(range(1, len(shape)))",
)
_SIZES = (
    "math.prod(shape)", "len(shape)", "shape[0]", "shape[1]", "shape[2]", "shape[3]", "shape[-1]", "shape[-2]",
    "shape[-3]", "max(shape)", "min(shape)", "max(shape[-2:])", "min(shape[-2:])", "math.prod(shape[1:])",
    "math.prod(shape[:-1])", "math.prod(shape[2:])", "math.prod(shape[:-2])", "shape[-1] * shape[-2]",
    "len(shape) - 1", "len(shape) - 2",
)  # fmt: skip


def _evaluate(code: str, place: Where) -> Any:
    names: dict[str, Any] = {**place.numbers, "math": math, "_float32": _float32}
    if place.shape is not None:
        names["shape"] = place.shape
    try:
        return eval(code, {"__builtins__": _BUILTINS}, names)
    except (NameError, IndexError, ValueError, ZeroDivisionError, OverflowError):
        return None


_BUILTINS = {
    "tuple": tuple, "range": range, "len": len, "max": max, "min": min, "float": float, "reversed": reversed
}  # fmt: skip


def _float32(x: float) -> float:
    return float(np.float32(x))


def _holds(code: str, values: Sequence[Any], places: Sequence[Where]) -> bool:
    pairs = zip(values, places, strict=True)
    return all(key_of(_evaluate(code, place)) == key_of(value) for value, place in pairs)


def _numbers(values: Sequence[Any], places: Sequence[Where]) -> Iterator[Expression]:
    """Expressions with these values, the simplest first."""
    shared = [name for name in places[0].numbers if all(name in p.numbers for p in places)]
    sizes = [*shared, *(_SIZES if places[0].shape is not None else ())]
    if all(isinstance(value, int) for value in values):
        for code in (
            *sizes,
            *(f"{name} - 1" for name in sizes),
            *(f"{name} + 1" for name in sizes),
        ):
            if _holds(code, values, places):
                yield Expression(code, _names(code))
        return
    for code in _reals(sizes):
        for form in (code, f"_float32({code})"):
            if _holds(form, values, places):
                yield Expression(form, _names(form))
            elif (factor := _factor(form, values, places)) is not None:
                for scaled in (f"{factor!r} * {form}", f"_float32({factor!r} * {code})"):
                    if _holds(scaled, values, places):
                        yield Expression(scaled, _names(scaled))


def _reals(sizes: Sequence[str]) -> Iterator[str]:
    for x in sizes:
        yield f"float({x})"
        yield f"1.0 / ({x})"
        yield f"math.sqrt({x})"
        yield f"1.0 / math.sqrt({x})"
        yield f"float(max({x}, 1))"
    pairs = [
        (x, y)
        for x in sizes
        for y in sizes
        if x != y and x.startswith(_DIMENSIONS) and y.startswith(_DIMENSIONS)
    ]
    for x, y in pairs:
        for quotient in (f"({x}) / ({y})", f"max(1.0, ({x}) / ({y}))"):
            yield quotient
            yield f"math.sqrt({quotient})"
            yield f"math.sqrt(_float32({quotient}))"


_DIMENSIONS = ("shape[", "math.prod(shape[", "max(", "min(")


def _factor(code: str, values: Sequence[Any], places: Sequence[Where]) -> float | None:
    """k where every value is about k times the code's."""
    found = [_evaluate(code, place) for place in places]
    if not all(isinstance(f, float) and f for f in found):
        return None
    ratios = [value / f for value, f in zip(values, found, strict=True)]
    if ratios[0] == 0 or max(abs(r / ratios[0] - 1) for r in ratios) > 1e-6:
        return None
    return _float32(ratios[0])


def _names(code: str) -> frozenset[str]:
    words = "".join(c if c.isalnum() or c == "_" else " " for c in code).split()
    return frozenset(
        w for w in words if w == "shape" or w.startswith(("place_", "offset_", "count_", "size_"))
    )
