r"""Grokfast's windowed filter: adds the mean of the last gradients to the gradient.

    u_t = g_t + lamb / w sum_{i = t-w+1}^{t} g_i  from t = w on,    u_t = g_t before it

Source: Lee et al., "Grokfast: Accelerated Grokking by Amplifying Slow Gradients", 2024, algorithm 1, and its
repository.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import check_bounds, check_params
from chainrule.transforms._numerics import finite, increment, up
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._sharding import alike
from chainrule.transforms._trees import map_to_other_shapes
from chainrule.transforms._words import checked_words


class GrokfastMaState(NamedTuple):
    """State of `grokfast_ma`."""

    count: jax.Array
    """int32 scalar: updates made."""
    window: optax.Updates
    """Ring buffer of the last gradients: (window_size, *shape) for each parameter, in `state_dtype`."""


@checked_words
def grokfast_ma(
    window_size: int = 100,
    *,
    lamb: jax.typing.ArrayLike = 5.0,
    warmup: bool = True,
    state_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Amplifies the slow component of the gradients by their mean over a window.

    $$u_t = g_t + \frac{\lambda}{w} \sum_{i=t-w+1}^{t} g_i$$

    The state holds `window_size` gradients; `grokfast_ema` does nearly the same with one. An entry that is NaN or
    infinite passes, visible to the links after, and counts as zero in the mean.

    Args:
      window_size: w, the number of gradients kept, an integer of at least 1; a structure, not live.
      lamb: how much of the mean is added, at least 0.
      warmup: add nothing until the window is full; `False`: the mean of what there is, from the first update on.
      state_dtype: dtype of the window, default the parameter's.

    Returns:
      A `optax.GradientTransformation`.

    Raises:
      ValueError: an argument outside its range.
      TypeError: a parameter that is not floating point or complex.

    >>> tx = grokfast_ma(window_size=2, lamb=1.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> u, state = tx.update(jnp.array([1.0]), state)
    >>> u2, state = tx.update(jnp.array([3.0]), state)
    >>> u.item(), u2.item()
    (1.0, 5.0)

    References:
      Lee et al., https://arxiv.org/abs/2405.20233
    """
    check_bounds("grokfast_ma", window_size=window_size, lamb=lamb)

    def init(params: Tree) -> GrokfastMaState:
        check_params("grokfast_ma", params)
        window = map_to_other_shapes(
            # Of zeros that lie as the parameter does, for a window of parts.
            lambda p: jnp.broadcast_to(
                alike(p, jnp.zeros_like(p, dtype=state_dtype)), (window_size, *jnp.shape(p))
            ),
            params,
        )
        return GrokfastMaState(jnp.zeros((), jnp.int32), window)

    def update(
        updates: Tree, state: GrokfastMaState, params: Tree = None
    ) -> tuple[Tree, GrokfastMaState]:
        del params
        slot = state.count % window_size
        count = increment(state.count)
        held = jnp.minimum(count, window_size)
        gain = jnp.where(held == window_size, lamb / held, 0) if warmup else lamb / held

        def amplified(g: jax.Array, window: jax.Array) -> jax.Array:
            return (up(g) + gain * jnp.sum(up(window), axis=0)).astype(g.dtype)

        window = jax.tree.map(
            lambda w, g: jnp.asarray(w).at[slot].set(finite(g, None).astype(w.dtype)),
            state.window,
            updates,
        )
        return jax.tree.map(amplified, updates, window), GrokfastMaState(count, window)

    return optax.GradientTransformation(*typed(init, update))
