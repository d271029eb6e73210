"""Stochastic rounding of float32 to bfloat16, from a counter.

    y = truncate(bits(x) + r), r uniform on 0 .. 2^16 - 1

so that E[y] = x: an update smaller than half a unit in the last place of the parameter is applied with a
probability instead of never. The random bits are a hash of (seed, step, leaf, element), so they need no generator: the
same seed and step give the same bits on every engine and after every resume. The hash is lowbias32 (C. Wellons,
"Prospecting for hash functions", 2018).
"""

from typing import Any

import jax
import jax.numpy as jnp


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def stochastic_round(x: jax.Array, seed: jax.Array, step: jax.Array, leaf: int) -> jax.Array:
    """`x` as bfloat16, up or down with probabilities that make its expectation `x`.

    Args:
      x: float32 array; what is not finite is converted as usual.
      seed: integer scalar.
      step: integer scalar, another one for every call with this seed.
      leaf: another one for every array that is rounded in one step.

    Returns:
      A bfloat16 array in the shape of `x`.

    >>> x = jnp.full(10_000, 1.0 + 2.0**-10)  # bfloat16 has 1 and 1 + 2^-7
    >>> y = stochastic_round(x, jnp.int32(0), jnp.int32(0), 0).astype(jnp.float32)
    >>> sorted(set(y.tolist())), round(float((y.mean() - 1) * 2**10), 1)
    ([1.0, 1.0078125], 1.0)
    """
    key = _mix(seed.astype(jnp.uint32) + _mix(step.astype(jnp.uint32) + _mix(jnp.uint32(leaf))))
    element = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
    noise = _mix(element ^ key) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def apply_updates(params: Any, updates: Any, rounding: jax.Array | None) -> Any:
    """`optax.apply_updates`, whose sums are rounded stochastically for bfloat16 parameters if `rounding` is given.

    Args:
      params: a pytree of parameters.
      updates: a pytree of the same structure.
      rounding: None, or an integer array (seed, step).
    """
    leaves, structure = jax.tree.flatten(params)
    new = []
    for i, (p, u) in enumerate(zip(leaves, structure.flatten_up_to(updates), strict=True)):
        if rounding is not None and p.dtype == jnp.bfloat16:
            total = p.astype(jnp.float32) + u.astype(jnp.float32)
            new.append(stochastic_round(total, rounding[0], rounding[1], i))
        else:
            new.append(jnp.asarray(p + u).astype(p.dtype))
    return jax.tree.unflatten(structure, new)
