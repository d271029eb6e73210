"""Element-wise jaxprs as C++: a function for each kind of tensor, which reads and writes memory once.

`supports` says which equations can be part of one. An operation means what it means to XLA, for NaN and infinities
too; bfloat16 is rounded after every operation, as the jaxpr says.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

TYPES = {
    "float32": "float",
    "bfloat16": "std::uint16_t",
    "bool": "bool",
    "int32": "std::int32_t",
}
"""The dtypes that loops have, and how they lie in memory; integers are numbers that become floats at once."""

HEADER = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif
static inline float from_bits(std::uint32_t bits) { float x; std::memcpy(&x, &bits, sizeof x); return x; }
static inline std::uint32_t to_bits(float x) { std::uint32_t bits; std::memcpy(&bits, &x, sizeof bits); return bits; }
static inline float widen(std::uint16_t half) { return from_bits(std::uint32_t{half} << 16); }
static inline std::uint16_t narrow(float x) {
  const std::uint32_t bits = to_bits(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
static inline float larger(float a, float b) { return a != a ? a : a > b ? a : b; }
static inline float smaller(float a, float b) { return a != a ? a : a < b ? a : b; }
static inline float sign(float a) { return a > 0 ? 1.0f : a < 0 ? -1.0f : a; }
static inline bool finite(float a) { return std::fabs(a) <= std::numeric_limits<float>::max(); }
"""

_EXPRESSIONS: dict[str, Callable[..., str]] = {
    "add": "{} + {}".format,
    "add_any": "{} + {}".format,
    "sub": "{} - {}".format,
    "mul": "{} * {}".format,
    "div": "{} / {}".format,
    "max": "larger({}, {})".format,
    "min": "smaller({}, {})".format,
    "neg": "-{}".format,
    "abs": "std::fabs({})".format,
    "sign": "sign({})".format,
    "sqrt": "std::sqrt({})".format,
    "rsqrt": "1.0f / std::sqrt({})".format,
    "square": "{0} * {0}".format,
    "is_finite": "finite({})".format,
    "lt": "{} < {}".format,
    "le": "{} <= {}".format,
    "gt": "{} > {}".format,
    "ge": "{} >= {}".format,
    "eq": "{} == {}".format,
    "ne": "{} != {}".format,
    "and": "{} & {}".format,
    "or": "{} | {}".format,
    "not": "!{}".format,
    "select_n": "{0} ? {2} : {1}".format,
    "clamp": "smaller(larger({1}, {0}), {2})".format,
}
_ROUNDED = {"add", "add_any", "sub", "mul", "div", "sqrt", "rsqrt", "square", "integer_pow"}
_SAME = {"broadcast_in_dim", "reshape", "squeeze", "copy", "copy_p", "stop_gradient"}
_OF_BOOLS = {"and", "or", "not", "eq", "ne", "select_n", *_SAME}
"""What may take booleans; of floats these are bits, and no loop has them."""
Equation = Any
"""`jax.extend.core.JaxprEqn`, whose values JAX types too widely: here all are arrays."""
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}
"""What has a program of its own, and the name of the parameter that it is."""


class Call(NamedTuple):
    """One tensor's loop: which kind, and its operands and results by their numbers in the jaxpr, results last."""

    kind: int
    operands: tuple[int, ...]
    results: tuple[int, ...]


class Loops(NamedTuple):
    """C++ with functions `loop_0`, `loop_1`, ..., and a call for each tensor."""

    source: str
    kinds: int
    calls: list[Call]


def is_tensor(v: Any) -> bool:
    return v.aval.size > 1


def inner(eqn: Equation) -> core.ClosedJaxpr:
    """The program of an equation that has one."""
    return eqn.params[CALLS[eqn.primitive.name]]


def supports(eqn: Equation) -> bool:
    """Whether a loop can do what the equation does: element by element, in the dtypes that loops have."""
    name = eqn.primitive.name
    if any(str(v.aval.dtype) not in TYPES for v in (*eqn.invars, *eqn.outvars)):
        return False
    if name in CALLS:
        return not inner(eqn).consts and all(map(supports, inner(eqn).eqns))
    if len({v.aval.size for v in (*eqn.invars, *eqn.outvars) if is_tensor(v)}) > 1:
        return False  # an axis of length 1 that stands for a longer one
    integers = [v for v in (*eqn.invars, *eqn.outvars) if v.aval.dtype == "int32"]
    if integers and (
        name != "convert_element_type" or integers != list(eqn.invars) or is_tensor(integers[0])
    ):
        return False
    if name in ("broadcast_in_dim", "reshape", "squeeze"):
        return len(eqn.invars) == 1  # a number for all elements, or the same ones in the same order
    is_of_bools = any(v.aval.dtype == bool for v in eqn.invars)
    if name == "select_n":
        return len(eqn.invars) == 3 and eqn.invars[0].aval.dtype == bool
    if name in ("and", "or", "not"):
        return is_of_bools
    if name in ("convert_element_type", "integer_pow") or name in _SAME:
        return True
    return name in _EXPRESSIONS and not (is_of_bools and name not in _OF_BOOLS)


def _power(x: str, y: int) -> str:
    """x to an integer: the square-and-multiply of lax.integer_pow."""
    if y < 0:
        return f"1.0f / ({_power(x, -y)})"
    factor, product = x, ""
    while y > 0:
        if y & 1:
            product = f"({product} * {factor})" if product else factor
        y >>= 1
        factor = f"({factor} * {factor})"
    return product or "1.0f"


