r"""Adam's direction with the second moment taken of the gradient's deviation from its mean.

    d_t = g_t - mu_{t-1} / (1 - b1^(t-1)),  d_1 = 0
    mu_t = b1 mu_{t-1} + (1 - b1) g_t,      nu_t = b2 nu_{t-1} + (1 - b2) d_t^2
    mu_hat = mu_t / (1 - b1^t),  nu_hat = nu_t / (1 - b2^(t-1))
    u_t = mu_hat / (sqrt(mu_hat^2 + nu_hat) + eps)

Source: the CASMO repository, commit e81a36e. Departure: there d_t = g_t - mu_{t-1} from the first
step on (`deviation="raw"`). As mu_0 = 0, the first deviation is the whole gradient, and a constant
gradient passes for half noise. optax's `scale_by_belief` deviates from mu_t and leaves mu_hat^2 out
of the denominator. And gradients count with a magnitude of at most 2^48: one square that overflows
would make the share of signal, inf / inf, NaN.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import check_bounds, check_choice, check_params, zeros_like
from chainrule.transforms._numerics import bias_correction, clamped, ema, increment, root, up
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._words import checked_words

DEVIATIONS = ("unbiased", "raw")


class ScaleByBeliefState(NamedTuple):
    """State of `scale_by_belief`, under optax's field names."""

    count: jax.Array
    """int32 scalar: updates made."""
    mu: optax.Updates
    """First moment, like the parameters, in `mu_dtype`."""
    nu: optax.Updates
    """EMA of the squared deviation, like the parameters, in `nu_dtype`."""


def corrections(b1: Any, b2: Any, count: jax.Array, deviation: str) -> tuple[jax.Array, jax.Array]:
    """What mu and nu are divided by after `count` updates."""
    deviations = jnp.maximum(count - 1, 1) if deviation == "unbiased" else count
    return bias_correction(b1, count), bias_correction(b2, deviations)


@checked_words
def scale_by_belief(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    deviation: str = "unbiased",
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Scales updates by the root of squared mean plus variance of the gradient.

    $$u_t = \frac{\hat\mu_t}{\sqrt{\hat\mu_t^2 + \hat\nu_t} + \epsilon},\qquad
    \nu_t = b_2\nu_{t-1} + (1-b_2)\,(g_t - \hat\mu_{t-1})^2$$

    A constant gradient has no variance, and its direction is Adam's.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the denominator, at least 0.
      deviation: `"unbiased"`, from the bias-corrected mean, the first left out; `"raw"`, from mu
        itself, which starts at zero (the repository).
      mu_dtype: dtype of `mu`, default the parameter's.
      nu_dtype: dtype of `nu`, default the parameter's.

    Returns:
      A `optax.GradientTransformation`.

    Raises:
      ValueError: an argument outside its range.
      TypeError: a parameter that is not real floating point.

    >>> tx = scale_by_belief()
    >>> g = jnp.array([3.0, -0.5])
    >>> u, state = tx.update(g, tx.init(jnp.zeros(2)))
    >>> u.round(4).tolist(), state.nu.tolist()
    ([1.0, -1.0], [0.0, 0.0])

    References:
      CASMO, repository commit e81a36e.
      Zhuang et al., "AdaBelief Optimizer", https://arxiv.org/abs/2010.07468
    """
    owner = "scale_by_belief"
    check_bounds(owner, b1=b1, b2=b2, eps=eps)
    check_choice(owner, "deviation", deviation, DEVIATIONS)

    def init(params: Tree) -> ScaleByBeliefState:
        check_params(owner, params, real=True)
        return ScaleByBeliefState(
            count=jnp.zeros((), jnp.int32),
            mu=zeros_like(owner, params, mu_dtype),
            nu=zeros_like(owner, params, nu_dtype),
        )

    def update(
        updates: Tree, state: ScaleByBeliefState, params: Tree = None
    ) -> tuple[Tree, ScaleByBeliefState]:
        del params
        count = increment(state.count)
        c1, c2 = corrections(b1, b2, count, deviation)
        # From the new mean, g - mu_hat_{t-1} = ((1 - b1^t) g - mu_t) / (b1 - b1^t), so that
        # mu_{t-1} is read once and its memory can be reused.
        seen, share, weight = 1.0, b1, 1 - b2
        if deviation == "unbiased":
            seen, share = c1, b1 * bias_correction(b1, jnp.maximum(state.count, 1))
            weight = jnp.where(state.count > 0, weight, 0)
        weight = weight / jnp.maximum(share * share, jnp.finfo(jnp.float32).tiny)

        def second(g: jax.Array, mu: jax.Array, nu: jax.Array) -> Any:
            d = seen * clamped(g) - mu
            return b2 * up(nu) + weight * (d * d)

        def direction(g: jax.Array, mu: jax.Array, nu: jax.Array) -> jax.Array:
            mean = mu * (1 / c1)
            return (mean / (root(mean * mean + nu * (1 / c2)) + eps)).astype(g.dtype)

        mu = jax.tree.map(lambda g, mu: ema(b1, mu, clamped(g)), updates, state.mu)
        nu = jax.tree.map(second, updates, mu, state.nu)
        new = jax.tree.map(direction, updates, mu, nu)
        stored = optax.tree.cast_like((mu, nu), (state.mu, state.nu))
        return new, ScaleByBeliefState(count, *stored)

    return optax.GradientTransformation(*typed(init, update))
