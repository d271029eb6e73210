"""Rules for elementwise primitives.

Operands are nodes or Python scalars, at least one a node (``Builder`` folds the rest), and one
has the result's shape; torch broadcasts the others. Targets are plain ``torch`` functions where
those agree with XLA, so that later passes can recognise them; else functions of ``ops``.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.arrays import physical_shape, torch_dtype
from chainrule.bridges.lowering.builder import Builder, Equation, Full, Rule, Value
from chainrule.bridges.lowering.rules.dtypes import convert_element_type, reduce_precision
from chainrule.native.dtypes import is_key


def _is(aval: Any, kind: Any) -> bool:
    return not is_key(aval.dtype) and jnp.issubdtype(aval.dtype, kind)


def unary(target: Any) -> Rule:
    """The rule of a primitive that is one torch function of one tensor."""
    return lambda b, eqn, x: b.emit(target, x)


def _tensors(b: Builder, eqn: Equation, *operands: Value) -> list[fx.Node]:
    return [b.tensor(x, v.aval) for x, v in zip(operands, eqn.invars, strict=True)]


def binary(target: Any, wraps: bool = False) -> Rule:
    """The rule of a commutative torch function whose second argument may be a scalar."""

    def rule(b: Builder, eqn: Equation, x: Value, y: Value) -> Value:
        if not isinstance(x, fx.Node):
            x, y = y, x
        node = b.emit(target, x, y)
        return b.wrap(node, eqn.outvars[0].aval) if wraps else node

    return rule


def _mul(b: Builder, eqn: Equation, x: Value, y: Value) -> Value:
    if eqn.params.get("out_dtype") not in (None, eqn.invars[0].aval.dtype):
        raise b.unsupported(eqn, f"with out_dtype={eqn.params['out_dtype']}")
    return _product(b, eqn, x, y)


def compare(target: Any, mirrored: Any) -> Rule:
    """The rule of a comparison; a scalar on the left turns it round."""

    def rule(b: Builder, eqn: Equation, x: Value, y: Value) -> Value:
        return b.emit(target, x, y) if isinstance(x, fx.Node) else b.emit(mirrored, y, x)

    return rule


def strict(target: Any) -> Rule:
    """The rule of a torch function that takes tensors only."""
    return lambda b, eqn, *operands: b.emit(target, *_tensors(b, eqn, *operands))


def _sub(b: Builder, eqn: Equation, x: Value, y: Value) -> Value:
    node = b.emit(torch.sub, x, y) if isinstance(x, fx.Node) else b.emit(torch.rsub, y, x)
    return b.wrap(node, eqn.outvars[0].aval)


def _neg(b: Builder, eqn: Equation, x: Value) -> Value:
    return b.wrap(b.emit(torch.neg, x), eqn.outvars[0].aval)


def _div(b: Builder, eqn: Equation, x: Value, y: Value) -> Value:
    if not _is(eqn.outvars[0].aval, np.integer):
        if not isinstance(x, fx.Node) and x == 1:
            return b.emit(torch.reciprocal, y)
        return b.emit(torch.div, b.tensor(x, eqn.invars[0].aval), y)
    if not isinstance(y, fx.Node) and y not in (0, -1):
        return b.emit(torch.div, x, y, rounding_mode="trunc")
    return b.wrap(b.emit(ops.int_div, *_tensors(b, eqn, x, y)), eqn.outvars[0].aval)


def _rem(b: Builder, eqn: Equation, x: Value, y: Value) -> Value:
    integer = _is(eqn.outvars[0].aval, np.integer)
    if integer and (isinstance(y, fx.Node) or y in (0, -1)):
        return b.emit(ops.int_rem, *_tensors(b, eqn, x, y))
    return b.emit(torch.fmod, b.tensor(x, eqn.invars[0].aval), y)


def _extremum(tensors: Any, bound: Any) -> Rule:
    """max or min: NaN propagates; a bound on one side may be a scalar."""

    def rule(b: Builder, eqn: Equation, x: Value, y: Value) -> Value:
        if not isinstance(x, fx.Node):
            x, y = y, x
        ordered = _is(eqn.outvars[0].aval, np.integer) or _is(eqn.outvars[0].aval, np.floating)
        if not isinstance(y, fx.Node) and ordered and y == y:
            return b.emit(bound, x, y)
        return b.emit(tensors, x, b.tensor(y, eqn.invars[0].aval))

    return rule


def _clamp(b: Builder, eqn: Equation, low: Value, x: Value, high: Value) -> Value:
    if not isinstance(x, fx.Node) or isinstance(low, fx.Node) != isinstance(high, fx.Node):
        low, x, high = _tensors(b, eqn, low, x, high)
    return b.emit(torch.clamp, x, low, high)


def _pow(b: Builder, eqn: Equation, x: Value, y: Value) -> Value:
    base, exponent = (v.aval for v in eqn.invars)
    if isinstance(y, fx.Node) and base.dtype != exponent.dtype:
        y = b.emit(torch.Tensor.to, y, torch_dtype(base.dtype))
    return b.emit(torch.pow, x, y)


def _integer_pow(b: Builder, eqn: Equation, x: Value) -> Value:
    exponent, aval = eqn.params["y"], eqn.outvars[0].aval
    if exponent == 1:
        return x
    if exponent == 2:
        return b.wrap(b.emit(torch.square, x), aval)
    if exponent == -1:
        return b.emit(torch.reciprocal, x)
    return b.wrap(b.emit(torch.pow, x, exponent), aval)


def _square(b: Builder, eqn: Equation, x: Value) -> Value:
    return b.wrap(b.emit(torch.square, x), eqn.outvars[0].aval)


def _sign(b: Builder, eqn: Equation, x: Value) -> Value:
    aval = eqn.outvars[0].aval
    if _is(aval, np.complexfloating):
        return b.emit(torch.sgn, x)
    return b.emit(ops.sign if _is(aval, np.floating) else torch.sign, x)


def _not(b: Builder, eqn: Equation, x: Value) -> Value:
    return b.wrap(b.emit(torch.bitwise_not, x), eqn.outvars[0].aval)


def _round(b: Builder, eqn: Equation, x: Value) -> Value:
    away = int(eqn.params["rounding_method"]) == 0
    return b.emit(ops.round_away if away else torch.round, x)


def _shift(target: Any, plain: Any) -> Rule:
    """A shift; by a scalar within the width it is torch's own operator, where that agrees."""

    def rule(b: Builder, eqn: Equation, x: Value, n: Value) -> Value:
        aval = eqn.outvars[0].aval
        bits = np.iinfo(aval.dtype).bits
        known = not isinstance(n, fx.Node) and 0 <= int(np.real(n)) < bits
        if known and plain is not None and isinstance(x, fx.Node):
            return b.wrap(b.emit(plain, x, n), aval)
        if known and target is ops.shift_right_logical and _is(aval, np.unsignedinteger):
            return b.emit(torch.bitwise_right_shift, b.tensor(x, aval), n)
        return b.wrap(b.emit(target, *_tensors(b, eqn, x, n), bits), aval)

    return rule


