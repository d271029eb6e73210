r"""Momentum as an average of gradients, with the look-aheads that Muon's implementations call Nesterov.

    mu_t = b mu_{t-1} + (1 - b) g_t
    u_t  = mu_t                       None
           (1 - b) g_t + b mu_t       "lerp"         Jordan et al., torch.optim.Muon
           g_t + b mu_t               "raw"          KerasOptimizers 00a4bde: 1/(1 - b) times the g_t
           (1 - mu_t) g_t + b mu_t    "elementwise"  KerasOptimizers cd97ca0: mu_t where b is meant
    debias, for None:   mu_t / (1 - b^t)                                           optax.contrib.muon
            for "lerp": (1 - b) g_t / (1 - b^t) + b mu_t / (1 - b^{t+1})

Source: Jordan et al., "Muon", 2024. "raw" and "elementwise" are mistakes, kept so that the trajectories
made with them can be reproduced.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import check_bounds, check_choice, zeros_like
from chainrule.transforms._numerics import bias_correction, ema, increment, up
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._words import checked_words


class EmaMomentumState(NamedTuple):
    """State of `ema_momentum`."""

    count: jax.Array
    """int32 scalar: updates made."""
    mu: optax.Updates
    """The average of the gradients, like the parameters, in `mu_dtype`."""


@checked_words
def ema_momentum(
    decay: jax.typing.ArrayLike = 0.95,
    nesterov: str | None = "lerp",
    *,
    debias: bool = False,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Replaces gradients by their exponential moving average, looking one step ahead.

    $$\mu_t = b\,\mu_{t-1} + (1 - b)\,g_t, \qquad u_t = (1 - b)\,g_t + b\,\mu_t$$

    Args:
      decay: b, in [0, 1).
      nesterov: the look-ahead: `"lerp"` as above; `"raw"`, \(g_t + b\,\mu_t\); `"elementwise"`,
        \((1 - \mu_t) g_t + b\,\mu_t\); `None`, \(\mu_t\).
      debias: divide by the weight that the average has given to gradients (optax); with `"lerp"` or
        `None`.
      mu_dtype: dtype of `mu`, default the parameter's.

    Returns:
      A `optax.GradientTransformation`.

    Raises:
      ValueError: an argument outside its range; `debias` with another look-ahead.
      TypeError: a parameter that is not floating point or complex.

    >>> tx = ema_momentum(0.5)
    >>> u, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
    >>> u.item(), state.mu.item()
    (3.0, 2.0)

    References:
      Jordan et al., https://kellerjordan.github.io/posts/muon/
    """
    check_bounds("ema_momentum", decay=decay)
    check_choice("ema_momentum", "nesterov", nesterov, (None, "lerp", "raw", "elementwise"))
    if debias and nesterov not in (None, "lerp"):
        raise ValueError(
            f"ema_momentum: `debias` is for nesterov=None or 'lerp', got nesterov={nesterov!r}; "
            "leave it False"
        )

    def init(params: Tree) -> EmaMomentumState:
        return EmaMomentumState(
            jnp.zeros((), jnp.int32), zeros_like("ema_momentum", params, mu_dtype)
        )

    def update(
        updates: Tree, state: EmaMomentumState, params: Tree = None
    ) -> tuple[Tree, EmaMomentumState]:
        del params
        count = increment(state.count)
        now, ahead = (
            (bias_correction(decay, count), bias_correction(decay, count + 1))
            if debias
            else (1.0, 1.0)
        )

        def direction(g: jax.Array, mu: jax.Array) -> Any:
            g_up = up(g)
            if nesterov is None:
                u = mu / now
            elif nesterov == "lerp":
                u = (1 - decay) * g_up / now + decay * mu / ahead
            elif nesterov == "raw":
                u = g_up + decay * mu
            else:
                u = (1 - mu) * g_up + decay * mu
            return u.astype(g.dtype)

        mu = jax.tree.map(lambda g, old: ema(decay, old, g), updates, state.mu)
        new = jax.tree.map(direction, updates, mu)
        return new, EmaMomentumState(count, optax.tree.cast_like(mu, state.mu))

    return optax.GradientTransformation(*typed(init, update))
