"""Every primitive of the table, on ordinary and on awkward values, beside XLA.

A case is a JAX function and its arguments. Integers, booleans and bits must be equal; floats
agree within an error bound, with NaN and infinities in the same places: to a few units of each
entry, by the functions that the case calls (`bounds.units`), or within the bound of the case:
`added` for sums and products, `within` for what a factorisation gives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from jax.extend import core
from torch import Tensor, fx

import bounds
from chainrule.bridges.lowering import lower, to_jax, to_torch, torch_dtype
from chainrule.bridges.lowering.arrays import physical_shape
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.rules import TABLE
from chainrule.bridges.lowering.rules.elementwise import ELEMENTWISE
from chainrule.native.primitives import OPERATIONS
from chainrule.transforms._sharding import alike

INF, NAN = np.inf, np.nan
INT = np.iinfo(np.int32)

FLOATS = np.array(
    [-INF, -3.7, -2.5, -1.0, -0.5, -0.0, 0.0, 1e-6, 0.3, 0.5, 1.0, 2.5, 40.0, INF, NAN]
)
UNIT = np.array([-1.0, -0.999999, -0.5, -1e-4, 0.0, 1e-4, 0.3, 0.9, 1.0])
POSITIVE = np.array([1e-30, 1e-3, 0.5, 1.0, 1.5, 2.0, 9.7, 1e5])
INTS = np.array([INT.min, -7, -2, -1, 0, 1, 2, 7, 40, INT.max])
WORDS = np.array([0, 1, 2, 7, 31, 32, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
BOOLS = np.array([False, True, True, False])


def f32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def i32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.int32)


def u32(x: Any) -> jax.Array:
    return jnp.asarray(np.asarray(x, np.uint32))


def pairs(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every value against every value."""
    a, b = np.meshgrid(x, x, indexing="ij")
    return a.ravel(), b.ravel()


def matrix(*shape: int, seed: int = 0) -> jax.Array:
    return f32(np.random.default_rng(seed).normal(size=shape))


def both(fn: Callable[..., Any], x: np.ndarray, cast: Callable[[Any], jax.Array]) -> Any:
    """A binary function on all pairs, and with a Python scalar on either side."""
    a, b = pairs(x)
    scalar = cast(x[2]).item()

    def three(a: jax.Array, b: jax.Array) -> Any:
        constant = lax.full_like(a, scalar)
        return fn(a, b), fn(a, constant), fn(constant, b)

    return three, (cast(a), cast(b))


def _binary(fns: list[Callable[..., Any]], x: np.ndarray, cast: Any) -> list[Any]:
    return [both(fn, x, cast) for fn in fns]


class Case(NamedTuple):
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    allowed: Any = None
    """Largest difference in each entry of each result; None: by the units of the functions it calls."""


def added(terms: int, fn: Callable[..., Any], *args: jax.Array) -> Case:
    """Sums of at most so many products, held to the sums of the products' sizes."""
    sizes = jax.tree.leaves(fn(*(jnp.abs(x) for x in args)))
    return Case(fn, args, [2 * bounds.gamma(terms) * np.asarray(size) for size in sizes])


def within(bound: float, fn: Callable[..., Any], *args: jax.Array) -> Case:
    return Case(fn, args, bound)


def triangle(a: jax.Array, lower: bool, unit: bool) -> np.ndarray:
    half = np.tril(a) if lower else np.triu(a)
    return half - np.diag(np.diag(half)) + np.eye(len(half)) if unit else half


UNARY = [
    lax.abs, lax.acos, lax.acosh, lax.asin, lax.asinh, lax.atan, lax.atanh, lax.cbrt, lax.ceil,
    lax.cos, lax.cosh, lax.erf, lax.erf_inv, lax.erfc, lax.exp, lax.exp2, lax.expm1, lax.floor,
    lax.is_finite, lax.log, lax.log1p, lax.logistic, lax.neg, lax.rsqrt, lax.sign, lax.sin,
    lax.sinh, lax.sqrt, lax.square, lax.tan, lax.tanh,
]  # fmt: skip

