"""Arithmetic that several atoms share. All of it computes in float32 at least."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from chainrule.native.forms import abs_sq as abs_sq
from chainrule.native.forms import ema as ema
from chainrule.native.forms import inner as inner
from chainrule.native.forms import own_scalar as own_scalar
from chainrule.native.forms import root as root
from chainrule.native.forms import share as share
from chainrule.native.forms import square_norm as square_norm
from chainrule.native.forms import up as up


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


def norm(x: jax.Array) -> jax.Array:
    """The Euclidean norm of an array as a real vector.

    >>> norm(jnp.array([[3.0, -4.0]])).item()
    5.0
    """
    return root(square_norm(x))


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


HUGE = 2.0**48
"""A magnitude of which 10^9 squares have a sum in float32."""


def clamped(x: jax.Array) -> jax.Array:
    """`x` with its magnitudes, infinite ones too, at most `HUGE`; NaN stays.

    >>> clamped(jnp.array([1.0, jnp.inf])).tolist() == [1.0, HUGE]
    True
    """
    return jnp.clip(up(x), -HUGE, HUGE)
