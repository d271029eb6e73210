"""Stochastic rounding of float32 to bfloat16 at a step of a bridge.

The random bits are a hash of (seed, step, leaf, element), so they need no generator: the same seed and step give the
same bits on every engine and after every resume.
"""

from typing import Any

import jax
import jax.numpy as jnp

from chainrule.transforms._apply import mix, round_at_random


def stochastic_round(x: jax.Array, seed: jax.Array, step: jax.Array, leaf: int) -> jax.Array:
    """`x` as bfloat16, up or down with probabilities that make its expectation `x`.

    Args:
      x: float32 array; what is not finite is converted as usual.
      seed: integer scalar.
      step: integer scalar, another one for every call with this seed.
      leaf: another one for every array that is rounded in one step.

    Returns:
      A bfloat16 array in the shape of `x`.
    """
    word = mix(seed.astype(jnp.uint32) + mix(step.astype(jnp.uint32) + mix(jnp.uint32(leaf))))
    return round_at_random(x, word)


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
