r"""Grokfast's exponential filter: adds the slow part of the gradient to it.

    ema_t = alpha ema_{t-1} + (1 - alpha) g_t,    u_t = g_t + lamb ema_t

Source: Lee et al., "Grokfast: Accelerated Grokking by Amplifying Slow Gradients", 2024, algorithm 2, and its
repository, where the average starts at the first gradient, ema_1 = g_1. `start="zero"` is the form of KerasOptimizers.
Departure: what is not finite is left out of the average, in which it would stay for ever.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import check_bounds, check_choice, zeros_like
from chainrule.transforms._numerics import ema, increment, up
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._words import checked_words


class GrokfastEmaState(NamedTuple):
    """State of `grokfast_ema`."""

    count: jax.Array
    """int32 scalar: updates made."""
    ema: optax.Updates
    """The average of the gradients, like the parameters, in `state_dtype`."""


@checked_words
def grokfast_ema(
    alpha: jax.typing.ArrayLike = 0.98,
    *,
    lamb: jax.typing.ArrayLike = 2.0,
    start: str = "first",
    state_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Amplifies the slow component of the gradients by an exponential moving average.

    $$u_t = g_t + \lambda\,\bar g_t, \qquad \bar g_t = \alpha\,\bar g_{t-1} + (1 - \alpha)\,g_t$$

    An entry that is NaN or infinite passes, visible to the links after, and is left out of the average.

    Args:
      alpha: decay of the average, in [0, 1).
      lamb: how much of the average is added, at least 0.
      start: `"first"`, the average starts at the first gradient, so that \(u_1 = (1 + \lambda) g_1\); `"zero"`, at
        zero, without debiasing (KerasOptimizers).
      state_dtype: dtype of the average, default the parameter's.

    Returns:
      A `optax.GradientTransformation`.

    Raises:
      ValueError: an argument outside its range.
      TypeError: a parameter that is not floating point or complex.

    >>> tx = grokfast_ema(alpha=0.5, lamb=2.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> u, state = tx.update(jnp.array([1.0]), state)
    >>> u2, state = tx.update(jnp.array([0.0]), state)
    >>> u.item(), u2.item()
    (3.0, 1.0)

    References:
      Lee et al., https://arxiv.org/abs/2405.20233
    """
    check_bounds("grokfast_ema", alpha=alpha, lamb=lamb)
    check_choice("grokfast_ema", "start", start, ("first", "zero"))

    def init(params: Tree) -> GrokfastEmaState:
        zeros = zeros_like("grokfast_ema", params, state_dtype)
        return GrokfastEmaState(jnp.zeros((), jnp.int32), zeros)

    def taken_in(decay: Any, old: jax.Array, g: jax.Array) -> jax.Array:
        # What is not finite would stay in the average for ever.
        return jnp.where(jnp.isfinite(g), ema(decay, old, g), up(old))

    def update(
        updates: Tree, state: GrokfastEmaState, params: Tree = None
    ) -> tuple[Tree, GrokfastEmaState]:
        del params
        # Decay 0 once puts the first gradient into the average.
        decay = jnp.where(state.count == 0, 0.0, alpha) if start == "first" else alpha
        averages = jax.tree.map(lambda old, g: taken_in(decay, old, g), state.ema, updates)
        new = jax.tree.map(lambda g, slow: (up(g) + lamb * slow).astype(g.dtype), updates, averages)
        stored = optax.tree.cast_like(averages, state.ema)
        return new, GrokfastEmaState(increment(state.count), stored)

    return optax.GradientTransformation(*typed(init, update))
