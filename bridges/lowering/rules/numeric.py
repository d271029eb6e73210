"""Rules for reductions, scans along an axis, matrix products, linear algebra, bits, randomness."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.arrays import MASKS, torch_dtype
from chainrule.bridges.lowering.builder import Builder, Equation, Full, Rule, Value, scalar


def _axes(eqn: Equation) -> tuple[int, ...]:
    return tuple(int(a) for a in eqn.params["axes"])


def _sum(b: Builder, eqn: Equation, x: Value) -> Value:
    aval, node = eqn.outvars[0].aval, b.tensor(x, eqn.invars[0].aval)
    if not _axes(eqn):
        return node
    # float16 and bfloat16 accumulate in float32 on every torch device, as in XLA
    return b.wrap(b.emit(torch.sum, node, _axes(eqn), dtype=torch_dtype(aval.dtype)), aval)


def _prod(b: Builder, eqn: Equation, x: Value) -> Value:
    node = b.tensor(x, eqn.invars[0].aval)
    return b.wrap(b.emit(ops.reduce_prod, node, _axes(eqn)), eqn.outvars[0].aval)


def _extremum(target: Any, sign: int) -> Rule:
    def rule(b: Builder, eqn: Equation, x: Value) -> Value:
        aval, out, axes = eqn.invars[0].aval, eqn.outvars[0].aval, _axes(eqn)
        node = b.tensor(x, aval)
        if not axes:
            return node
        if any(aval.shape[a] == 0 for a in axes):  # of no elements: the neutral one
            neutral = scalar(-sign * math.inf, out.dtype) if _floating(out) else _limit(out, -sign)
            return Full(neutral, out) if out.shape else neutral
        if aval.dtype == np.bool_:
            return b.emit(torch.any if sign > 0 else torch.all, node, axes)
        return b.emit(target, node, axes)

    return rule


def _floating(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, np.floating)


def _limit(aval: Any, sign: int) -> int | bool:
    """The lowest or highest value of an integer or bool dtype."""
    if aval.dtype == np.bool_:
        return sign > 0
    info = np.iinfo(aval.dtype)
    return int(info.max if sign > 0 else info.min)


def _logical(target: Any) -> Rule:
    def rule(b: Builder, eqn: Equation, x: Value) -> Value:
        if eqn.invars[0].aval.dtype != np.bool_:
            raise b.unsupported(eqn, "of integers")
        node = b.tensor(x, eqn.invars[0].aval)
        return b.emit(target, node, _axes(eqn)) if _axes(eqn) else node

    return rule


def _arg_extremum(target: Any) -> Rule:
    def rule(b: Builder, eqn: Equation, x: Value) -> Value:
        aval = eqn.invars[0].aval
        node = b.tensor(x, aval)
        if aval.dtype == np.bool_:
            node = b.emit(torch.Tensor.to, node, torch.int8)
        (axis,) = _axes(eqn)
        index = b.emit(target, node, axis)
        dtype = torch_dtype(eqn.params["index_dtype"])
        return index if dtype == torch.int64 else b.emit(torch.Tensor.to, index, dtype)

    return rule


def _cumulative(function: Any) -> Rule:
    def rule(b: Builder, eqn: Equation, x: Value) -> Value:
        node = b.tensor(x, eqn.invars[0].aval)
        p = eqn.params
        node = b.emit(function, node, int(p["axis"]), bool(p["reverse"]))
        return b.wrap(node, eqn.outvars[0].aval)

    return rule


def _dot_general(b: Builder, eqn: Equation, x: Value, y: Value) -> Value:
    left, right = (b.tensor(v, a.aval) for v, a in zip((x, y), eqn.invars, strict=True))
    (contract, batch), out = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    avals = [v.aval for v in eqn.invars]
    if out.dtype.name in MASKS:
        raise b.unsupported(eqn, f"of {out.dtype}")
    dtype = torch_dtype(out.dtype)
    given = {torch_dtype(a.dtype) for a in avals}
    same = given == {dtype}
    ranks = [len(a.shape) for a in avals]
    if len(given) == 1 and not batch[0] and ranks == [2, 2] and len(contract[0]) == 1:
        if contract[0][0] == 0:
            left = b.emit(torch.t, left)
        if contract[1][0] == 1:
            right = b.emit(torch.t, right)
        if same:
            return b.emit(torch.mm, left, right)
        return b.emit(ops.wide_mm, left, right, *given, dtype)
    if same and ranks == [1, 1] and len(contract[0]) == 1:
        return b.emit(torch.dot, left, right)
    ints = [tuple(int(d) for d in dims) for dims in (*contract, *batch)]
    return b.emit(ops.dot_general, left, right, (ints[0], ints[1]), (ints[2], ints[3]), dtype)


# ---- linear algebra: the signs of singular and eigenvectors are LAPACK's, so may differ ----


def _matrix(b: Builder, eqn: Equation, x: Value) -> fx.Node:
    if eqn.params.get("subset_by_index") is not None or eqn.params.get("pivoting"):
        raise b.unsupported(eqn, "of a subset or with pivoting")
    return b.tensor(x, eqn.invars[0].aval)


def _svd(b: Builder, eqn: Equation, x: Value) -> Sequence[Value]:
    node = _matrix(b, eqn, x)
    if not eqn.params["compute_uv"]:
        return [b.emit(ops.singular_values, node)]
    return b.items(b.emit(ops.svd, node, bool(eqn.params["full_matrices"])), 3)


def _qr(b: Builder, eqn: Equation, x: Value) -> Sequence[Value]:
    mode = "complete" if eqn.params["full_matrices"] else "reduced"
    return b.items(b.emit(torch.linalg.qr, _matrix(b, eqn, x), mode), 2)


def _eigh(b: Builder, eqn: Equation, x: Value) -> Sequence[Value]:
    return b.items(b.emit(ops.eigh, _matrix(b, eqn, x), bool(eqn.params["lower"])), 2)


def _cholesky(b: Builder, eqn: Equation, x: Value) -> Value:
    return b.emit(ops.cholesky, _matrix(b, eqn, x))


def _triangular_solve(b: Builder, eqn: Equation, x: Value, y: Value) -> Value:
    left, right = (b.tensor(v, a.aval) for v, a in zip((x, y), eqn.invars, strict=True))
    names = ("left_side", "lower", "transpose_a", "conjugate_a", "unit_diagonal")
    return b.emit(ops.triangular_solve, left, right, *(bool(eqn.params[n]) for n in names))


# ---- bits and randomness -----------------------------------------------------------------


def _bitcast(b: Builder, eqn: Equation, x: Value) -> Value:
    """Reinterpret the bits; between widths the last axis splits or joins, as in XLA."""
    old, new = eqn.invars[0].aval, eqn.outvars[0].aval
    node = b.tensor(x, old)
    words = {"uint16": torch.int16, "uint32": torch.int32}
    if old.dtype.name in words:  # held wider: back to the true width first
        node = b.emit(torch.Tensor.to, node, words[old.dtype.name])
    if new.dtype.itemsize < old.dtype.itemsize:
        node = b.emit(torch.unsqueeze, node, -1)
    node = b.emit(torch.Tensor.view, node, words.get(new.dtype.name, torch_dtype(new.dtype)))
    if new.dtype.itemsize > old.dtype.itemsize:
        node = b.emit(torch.squeeze, node, -1)
    if new.dtype.name in words:
        node = b.wrap(b.emit(torch.Tensor.to, node, torch_dtype(new.dtype)), new)
    return node


def _threefry(b: Builder, eqn: Equation, *operands: Value) -> Sequence[Value]:
    words = [b.tensor(x, v.aval) for x, v in zip(operands, eqn.invars, strict=True)]
    return b.items(b.emit(ops.threefry2x32, *words), 2)


@functools.cache
def _expanded(impl: Any, method: str, shapes: tuple[tuple[int, ...], ...], *static: Any) -> Any:
    """The jaxpr of a PRNG implementation's method on raw uint32 keys, mapped over batch axes."""

    def call(*operands: Any) -> Any:
        return getattr(impl, method)(*operands, *static)

    mapped = call
    for _ in shapes[0]:
        mapped = jax.vmap(mapped)
    raw = () if method == "seed" else impl.key_shape
    structs = [jax.ShapeDtypeStruct((*shapes[0], *raw), jnp.uint32)]
    structs += [jax.ShapeDtypeStruct(s, jnp.uint32) for s in shapes[1:]]
    return jax.make_jaxpr(mapped)(*structs)


