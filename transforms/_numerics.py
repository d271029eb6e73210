"""Arithmetic that several atoms share. All of it computes in float32 at least."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def up(x: jax.Array) -> jax.Array:
    """`x` in the dtype in which atoms compute: its own, but float32 for half precision."""
    return jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32))


def ema(decay: Any, old: jax.Array, new: jax.Array) -> jax.Array:
    """decay * old + (1 - decay) * new."""
    return decay * up(old) + (1 - decay) * up(new)


def bias_correction(decay: Any, count: jax.Array) -> jax.Array:
    """1 - decay**count, the weight an EMA that started at zero has given to what it saw.

    Computed as -expm1(count * log(decay)): 1 - decay**count loses half of float32's digits for decay near one.

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
