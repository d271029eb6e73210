r"""Remembers what rounding takes from each step, and adds it to the next: Kahan's summation of updates.

    y  = u + c                   what is to be added
    p' = round(p + y)            as `apply_updates` does it
    c' = y - (p' - p)

Source: Kahan, "Further remarks on reducing truncation errors", 1965; for weights in bfloat16: Zamirai et al.,
"Revisiting BFloat16 Training", 2021.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import require_params, zeros_like
from chainrule.transforms._numerics import up
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._words import checked_words


class CompensatedState(NamedTuple):
    """State of `compensated`."""

    lost: optax.Updates
    """What rounding has taken so far, like the parameters."""


@checked_words
def compensated(*, dtype: Any = None) -> optax.GradientTransformationExtraArgs:
    r"""Adds to each update what rounding took from those before it, so that small steps of bfloat16 weights add up.

    $$y = u + c, \quad p' = \mathrm{round}(p + y), \quad c' = y - (p' - p)$$

    The last link of a chain: what it returns is to be added as it is, by `optax.apply_updates`, a trainer or a bridge.
    Parameter and `lost` together are then the parameter of a run in higher precision.

    Args:
      dtype: of what is remembered, default the parameter's. In bfloat16 parameter and `lost` together have 16 bits, so
        that steps below about 2^-17 of a parameter are lost again; with `"float32"` none is, for two bytes more.

    Returns:
      A `optax.GradientTransformationExtraArgs`, whose updates have the dtype of those that it gets.

    Raises:
      ValueError: `update` without parameters.
      TypeError: a parameter that is not floating point or complex.

    >>> tx = optax.chain(optax.sgd(1e-3), compensated())
    >>> params, state = jnp.bfloat16(1.0), tx.init(jnp.bfloat16(1.0))
    >>> for _ in range(1000):
    ...     updates, state = tx.update(jnp.bfloat16(-1.0), state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params.item()  # without `compensated`: 1.0
    2.0

    References:
      Zamirai et al., https://arxiv.org/abs/2010.06192
    """

    def init(params: Tree) -> CompensatedState:
        return CompensatedState(zeros_like("compensated", params, dtype))

    def update(
        updates: Tree, state: CompensatedState, params: Tree = None, **_: Any
    ) -> tuple[Tree, CompensatedState]:
        params = require_params("compensated", params)
        wanted = jax.tree.map(lambda u, c: up(u) + up(c), updates, state.lost)
        added = jax.tree.map(lambda y, u: y.astype(u.dtype), wanted, updates)

        def lost(y: jax.Array, added: jax.Array, c: jax.Array, p: jax.Array) -> jax.Array:
            return (y - (_stored(up(p) + up(added), p.dtype) - up(p))).astype(c.dtype)

        return added, CompensatedState(jax.tree.map(lost, wanted, added, state.lost, params))

    return optax.GradientTransformationExtraArgs(*typed(init, update))


def _stored(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` as an array of a dtype has it. A conversion there and back is a rounding that XLA may leave out."""
    if jnp.iscomplexobj(x):
        return x
    to = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, to.nexp, to.nmant)