def _population_count(b: Builder, eqn: Equation, x: Value) -> Value:
    return b.emit(ops.population_count, x, np.iinfo(eqn.outvars[0].aval.dtype).bits)


def _select(b: Builder, eqn: Equation, which: Value, *cases: Any) -> Value:
    values = list(cases)
    if is_key(eqn.outvars[0].aval.dtype) and eqn.invars[0].aval.shape:
        raise b.unsupported(eqn, "of typed PRNG keys one by one")
    if not isinstance(which, fx.Node) or len(cases) == 1:
        chosen = values[0 if isinstance(which, fx.Node) else int(np.real(which))]
        shape = eqn.outvars[0].aval.shape  # which the operands may have lost to a scalar
        if not isinstance(chosen, fx.Node):
            return Full(chosen, eqn.outvars[0].aval) if shape else chosen
        if physical_shape(chosen.meta["aval"]) == physical_shape(eqn.outvars[0].aval):
            return chosen
        return b.emit(torch.broadcast_to, chosen, shape)
    if not any(isinstance(x, fx.Node) for x in values):  # torch would give its default dtype
        values[0] = b.tensor(values[0], eqn.invars[1].aval)
    if _is(eqn.invars[0].aval, np.bool_):
        return b.emit(torch.where, which, values[1], values[0])
    out = values[-1]
    for i in reversed(range(len(values) - 1)):
        test = b.emit(torch.le, which, i)
        out = b.emit(torch.where, test, b.tensor(values[i], eqn.invars[1].aval), out)
    return out