TALL, SQUARE = matrix(4, 3), matrix(3, 3)
GRAM = SQUARE @ SQUARE.T
# The least gap between singular values, and to the zeros that complete a tall matrix.
GAP = -np.diff(np.linalg.svd(TALL, compute_uv=False), append=0.0).max()
DOMINANT = SQUARE + 3 * jnp.eye(3)

CASES: list[tuple[Any, ...]] = [
    *((fn, (f32(FLOATS),)) for fn in UNARY),
    *((fn, (f32(UNIT),)) for fn in UNARY),
    *((fn, (jnp.asarray(UNIT, jnp.bfloat16),)) for fn in UNARY if fn is not lax.cbrt),
    *((fn, (f32(POSITIVE),), bounds.near_zeros) for fn in (lax.lgamma, lax.digamma)),
    *((fn, (i32(INTS),)) for fn in (lax.abs, lax.neg, lax.sign, lax.square, lax.bitwise_not)),
    *((fn, (u32(WORDS),)) for fn in (lax.neg, lax.square, lax.bitwise_not, lax.population_count)),
    (lax.population_count, (i32(INTS),)),
    (lax.bitwise_not, (jnp.asarray(BOOLS),)),
    # binary, every pair
    *_binary([lax.add, lax.sub, lax.mul, lax.div, lax.rem, lax.max, lax.min], FLOATS, f32),
    *_binary([lax.eq, lax.ne, lax.lt, lax.le, lax.gt, lax.ge, lax.atan2], FLOATS, f32),
    *_binary([lax.add, lax.sub, lax.mul, lax.div, lax.rem, lax.max, lax.min], INTS, i32),
    *_binary([lax.eq, lax.lt, lax.ge, lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor], INTS, i32),
    *_binary([lax.add, lax.sub, lax.mul, lax.div, lax.rem, lax.max, lax.min], WORDS, u32),
    *_binary([lax.eq, lax.lt, lax.ge, lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor], WORDS, u32),
    *_binary([lax.shift_left, lax.shift_right_logical, lax.shift_right_arithmetic], INTS, i32),
    *_binary([lax.shift_left, lax.shift_right_logical], WORDS, u32),
    *_binary([lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor, lax.max, lax.min], BOOLS, jnp.asarray),
    *_binary([lax.pow], np.array([0.0, 0.5, 1.0, 2.5, INF]), f32),
    *_binary([lax.nextafter], np.array([-1.0, 0.0, 1.0, 1e-30]), f32),
    *((lambda x, n=n: lax.shift_right_logical(x, n), (i32(INTS),)) for n in (0, 1, 9, 31, 32)),
    *((lambda x, n=n: lax.shift_left(x, np.uint32(n)), (u32(WORDS),)) for n in (0, 1, 31, 32)),
    (lambda x, n: lax.pow(x, n), (f32([0.5, 2.0, 3.0]), i32([3, 2, -1]))),
    (lambda n: lax.pow(np.float32(0.9), n), (i32(5),)),
    *((lambda x, y=y: lax.integer_pow(x, y), (f32(FLOATS),)) for y in (-2, -1, 0, 1, 2, 3, 4)),
    (lambda x: lax.integer_pow(x, 3), (i32([-3, 2, 1000]),)),
    # conversions
    *(
        (lambda x, t=t: lax.convert_element_type(x, t), (f32([*FLOATS, 3e9, -3e9, 1e20, 300.0]),))
        for t in (jnp.int32, jnp.uint32, jnp.int8, jnp.uint8, jnp.uint16, jnp.bool_, jnp.bfloat16)
    ),
    *(
        (lambda x, t=t: lax.convert_element_type(x, t), (i32(INTS),))
        for t in (jnp.float32, jnp.uint32, jnp.int8, jnp.uint8, jnp.uint16, jnp.bool_, jnp.complex64)
    ),
    *(
        (lambda x, t=t: lax.convert_element_type(x, t), (u32(WORDS),))
        for t in (jnp.float32, jnp.int32, jnp.uint8, jnp.uint16, jnp.int16)
    ),
    (lambda x: lax.convert_element_type(x, jnp.uint32), (jnp.asarray(BOOLS),)),
    (lambda x: lax.bitcast_convert_type(x, jnp.uint32), (f32(FLOATS),)),
    (lambda x: lax.bitcast_convert_type(x, jnp.float32), (u32(WORDS[:7]),)),
    (lambda x: lax.bitcast_convert_type(x, jnp.uint8), (f32(FLOATS),)),
    (lambda x: lax.bitcast_convert_type(x, jnp.uint16), (jnp.asarray(UNIT, jnp.bfloat16),)),
    (lambda x: lax.bitcast_convert_type(x, jnp.int32), (jnp.asarray([[1, 2, 3, 255]], jnp.uint8),)),
    (lambda x: lax.reduce_precision(x, 8, 7), (f32([*FLOATS, 1 / 3, 1e30]),)),
    (lambda x: lax.reduce_precision(x, 5, 10), (f32([*FLOATS, 1 / 3, 1e30]),)),
    (lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), (f32([*FLOATS, 0.49999997]),)),
    (lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO), (f32([*FLOATS, 0.49999997]),)),
    # selection
    (lambda p, x, y: lax.select(p, x, y), (jnp.asarray(BOOLS), f32([1, 2, 3, 4]), f32([5, 6, 7, 8]))),
    (lambda p: jnp.where(p, 1.0, 2.0), (jnp.asarray(BOOLS),)),
    (lambda i, x: lax.select_n(i, x, x + 1, x + 2), (i32([0, 1, 2]), f32([1, 2, 3]))),
    (lambda x: lax.clamp(np.float32(-1), x, np.float32(0.4)), (f32(FLOATS),)),
    (lambda a, x: lax.clamp(a, x, a + 1), (f32(0.2), f32(FLOATS))),
    (lambda x: lax.clamp(np.uint32(3), x, np.uint32(2**31)), (u32(WORDS),)),
    # complex
    (lambda x, y: lax.complex(x, y), (f32([1, 2]), f32([3, 4]))),
    *(
        (fn, (jnp.asarray([1 + 2j, -3j, 0.0], jnp.complex64),))
        for fn in (lax.real, lax.imag, lax.conj, lax.abs, lax.sign, lax.exp, lax.square)
    ),
    (lambda z: lax.convert_element_type(z.real, jnp.int32), (jnp.asarray([1 + 2j], jnp.complex64),)),
    # shapes
    (lambda x: jnp.broadcast_to(x, (2, 3)), (f32(2.0),)),
    (lambda x: lax.broadcast_in_dim(x, (2, 3, 4), (0, 2)), (matrix(2, 4),)),
    (lambda x: lax.broadcast_in_dim(x, (2, 3, 4), (1, 2)), (matrix(1, 4),)),
    (lambda x: lax.expand_dims(x, (0, 2)), (matrix(3),)),
    (lambda x: lax.transpose(x, (2, 0, 1)), (matrix(2, 3, 4),)),
    (lambda x: lax.reshape(x, (4, 3)), (matrix(2, 6),)),
    (lambda x: lax.squeeze(x, (1,)), (matrix(2, 1, 3),)),
    (lambda x: lax.slice(x, (1, 0), (5, 3), (2, 1)), (matrix(6, 3),)),
    (lambda x: x[1:3, ::2], (matrix(4, 5),)),
    (lambda x: lax.rev(x, (0,)), (matrix(4, 2),)),
    (lambda x, y: lax.concatenate([x, y], 1), (matrix(2, 3), matrix(2, 1))),
    (lambda x, y: jnp.stack([x, y], 1), (matrix(2, 3), matrix(2, 3, seed=1))),
    (lambda x: lax.split(x, (1, 3), 0), (matrix(4, 2),)),
    *([(lambda x: lax.unstack(x, 1), (matrix(3, 2),))] if hasattr(lax, "unstack") else []),
    (lambda x: lax.pad(x, np.float32(7), ((1, 2, 0), (0, -1, 1))), (matrix(2, 3),)),
    (lambda x: lax.pad(x, x[0, 0], ((-1, 0, 2), (3, 0, 0))), (matrix(3, 2),)),
    (lambda x: x + jnp.arange(3), (f32(1.0),)),
    (lambda x: x + lax.broadcasted_iota(jnp.float32, (2, 3), 1), (f32(1.0),)),
    (lambda x: x + lax.broadcasted_iota(jnp.bfloat16, (2, 3), 0), (jnp.asarray(1, jnp.bfloat16),)),
    (lambda x: jnp.zeros((2, 2)).at[0].set(1.0) + x, (f32(1.0),)),
    (lambda x: jnp.concatenate([jnp.ones(2), x]).reshape(2, 2).T[:, ::-1], (f32([3, 4]),)),
    # indexing
    (lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 3)), (matrix(5, 3), i32(2))),
    (lambda x, i: lax.dynamic_slice(x, (i, i), (2, 2)), (matrix(5, 3), i32(9))),
    (lambda x, i: lax.dynamic_slice(x, (i, 1), (2, 2)), (matrix(5, 3), i32(-9))),
    (lambda x, y, i: lax.dynamic_update_slice(x, y, (i, 1)), (matrix(5, 3), matrix(2, 2), i32(4))),
    (lambda x, y: lax.dynamic_update_slice(x, y, ()), (f32(1.0), f32(2.0))),
    (lambda x, i: x[i], (matrix(4, 3), i32([[0, -1], [2, 3]]))),
    (lambda x, i: x.at[i].get(mode="fill"), (matrix(4, 3), i32([0, 9, -9]))),
    (lambda x, i: x.at[i].get(mode="fill", fill_value=5), (i32([1, 2, 3]), i32([0, 9]))),
    (lambda x, i: x.at[i].get(mode="fill"), (i32([1, 2, 3]), i32([0, 9]))),
    (lambda x, i: x.at[i].get(mode="clip"), (matrix(4, 3), i32([0, 9, -9]))),
    (lambda x, i: x[:, i, 1:], (matrix(2, 4, 3), i32([3, 0]))),
    (lambda x, i: jnp.take_along_axis(x, i, 1), (matrix(3, 4), i32([[0, 1], [3, 2], [1, 1]]))),
    (lambda x, i: jax.vmap(lambda a, j: a[j])(x, i), (matrix(3, 4), i32([1, 0, 3]))),
    (lambda x, i, y: x.at[i].set(y), (matrix(4, 3), i32([2, 0]), matrix(2, 3, seed=1))),
    (lambda x, i, y: x.at[i].set(y), (matrix(4, 3), i32([2, 9]), matrix(2, 3, seed=1))),
    within(
        # a third addend meets a sum of two
        bounds.gamma(4) * float(3 * jnp.abs(matrix(4, 3)).max() + 3 * jnp.abs(matrix(3, 3, seed=1)).max()),
        lambda x, i, y: x.at[i].add(y),
        matrix(4, 3),
        i32([2, 2, 9]),
        matrix(3, 3, seed=1),
    ),
    (lambda x, i, y: x.at[:, i].multiply(y), (matrix(4, 3), i32([2, 0]), matrix(4, 2, seed=1))),
    (lambda x, i, y: x.at[i].max(y), (matrix(4, 3), i32([2, 2]), matrix(2, 3, seed=1))),
    (lambda x, i, y: x.at[i].min(y), (matrix(4, 3), i32([-1, 2]), matrix(2, 3, seed=1))),
    (lambda x, i, y: x.at[i, 1].set(y, mode="clip"), (matrix(4, 3), i32([7, 2]), f32([1, 2]))),
    (lambda x, i: jax.vmap(lambda a, j: a.at[j].set(0.0))(x, i), (matrix(3, 4), i32([1, 0, 3]))),
    (lambda x, i: x.at[i].add(np.uint32(1)), (u32([2**32 - 1, 5]), i32([0, 1]))),
    # sorting
    (lambda x: lax.sort(x), (f32(FLOATS),)),
    (lambda x: lax.sort(x, dimension=0), (matrix(4, 3),)),
    (
        lambda a, b, c: lax.sort((a, b, c), num_keys=2),
        (i32([1, 0, 1, 0, 1]), f32([2, 5, 1, 5, 2]), i32([0, 1, 2, 3, 4])),
    ),
    (jnp.argsort, (f32([2, 1, 2, NAN, -1]),)),
    (lambda x: lax.top_k(x, 3), (f32([[2, 3, 3, 1], [NAN, 0, 0, 0]]),)),
    # reductions
    *(
        added(24, lambda x, fn=fn: (fn(x, axis=0), fn(x), fn(x, axis=(0, 2))), matrix(3, 4, 2))
        for fn in (jnp.sum, jnp.prod, jnp.max, jnp.min, jnp.mean)
    ),
    (lambda x: (jnp.max(x), jnp.min(x), jnp.sum(x), jnp.argmax(x), jnp.argmin(x)), (f32([1, NAN, 3]),)),
    (lambda x: (jnp.argmax(x), jnp.argmin(x)), (f32([1, 3, 3, 1, 1]),)),
    (lambda x: (jnp.argmax(x, 1), jnp.max(x), jnp.min(x)), (jnp.asarray([[False, True, True]]),)),
    (lambda x: (jnp.any(x, 0), jnp.all(x), jnp.any(x)), (jnp.asarray([[False, True], [True, True]]),)),
    *(
        (lambda x: (lax.reduce_max(x, (0,)), lax.reduce_min(x, (0, 1))), (jnp.zeros((0, 2), t),))
        for t in (jnp.float32, jnp.int32, jnp.bool_)
    ),
    (lambda x: lax.reduce_xor(x, (0,)), (jnp.asarray(BOOLS),)),
    (lambda x: (jnp.sum(x), jnp.prod(x), jnp.max(x)), (i32([INT.max, 5, -2]),)),
    (lambda x: jnp.sum(x), (u32(WORDS),)),
    # XLA may add bfloat16 in bfloat16, in an order of the processor: halves are exact in any.
    (lambda x: lax.reduce_sum(x, (0,)), (jnp.full((100,), 0.5, jnp.bfloat16),)),
    *(
        added(4, lambda x, fn=fn: (fn(x, 0, False), fn(x, 1, True)), matrix(3, 4))
        for fn in (lax.cumsum, lax.cumprod, lax.cummax, lax.cummin)
    ),
    # A logarithm of what is near 1 is off by as much as its argument.
    within(
        bounds.FUNCTION * (1 + float(jnp.abs(matrix(3, 4)).max())),
        lambda x: (lax.cumlogsumexp(x, 0, False), lax.cumlogsumexp(x, 1, True)),
        matrix(3, 4),
    ),
    (lambda x: lax.cumsum(x, 0), (i32([INT.max, 5, -2]),)),
    (lambda x: lax.cumsum(x, 0), (jnp.zeros((0,)),)),
    # products
    added(4, lambda x, y: x @ y, matrix(3, 4), matrix(4, 2)),
    added(4, lambda x, y: x.T @ y.T, matrix(4, 3), matrix(2, 4)),
    added(4, lambda x, y: jnp.einsum("bij,bkj->bik", x, y), matrix(2, 3, 4), matrix(2, 5, 4)),
    added(12, lambda x, y: jnp.einsum("ij,ij->", x, y), matrix(3, 4), matrix(3, 4, seed=1)),
    added(12, lambda x, y: jnp.tensordot(x, y, 2), matrix(2, 3, 4), matrix(3, 4, 5)),
    added(5, lambda x, y: jnp.vdot(x, y), matrix(5), matrix(5, seed=1)),
    added(1, lambda x, y: jnp.outer(x, y), matrix(5), matrix(3)),
    (lambda x, y: x @ y, (jnp.zeros((3, 0)), jnp.zeros((0, 2)))),
    added(
        4,
        lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32),
        matrix(3, 4).astype(jnp.bfloat16),
        matrix(4, 2).astype(jnp.bfloat16),
    ),
    (lambda x, y: x @ y, (i32([[1, 2], [3, 4]]), i32([[INT.max, 1], [1, 0]]))),
    # linear algebra, in forms that do not depend on the signs of vectors
    within(bounds.factorised(TALL), lambda x: jnp.linalg.svd(x, compute_uv=False), TALL),
    within(
        bounds.factorised(TALL),
        lambda x: (lambda u, s, v: (u * s) @ v)(*jnp.linalg.svd(x, full_matrices=False)),
        TALL.T,
    ),
    within(bounds.factorised(TALL, 1 / GAP), lambda x: jnp.abs(jnp.linalg.svd(x)[0]), TALL),
    (lambda x: jnp.linalg.svd(x, compute_uv=False), (matrix(2, 2).at[0, 0].set(NAN),)),
    within(bounds.factorised(SQUARE), lambda x: jnp.linalg.svd(x, compute_uv=False), jnp.stack([SQUARE, SQUARE * NAN])),
    (lambda x: x // jnp.uint32(0), (u32(WORDS),)),
    within(
        bounds.factorised(TALL, np.linalg.cond(TALL)),
        lambda x: tuple(jnp.abs(a) for a in jnp.linalg.qr(x)),
        TALL,
    ),
    within(
        bounds.factorised(GRAM),
        lambda x: (lambda w, v: (v * w) @ v.T)(*jnp.linalg.eigh(x @ x.T)),
        SQUARE,
    ),
    (lambda x: jnp.linalg.eigh(x)[0], (SQUARE.at[0, 0].set(NAN),)),
    within(
        bounds.factorised(GRAM + jnp.eye(3), np.linalg.cond(GRAM + jnp.eye(3))),
        lambda x: jnp.linalg.cholesky(x @ x.T + jnp.eye(3)),
        SQUARE,
    ),
    (lambda x: jnp.linalg.cholesky(x), (-jnp.eye(3),)),
    *(
        within(
            bounds.solved(triangle(DOMINANT, lower, unit), matrix(3, 3, seed=1)),
            lambda a, b, left=left, lower=lower, t=t, unit=unit: lax.linalg.triangular_solve(
                a, b, left_side=left, lower=lower, transpose_a=t, unit_diagonal=unit
            ),
            DOMINANT,
            matrix(3, 3, seed=1),
        )
        for left in (False, True)
        for lower in (False, True)
        for t in (False, True)
        for unit in (False, True)
    ),
    # control flow
    (lambda p, x: lax.cond(p > 0, jnp.sin, jnp.cos, x), (f32(1.0), matrix(3))),
    (lambda p, x: lax.cond(p > 0, jnp.sin, jnp.cos, x), (f32(-1.0), matrix(3))),
    *(
        (lambda i, x: lax.switch(i, [lambda y: y, lambda y: y * 2, jnp.sin], x), (i32(i), matrix(3)))
        for i in (-1, 0, 1, 2, 7)
    ),
    *(
        within(
            bounds.factorised(SQUARE),
            lambda p, x: lax.cond(
                p, lambda y: jnp.linalg.svd(y, compute_uv=False), lambda y: y[0], x
            ),
            jnp.asarray(p),
            SQUARE,
        )
        for p in (False, True)
    ),
    (lambda x: lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] * x), (0, x)), (f32(1.5),)),
    (lambda x: lax.fori_loop(0, 4, lambda i, y: y + i * x, x), (f32(1.5),)),
    (lambda x: lax.scan(lambda c, y: (c + y, c * y), f32(1.0), x), (f32([1, 2, 3]),)),
    (lambda x: lax.scan(lambda c, y: (c + y, c * y), f32(1.0), x, reverse=True), (f32([1, 2, 3]),)),
    (lambda x: lax.scan(lambda c, y: (c + y, (c, 1.0)), f32(1.0), x, reverse=True), (jnp.ones(3000),)),
    (lambda x: lax.scan(lambda c, y: (c + y, c * y), f32(1.0), x), (jnp.zeros((0,)),)),
    (lambda x: jax.nn.relu(x) + jax.nn.silu(x), (matrix(4),)),
    (lambda x: jax.grad(lambda y: jnp.sum(jnp.linalg.norm(y, axis=0)))(x), (matrix(3, 2),)),
    (lambda x: jax.checkpoint(jnp.sin)(x), (matrix(3),)),
    (lambda x: jax.named_call(jnp.sin, name="sine")(x), (matrix(3),)),
    (lambda x: lax.optimization_barrier((x, x + 1)), (matrix(3),)),
    (lambda x: alike(x, 2 * x), (matrix(3),)),
    (lambda x: lax.stop_gradient(x) * 2, (matrix(3),)),
    (lambda x: jnp.array(x, copy=True) + jax.device_put(x), (matrix(3),)),
    (lambda x: _custom(x), (matrix(3),)),
    # randomness: equal bits
    (lambda k: jax.random.split(k, 3), (jax.random.key(0),)),
    (lambda k: jax.random.split(k), (jax.random.PRNGKey(7),)),
    (lambda k: jax.random.bits(k, (3, 5)), (jax.random.key(1),)),
    (lambda k: jax.random.bits(k, (3,), jnp.uint8), (jax.random.key(1),)),
    (lambda k: jax.random.bits(k, (3,), jnp.uint16), (jax.random.key(1),)),
    (lambda k: jax.random.bits(k, (), jnp.uint32), (jax.random.key(2**31 + 5),)),
    (lambda k: jax.random.uniform(k, (4,)), (jax.random.key(3),)),
    (lambda k: jax.random.uniform(k, (4,), jnp.bfloat16), (jax.random.key(3),)),
    (lambda k: jax.random.normal(k, (50,)), (jax.random.key(4),)),
    (lambda k: jax.random.normal(k, (50,), jnp.bfloat16), (jax.random.key(4),)),
    (lambda k: jax.random.bernoulli(k, 0.3, (20,)), (jax.random.key(4),)),
    (lambda k: jax.random.rademacher(k, (20,)), (jax.random.key(4),)),
    (lambda k: jax.random.randint(k, (20,), -3, 9), (jax.random.key(4),)),
    (lambda k: jax.random.permutation(k, 6), (jax.random.key(4),)),
    (lambda k, n: jax.random.fold_in(k, n), (jax.random.key(4), i32(17))),
    (lambda n: jax.random.key(n), (i32(17),)),
    (lambda k: jax.random.key_data(k), (jax.random.key(5),)),
    (lambda k: jax.random.clone(k), (jax.random.key(5),)),
    (lambda k: jax.vmap(lambda one: jax.random.bits(one, (2,)))(k), (jax.random.split(jax.random.key(5), 3),)),
    (lambda k, p: lax.cond(p, lambda: k, lambda: jax.random.split(k)[1]), (jax.random.key(5), jnp.asarray(False))),
    (lambda k: jnp.stack(list(k))[::-1].reshape(1, 3).T, (jax.random.split(jax.random.key(5), 3),)),
    (lambda k, i: lax.dynamic_index_in_dim(k, i, keepdims=False), (jax.random.split(jax.random.key(5), 3), i32(1))),
]  # fmt: skip


