r"""Adam's direction, from raw gradients or from a first moment that an earlier link decided.

    mu_t = b1 mu_{t-1} + (1 - b1) g_t              nu_t = b2 nu_{t-1} + (1 - b2) |g_t|^2
    u_t  = mu_hat_t / (sqrt(nu_hat_t + eps_root) + eps),   mu_hat = mu / (1 - b1^t),  nu_hat = nu / (1 - b2^t)

Source: Kingma & Ba, "Adam", 2015, algorithm 1; Dozat, "Incorporating Nesterov Momentum into Adam", 2016. Departure: a
momentum leaf of `adaptive_beta1` replaces mu_hat by its own moment, and 1 - b^t is computed without float32's
cancellation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import check_bounds, check_choice, check_params, zeros_like
from chainrule.transforms._momentum_leaf import MomentumLeaf
from chainrule.transforms._numerics import abs_sq, bias_correction, ema, increment, root, up
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._sharding import alike
from chainrule.transforms._words import checked_words


class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam`, under optax's field names."""

    count: jax.Array
    """int32 scalar: updates made."""
    mu: optax.Updates | None
    """First moment, like the parameters, in `mu_dtype`; `None` with `b1=None`."""
    nu: optax.Updates
    """Second moment, like the parameters (real), in `nu_dtype`."""


@checked_words
def scale_by_adam(
    b1: jax.typing.ArrayLike | None = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    nesterov: bool | str = False,
    debias: bool = True,
    debias_eps: jax.typing.ArrayLike = 0.0,
    eps_scope: str = "corrected",
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by Adam's rule.

    $$u_t = \frac{\hat\mu_t}{\sqrt{\hat\nu_t + \epsilon_{root}} + \epsilon}$$

    Where an update is a momentum leaf of `adaptive_beta1`, its moment is \(\hat\mu_t\) and the raw gradient in it feeds
    \(\nu_t\). Arithmetic is float32 at least; updates keep the gradient's dtype, moments the parameter's.

    Args:
      b1: decay of the first moment, in [0, 1). `None`: it comes from `adaptive_beta1` upstream and none is stored.
      b2: decay of the second moment, in [0, 1).
      eps: added to the denominator outside the root, at least 0.
      eps_root: added inside the root, at least 0.
      nesterov: `True`, Dozat's look-ahead as in optax, \(b_1 \mu_t/(1-b_1^{t+1}) + (1-b_1) g_t/(1-b_1^t)\);
        `"keras"`, the same with \(1-b_1^t\) under both, which makes the first step larger by \(1 + b_1\)
        (KerasOptimizers).
      debias: divide the moments by \(1 - b^t\).
      debias_eps: added to both \(1 - b^t\), at least 0 (the STAM repository uses its eps here).
      eps_scope: `"corrected"`, eps is added to \(\sqrt{\hat\nu}\); `"raw"`, to \(\sqrt\nu\) before its bias correction
        (Kingma & Ba's closing remark in section 2; C-Optim with `foreach=False`).
      mu_dtype: dtype of `mu`, default the parameter's.
      nu_dtype: dtype of `nu`, default the parameter's.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range; `nesterov` with `b1=None`.
      TypeError: a parameter that is not floating point; with `b1=None`, an update that is not a momentum leaf.

    >>> tx = scale_by_adam()
    >>> u, state = tx.update(jnp.array([3.0, -0.5]), tx.init(jnp.zeros(2)))
    >>> u.round(4).tolist()
    [1.0, -1.0]

    References:
      Kingma & Ba, https://arxiv.org/abs/1412.6980
    """
    check_bounds("scale_by_adam", b1=b1, b2=b2, eps=eps, eps_root=eps_root, debias_eps=debias_eps)
    check_choice("scale_by_adam", "nesterov", nesterov, (False, True, "keras"))
    check_choice("scale_by_adam", "eps_scope", eps_scope, ("corrected", "raw"))
    if b1 is None and nesterov:
        raise ValueError(
            "scale_by_adam: `nesterov` needs a `b1` of its own, got b1=None; give `b1` a number"
        )

    def init(params: Tree) -> ScaleByAdamState:
        check_params("scale_by_adam", params)
        real = jax.tree.map(lambda p: jnp.zeros((), jnp.result_type(p)).real.dtype, params)
        return ScaleByAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=None if b1 is None else zeros_like("scale_by_adam", params, mu_dtype),
            nu=jax.tree.map(lambda p, d: alike(p, jnp.zeros_like(p, nu_dtype or d)), params, real),
        )

    def update(
        updates: Tree, state: ScaleByAdamState, params: Tree = None, **_: Any
    ) -> tuple[Tree, ScaleByAdamState]:
        del params
        count = increment(state.count)
        correction = bias_correction(b2, count) + debias_eps if debias else 1.0

        def gradient(u: Any) -> jax.Array:
            return u.grad if isinstance(u, MomentumLeaf) else u

        def moment(u: Any, mu: jax.Array) -> jax.Array:
            if isinstance(u, MomentumLeaf):
                return u.mu
            if b1 is None:
                raise TypeError(
                    "scale_by_adam: b1=None says that the moment comes from upstream, but the updates are "
                    "plain arrays; put `adaptive_beta1` directly before it, or give `b1` a number"
                )
            return ema(b1, mu, u)

        def first(u: Any, mu: jax.Array) -> Any:
            if isinstance(u, MomentumLeaf):
                return mu / (u.correction + debias_eps)
            assert b1 is not None  # `moment` has refused plain arrays without b1
            c1 = bias_correction(b1, count) + debias_eps if debias else 1.0
            if not nesterov:
                return mu / c1
            ahead = (
                bias_correction(b1, count + 1) + debias_eps if debias and nesterov is True else c1
            )
            return (b1 / ahead) * mu + ((1 - b1) / c1) * up(u)

        def direction(u: Any, mu: jax.Array, nu: jax.Array) -> jax.Array:
            if eps_scope == "raw":
                denominator = (root(nu + eps_root) + eps) / jnp.sqrt(correction)
            else:
                denominator = root(nu / correction + eps_root) + eps
            return (first(u, mu) / denominator).astype(gradient(u).dtype)

        previous = updates if state.mu is None else state.mu
        mu = jax.tree.map(moment, updates, previous)
        nu = jax.tree.map(lambda u, nu: ema(b2, nu, abs_sq(gradient(u))), updates, state.nu)
        new = jax.tree.map(direction, updates, mu, nu)
        stored = None if state.mu is None else optax.tree.cast_like(mu, state.mu)
        return new, ScaleByAdamState(count, stored, optax.tree.cast_like(nu, state.nu))

    return optax.GradientTransformationExtraArgs(*typed(init, update))