def _identity(b: Builder, eqn: Equation, x: Value) -> Value:
    return x


_product: Rule = binary(torch.mul, wraps=True)

ELEMENTWISE: dict[str, Rule] = {
    "abs": unary(torch.abs),
    "acos": unary(torch.acos),
    "acosh": unary(torch.acosh),
    "add": binary(torch.add, wraps=True),
    "add_any": binary(torch.add, wraps=True),
    "and": binary(torch.bitwise_and),
    "asin": unary(torch.asin),
    "asinh": unary(torch.asinh),
    "atan": unary(torch.atan),
    "atan2": strict(torch.atan2),
    "atanh": unary(torch.atanh),
    "cbrt": unary(ops.cbrt),
    "ceil": unary(torch.ceil),
    "clamp": _clamp,
    "complex": strict(torch.complex),
    "conj": unary(torch.conj_physical),
    "convert_element_type": convert_element_type,
    "copy": _identity,
    "copy_p": _identity,
    "cos": unary(torch.cos),
    "cosh": unary(torch.cosh),
    "digamma": unary(torch.digamma),
    "div": _div,
    "eq": compare(torch.eq, torch.eq),
    "erf": unary(torch.erf),
    "erf_inv": unary(ops.erf_inv),
    "erfc": unary(torch.erfc),
    "exp": unary(torch.exp),
    "exp2": unary(torch.exp2),
    "expm1": unary(torch.expm1),
    "floor": unary(torch.floor),
    "ge": compare(torch.ge, torch.le),
    "gt": compare(torch.gt, torch.lt),
    "imag": unary(torch.imag),
    "integer_pow": _integer_pow,
    "is_finite": unary(torch.isfinite),
    "le": compare(torch.le, torch.ge),
    "lgamma": unary(torch.lgamma),
    "log": unary(torch.log),
    "log1p": unary(torch.log1p),
    "logistic": unary(torch.sigmoid),
    "lt": compare(torch.lt, torch.gt),
    "max": _extremum(torch.maximum, torch.clamp_min),
    "min": _extremum(torch.minimum, torch.clamp_max),
    "mul": _mul,
    "ne": compare(torch.ne, torch.ne),
    "neg": _neg,
    "nextafter": strict(torch.nextafter),
    "not": _not,
    "or": binary(torch.bitwise_or),
    "population_count": _population_count,
    "pow": _pow,
    "real": unary(torch.real),
    "reduce_precision": reduce_precision,
    "rem": _rem,
    "round": _round,
    "rsqrt": unary(torch.rsqrt),
    "select_n": _select,
    "shift_left": _shift(ops.shift_left, torch.bitwise_left_shift),
    "shift_right_arithmetic": _shift(ops.shift_right_arithmetic, torch.bitwise_right_shift),
    "shift_right_logical": _shift(ops.shift_right_logical, None),
    "sign": _sign,
    "sin": unary(torch.sin),
    "sinh": unary(torch.sinh),
    "sqrt": unary(torch.sqrt),
    "square": _square,
    "stop_gradient": _identity,
    "sub": _sub,
    "tan": unary(torch.tan),
    "tanh": unary(torch.tanh),
    "xor": binary(torch.bitwise_xor),
}