def _literal(value: Any) -> str:
    if np.asarray(value).dtype == bool:
        return "true" if value else "false"
    single = float(np.float32(value))
    if np.isnan(single):
        return "std::numeric_limits<float>::quiet_NaN()"
    if np.isinf(single):
        return f"({'-' if single < 0 else ''}std::numeric_limits<float>::infinity())"
    return f"({single.hex()}f)"


class _Body:
    """The statements of one loop, with names that do not depend on which tensor it is for."""

    def __init__(self) -> None:
        self.names: dict[Any, str] = {}
        self.lines: list[str] = []

    def name(self, v: Any) -> str:
        return _literal(v.val) if isinstance(v, core.Literal) else self.names[v]

    def set(self, v: Any, expression: str) -> None:
        name = f"v{len(self.lines)}"
        kind = "bool" if v.aval.dtype == bool else "float"
        self.lines.append(f"const {kind} {name} = {expression};")
        self.names[v] = name

    def add(self, eqn: Equation) -> None:
        name, (out, *_) = eqn.primitive.name, eqn.outvars
        if name in CALLS:
            self._add_call(eqn)
        elif name in _SAME:
            self.names[out] = self.name(eqn.invars[0])
        else:
            expression = self._expression(eqn, [self.name(v) for v in eqn.invars])
            rounds = name in _ROUNDED or name == "convert_element_type"
            if str(out.aval.dtype) == "bfloat16" and rounds:
                expression = f"widen(narrow({expression}))"
            self.set(out, expression)

    def _expression(self, eqn: Equation, names: list[str]) -> str:
        if eqn.primitive.name == "integer_pow":
            return _power(names[0], eqn.params["y"])
        if eqn.primitive.name != "convert_element_type":
            return _EXPRESSIONS[eqn.primitive.name](*names)
        before, after = eqn.invars[0].aval.dtype == bool, eqn.outvars[0].aval.dtype == bool
        if before == after:
            return names[0]
        return f"{names[0]} ? 1.0f : 0.0f" if before else f"{names[0]} != 0"

    def _add_call(self, eqn: Equation) -> None:
        jaxpr = inner(eqn).jaxpr
        for v, outer in zip(jaxpr.invars, eqn.invars, strict=True):
            self.names[v] = self.name(outer)
        for each in jaxpr.eqns:
            self.add(each)
        results = [self.name(v) for v in jaxpr.outvars]
        self.names.update(zip(eqn.outvars, results, strict=True))


def _components(jaxpr: core.Jaxpr) -> list[list[Equation]]:
    """The equations of each tensor: those that tensors connect."""
    root: dict[Any, Any] = {}

    def find(v: Any) -> Any:
        while root.setdefault(v, v) is not v:
            root[v] = v = root[root[v]]
        return v

    tensors = [
        [v for v in (*e.invars, *e.outvars) if isinstance(v, core.Var) and is_tensor(v)]
        for e in jaxpr.eqns
    ]
    for vs in tensors:
        for v in vs[1:]:
            root[find(v)] = find(vs[0])
    found: dict[Any, list[Equation]] = {}
    for eqn, vs in zip(jaxpr.eqns, tensors, strict=True):
        found.setdefault(find(vs[0]), []).append(eqn)
    return list(found.values())


def _function(eqns: Sequence[Equation], operands: Sequence[Any], results: Sequence[Any]) -> str:
    """A C++ function without its name."""
    body, before, loads = _Body(), [], []
    for i, v in enumerate(operands):
        kind = TYPES[str(v.aval.dtype)]
        value = f"x{i}[i]" if is_tensor(v) else f"*static_cast<const {kind}*>(pointers[{i}])"
        value = f"widen({value})" if str(v.aval.dtype) == "bfloat16" else value
        if is_tensor(v):
            before.append(f"const auto* x{i} = static_cast<const {kind}*>(pointers[{i}]);")
        (loads if is_tensor(v) else before).append(f"const auto a{i} = {value};")
        body.names[v] = f"a{i}"
    for eqn in eqns:
        body.add(eqn)
    stores = []
    for i, v in enumerate(results):
        kind, value = TYPES[str(v.aval.dtype)], body.name(v)
        before.append(f"auto* y{i} = static_cast<{kind}*>(pointers[{len(operands) + i}]);")
        stores.append(
            f"y{i}[i] = {f'narrow({value})' if str(v.aval.dtype) == 'bfloat16' else value};"
        )
    inner = "\n    ".join([*loads, *body.lines, *stores])
    outer = "\n  ".join(before)
    return (
        "(void* const* pointers, std::int64_t begin, std::int64_t end) {\n  "
        f"{outer}\n  INDEPENDENT\n  for (std::int64_t i = begin; i < end; ++i) {{\n    {inner}\n  }}\n}}\n"
    )


def loops_of(jaxpr: core.Jaxpr) -> Loops:
    """The loops of a jaxpr without constants, all of whose equations are supported and make tensors."""
    number = {v: i for i, v in enumerate((*jaxpr.invars, *jaxpr.outvars))}
    kinds: dict[str, int] = {}
    calls = []
    for eqns in _components(jaxpr):
        made = [v for eqn in eqns for v in eqn.outvars]
        read = dict.fromkeys(v for e in eqns for v in e.invars if isinstance(v, core.Var))
        operands, results = [v for v in read if v not in made], [v for v in made if v in number]
        kind = kinds.setdefault(_function(eqns, operands, results), len(kinds))
        calls.append(
            Call(kind, tuple(number[v] for v in operands), tuple(number[v] for v in results))
        )
    functions = [f'extern "C" void loop_{i}{text}' for text, i in kinds.items()]
    return Loops(HEADER + "\n".join(functions), len(kinds), calls)