@jax.custom_vjp
def _custom(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


_custom.defvjp(lambda x: (_custom(x), x), lambda x, g: (g * jnp.cos(x),))


def _primitives(jaxpr: core.Jaxpr) -> set[str]:
    found = {eqn.primitive.name for eqn in jaxpr.eqns}
    for eqn in jaxpr.eqns:
        for inner in core.jaxprs_in_params(eqn.params):
            found |= _primitives(inner)
    return found


class Recorded(fx.Interpreter):
    """Runs a graph, and asks of each operation whether the record of it is true."""

    def __init__(self, module: fx.GraphModule, *, elementwise: bool):
        super().__init__(module)
        self.elementwise = elementwise
        """Whether all that is run is so, but for what only makes a constant."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_function":
            return result
        record = info(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        given = [x for x in args if isinstance(x, Tensor)]
        assert record.elementwise or not self.elementwise or not given, n
        if isinstance(result, Tensor):
            memory = {x.untyped_storage().data_ptr() for x in given if x.numel()}
            shares = result.numel() > 0 and result.untyped_storage().data_ptr() in memory
            assert record.view or not shares, n
        shape = max((x.shape for x in given), key=len, default=torch.Size())
        if record.elementwise and all(x.ndim == 0 or x.shape == shape for x in given):
            self.assert_elementwise(n, args, kwargs, result)
        return result

    @staticmethod
    def assert_elementwise(n: fx.Node, args: Any, kwargs: Any, result: Any) -> None:
        """The same of tensors that are given flat, the last entry first."""

        def turned(x: Any) -> Any:
            return x.reshape(-1).flip(0) if isinstance(x, Tensor) and x.ndim else x

        function: Any = n.target
        for got, want in zip(
            *(
                x if isinstance(x, tuple) else (x,)
                for x in (function(*map(turned, args), **kwargs), result)
            ),
            strict=True,
        ):
            if want.is_floating_point() or want.is_complex():
                same = {"rtol": 4 * torch.finfo(want.dtype).eps, "atol": 0, "equal_nan": True}
                torch.testing.assert_close(got, turned(want), **same)
            else:
                assert torch.equal(got, turned(want)), n


IDS = [f"{i}-{getattr(case[0], '__name__', 'f')}" for i, case in enumerate(CASES)]

FAST = {"xla_backend_optimization_level": 0}  # of compilation


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_primitive(case: Any) -> None:
    fn, args, allowed = Case(*case)
    want = jax.tree.leaves(jax.jit(fn, compiler_options=FAST)(*args))
    program = lower(fn, *args)
    used = _primitives(jax.make_jaxpr(fn)(*args).jaxpr)
    run = Recorded(program.module, elementwise=used <= ELEMENTWISE.keys())
    with torch.no_grad():
        got = run.run(*(to_torch(x) for x in jax.tree.leaves(args)))
    allowed = allowed if isinstance(allowed, list) else [allowed] * len(want)
    for tensor, aval, w, bound in zip(got, program.out_avals, want, allowed, strict=True):
        assert aval.dtype == w.dtype
        assert tensor.dtype == torch_dtype(w.dtype)
        assert tuple(tensor.shape) == physical_shape(w)
        _assert_equal(to_jax(tensor, aval), w, used, bound)


def _assert_equal(got: jax.Array, want: jax.Array, used: set[str], allowed: Any) -> None:
    if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
        got, want = jax.random.key_data(got), jax.random.key_data(want)
    if not jnp.issubdtype(want.dtype, jnp.inexact):
        np.testing.assert_array_equal(got, want)
        return
    if allowed is None:
        allowed = bounds.of_functions(used, want)
    elif callable(allowed):
        allowed = allowed(want)
    wide = np.complex128 if jnp.iscomplexobj(want) else np.float64
    g, w = np.asarray(got, wide), np.asarray(want, wide)
    finite = np.isfinite(w)
    np.testing.assert_array_equal(g[~finite], w[~finite])
    bound = np.broadcast_to(allowed, w.shape)[finite] + bounds.FLUSHED
    assert np.all(np.abs(g[finite] - w[finite]) <= bound), f"{got} is not {want}"


# Names of older or newer JAX for what is tested under another name, and what jit erases.
ALIASES = {
    "add_any", "checkpoint", "closed_call", "copy_p", "core_call", "custom_vjp_call_jaxpr",
    "custom_vmap_call", "expand_dims", "layout_constraint", "name", "pjit", "random_clone", "reshard",
    "sharding_constraint", "remat2",
    # what the random primitives expand to
    "iota_2x32_shape", "threefry2x32",
    # the compiled kernel: tests/bridges/test_torch_kernel.py
    *OPERATIONS,
    # what this JAX does not have yet
    *({"stack", "unstack"} - set(dir(lax))),
}  # fmt: skip


def test_every_primitive_is_tested() -> None:
    used: set[str] = set()
    for fn, args, _ in (Case(*case) for case in CASES):
        used |= _primitives(jax.make_jaxpr(fn)(*args).jaxpr)
    assert set(TABLE) - used - ALIASES == set()
