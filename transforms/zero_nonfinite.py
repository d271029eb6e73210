"""Zeroes NaN and infinite gradient entries, bounds the finite ones, and counts what it touched.

    g~_i = 0 if g_i is NaN or infinite, else clip(g_i, -max_abs, max_abs)

Source: STAM (`safe_g`, repository version 0.1.0). Departures: the clamp, without which one finite
entry whose square overflows float32 sets the second moment to infinity for ever; and the counts,
without which nobody learns of either.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import check_bounds
from chainrule.transforms._numerics import finite, up
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._words import checked_words


class ZeroNonfiniteState(NamedTuple):
    """State of `zero_nonfinite`."""

    nonfinite: jax.Array
    """int32 scalar: entries zeroed or clamped in the last update."""
    nonfinite_total: jax.Array
    """int32 scalar: the same, summed over all updates (saturates)."""

    metric_fields = ("nonfinite", "nonfinite_total")


@checked_words
def zero_nonfinite(max_abs: jax.typing.ArrayLike | None = 2.0**48) -> optax.GradientTransformation:
    r"""Replaces NaN and infinite entries of the updates by zero and clamps the finite ones to `max_abs`.

    $$\tilde g_i = \mathbb 1[g_i\ \text{finite}]\ \mathrm{clip}(g_i, -c, c)$$

    The update still counts as a step. `chainrule.metrics` shows how many entries were touched.

    Args:
      max_abs: the clamp, positive; the default \(2^{48} \approx 2.8\cdot 10^{14}\) leaves room to
        sum \(10^9\) squares in float32. `None`: no clamp.

    Returns:
      A `optax.GradientTransformation`.

    Raises:
      ValueError: `max_abs` is not positive.

    >>> tx = zero_nonfinite()
    >>> u, state = tx.update(jnp.array([1.0, jnp.nan, -jnp.inf]), tx.init(jnp.zeros(3)))
    >>> u.tolist(), state.nonfinite.item()
    ([1.0, 0.0, 0.0], 2)
    """
    check_bounds("zero_nonfinite", max_abs=max_abs)

    def init(params: Tree) -> ZeroNonfiniteState:
        del params
        return ZeroNonfiniteState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(
        updates: Tree, state: ZeroNonfiniteState, params: Tree = None
    ) -> tuple[Tree, ZeroNonfiniteState]:
        del params

        def kept(g: jax.Array) -> jax.Array:
            return (
                jnp.isfinite(g) if max_abs is None else jnp.abs(up(g)) <= max_abs
            )  # NaN compares false

        touched = [jnp.sum(~kept(g), dtype=jnp.int32) for g in jax.tree.leaves(updates)]
        count = sum(touched, start=jnp.zeros((), jnp.int32))
        # Counts are non-negative, so a sum that wrapped around is smaller than what it started from.
        total = state.nonfinite_total + count
        total = jnp.where(total < count, jnp.iinfo(jnp.int32).max, total)
        return jax.tree.map(lambda g: finite(g, max_abs), updates), ZeroNonfiniteState(count, total)

    return optax.GradientTransformation(*typed(init, update))