def _random(b: Builder, eqn: Equation, method: str, *args: Value, static: Any = ()) -> Value:
    avals = [v.aval for v in eqn.invars]
    if len({a.shape for a in avals}) > 1:
        raise b.unsupported(eqn, "of keys and data of different shapes")
    impl = avals[0].dtype._impl
    closed = _expanded(impl, method, tuple(tuple(a.shape) for a in avals), *static)
    nodes = [b.tensor(x, a) for x, a in zip(args, avals, strict=True)]
    return b.inline(closed.jaxpr, closed.consts, nodes)[0]


def _random_bits(b: Builder, eqn: Equation, key: Value) -> Value:
    p = eqn.params
    return _random(b, eqn, "random_bits", key, static=(p["bit_width"], tuple(p["shape"])))


def _random_split(b: Builder, eqn: Equation, key: Value) -> Value:
    return _random(b, eqn, "split", key, static=(tuple(eqn.params["shape"]),))


def _random_fold_in(b: Builder, eqn: Equation, key: Value, data: Value) -> Value:
    return _random(b, eqn, "fold_in", key, data)


def _random_seed(b: Builder, eqn: Equation, seed: Value) -> Value:
    aval = eqn.invars[0].aval
    if aval.shape:
        raise b.unsupported(eqn, "of an array of seeds")
    closed = jax.make_jaxpr(eqn.params["impl"].seed)(jax.ShapeDtypeStruct((), aval.dtype))
    return b.inline(closed.jaxpr, closed.consts, [seed])[0]


def _same(b: Builder, eqn: Equation, x: Value) -> Value:
    return b.tensor(x, eqn.invars[0].aval)


NUMERIC: dict[str, Rule] = {
    "argmax": _arg_extremum(torch.argmax),
    "argmin": _arg_extremum(torch.argmin),
    "bitcast_convert_type": _bitcast,
    "cholesky": _cholesky,
    "cumlogsumexp": _cumulative(ops.cumlogsumexp),
    "cummax": _cumulative(ops.cummax),
    "cummin": _cumulative(ops.cummin),
    "cumprod": _cumulative(ops.cumprod),
    "cumsum": _cumulative(ops.cumsum),
    "dot_general": _dot_general,
    "eigh": _eigh,
    "qr": _qr,
    "random_bits": _random_bits,
    "random_clone": _same,
    "random_fold_in": _random_fold_in,
    "random_seed": _random_seed,
    "random_split": _random_split,
    "random_unwrap": _same,
    "random_wrap": _same,
    "reduce_and": _logical(torch.all),
    "reduce_max": _extremum(torch.amax, 1),
    "reduce_min": _extremum(torch.amin, -1),
    "reduce_or": _logical(torch.any),
    "reduce_prod": _prod,
    "reduce_sum": _sum,
    "reduce_xor": _logical(ops.reduce_xor),
    "svd": _svd,
    "threefry2x32": _threefry,
    "triangular_solve": _triangular_solve,
}
