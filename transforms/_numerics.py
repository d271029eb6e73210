"""Arithmetic that several atoms share. All of it computes in float32 at least."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


def up(x: jax.Array) -> jax.Array:
    """`x` in the dtype in which atoms compute: its own, but float32 for half precision."""
    return jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32))


def ema(decay: Any, old: jax.Array, new: jax.Array) -> jax.Array:
    """decay * old + (1 - decay) * new."""
    return decay * up(old) + (1 - decay) * up(new)


def increment(count: jax.Array) -> jax.Array:
    """count + 1, held at the largest int32 where it would wrap around."""
    return jnp.asarray(optax.safe_increment(count))


def bias_correction(decay: Any, count: jax.Array) -> jax.Array:
    """1 - decay**count, the weight an EMA that started at zero has given to what it saw.

    Computed as -expm1(count * log(decay)): 1 - decay**count loses half of float32's digits for
    decay near one.

    Args:
      decay: a number or scalar array in [0, 1).
      count: the number of steps seen, at least 1.

    >>> print(f"{bias_correction(0.999, 2):.9f}")
    0.001999000
    """
    if isinstance(decay, jax.Array):
        log = jnp.log(decay)
    else:  # a Python number has its logarithm taken in float64, at trace time
        log = math.log(decay) if decay > 0 else -math.inf
    return -jnp.expm1(count * log)


def abs_sq(x: jax.Array) -> jax.Array:
    """|x|^2, real for complex x."""
    x = up(x)
    return (x.conj() * x).real if jnp.iscomplexobj(x) else x * x


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """The inner product of two arrays as real vectors, real and imaginary parts apart.

    >>> inner(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])).item()
    11.0
    """
    return jnp.sum((up(x).conj() * up(y)).real)


def square_norm(x: jax.Array) -> jax.Array:
    """The squared Euclidean norm of an array as a real vector.

    >>> square_norm(jnp.array([[3.0, -4.0]])).item()
    25.0
    """
    # Behind a barrier, because x * x may occur elsewhere too (in a second moment): XLA:CPU would then write it to
    # memory for both, at several times the cost of this sum.
    x = jnp.abs(jax.lax.optimization_barrier(up(x)))
    return jnp.sum(x * x)


def norm(x: jax.Array) -> jax.Array:
    """The Euclidean norm of an array as a real vector.

    >>> norm(jnp.array([[3.0, -4.0]])).item()
    5.0
    """
    return jnp.sqrt(square_norm(x))


def finite(x: jax.Array, max_abs: Any) -> jax.Array:
    """`x` with NaN and infinite entries zeroed and the others clamped to magnitude `max_abs`
    (`None`: not clamped).

    >>> finite(jnp.array([1.0, jnp.nan, -5.0]), 2.0).tolist()
    [1.0, 0.0, -2.0]
    """
    x = jnp.where(jnp.isfinite(x), x, 0)
    if max_abs is None:
        return x
    if jnp.iscomplexobj(x):
        return (x / jnp.maximum(jnp.abs(x) / max_abs, 1)).astype(x.dtype)
    return jnp.clip(up(x), -max_abs, max_abs).astype(x.dtype)


def own_scalar(x: Any, leaf: jax.Array) -> jax.Array:
    """The scalar `x`, to be broadcast in a sum over `leaf`; 0 becomes a smallest normal number.

    XLA:CPU fuses the broadcast of a scalar that only one sum uses, and writes out that of a scalar which several use.
    What is added to `x` for a large leaf, to tell it from those of other leaves, is far below its precision.

    >>> float(own_scalar(1.0, jnp.ones(2))), float(own_scalar(0.0, jnp.ones(2)))
    (1.0, 1.17...e-38)
    """
    tiny = float(jnp.finfo(jnp.float32).tiny)
    if leaf.size < 2**16:
        return x + jnp.float32(tiny)
    first = jax.lax.slice(leaf, (0,) * leaf.ndim, (1,) * leaf.ndim)
    return x + tiny * (1 + jnp.sum(first > 0, dtype=jnp.float32))
