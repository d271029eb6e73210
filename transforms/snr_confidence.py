r"""Scales updates by trust in the tensor and focus on its entries, both from their share of signal.

    m = mu / (1 - b1^t),  s = nu / (1 - b2^(t-1)),   a = m^2 / (m^2 + s),  abar = mean of the tensor's a
    u' = (c_min + (1 - c_min) abar)^robustness  clip(a / (abar + eps), rel_floor, 1)  u
              trust                                      focus

mu and nu are those of `scale_by_belief`: nu is a variance. Source: the CASMO repository, commit
e81a36e. Departure: the moments' `deviation`, see there; and robustness may be any number from 0 on,
as in the code, where the README says up to 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import check_bounds, check_choice, check_params, require
from chainrule.transforms._numerics import share, up
from chainrule.transforms._per_parameter import PerParameter, unstacked
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._sums import means
from chainrule.transforms._trees import leaves_beside
from chainrule.transforms._words import checked_words
from chainrule.transforms.scale_by_belief import DEVIATIONS, corrections

_REMEDY = (
    "use `chainrule.chain` in place of `optax.chain` with `scale_by_belief` before it, or give "
    "`update` the moments as `mu=`, `nu=` and `count=`"
)


class SnrConfidenceState(NamedTuple):
    """State of `snr_confidence`: what the last update knew, and nothing that the next one needs."""

    agar: PerParameter
    """float32: abar, the mean share of signal."""

    metric_fields = ("agar",)


@checked_words
def snr_confidence(
    *,
    robustness: jax.typing.ArrayLike = 0.5,
    c_min: jax.typing.ArrayLike = 0.1,
    rel_floor: jax.typing.ArrayLike = 0.1,
    eps: jax.typing.ArrayLike = 1e-8,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    deviation: str = "unbiased",
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by trust x focus.

    $$u'_i = \big(c_{min} + (1 - c_{min})\,\bar a\big)^{\rho}\,
    \mathrm{clip}\Big(\frac{a_i}{\bar a + \epsilon}, f, 1\Big)\, u_i,\qquad
    a_i = \frac{\hat\mu_i^2}{\hat\mu_i^2 + \hat\nu_i}$$

    With `robustness=0, rel_floor=1` the updates pass unchanged. Entries without gradient have a = 0
    and count in the mean. A mean that is not finite is shown as such by `chainrule.metrics` and
    taken for 0.

    Args:
      robustness: exponent of trust, at least 0; 0 trusts every tensor fully.
      c_min: trust of a tensor of pure noise before the exponent, in [0, 1].
      rel_floor: least focus, in [0, 1]; 1 is no focus.
      eps: added to the mean that shares are compared with, at least 0.
      b1: decay of the first moment, in [0, 1), as in `scale_by_belief`.
      b2: decay of the second moment, likewise.
      deviation: that of `scale_by_belief`, which decides how nu is bias-corrected.

    Returns:
      A `optax.GradientTransformationExtraArgs`. Its `update` takes the extra arguments `mu`, `nu`
      and `count`.

    Raises:
      ValueError: an argument outside its range; at `update`, missing moments.
      TypeError: a parameter that is not real floating point.

    >>> from chainrule.transforms import chain, scale_by_belief
    >>> tx = chain(scale_by_belief(), snr_confidence())
    >>> g = jnp.array([3.0, -0.5])
    >>> u, state = tx.update(g, tx.init(g))
    >>> u.round(4).tolist(), float(state[1].agar.tree())
    ([1.0, -1.0], 1.0)

    References:
      CASMO, repository commit e81a36e.
    """
    owner = "snr_confidence"
    check_bounds(
        owner, robustness=robustness, c_min=c_min, rel_floor=rel_floor, eps=eps, b1=b1, b2=b2
    )
    check_choice(owner, "deviation", deviation, DEVIATIONS)

    def init(params: Tree) -> SnrConfidenceState:
        check_params(owner, params, real=True)
        return SnrConfidenceState(PerParameter.full(0.0, params))

    def update(
        updates: Tree,
        state: SnrConfidenceState,
        params: Tree = None,
        *,
        mu: Tree = None,
        nu: Tree = None,
        count: jax.Array | None = None,
        **_: Any,
    ) -> tuple[Tree, SnrConfidenceState]:
        del params
        mu, nu = require(owner, "mu", mu, _REMEDY), require(owner, "nu", nu, _REMEDY)
        count = require(owner, "count", count, _REMEDY)
        c1, c2 = corrections(b1, b2, count, deviation)
        tiny = float(jnp.finfo(jnp.float32).tiny)
        mus, nus = (
            leaves_beside(owner, name, updates, tree) for name, tree in (("mu", mu), ("nu", nu))
        )
        (agar,) = means("variance_share", mus, nus, c1 * c1 / c2)
        # The factors of all tensors are computed side by side: a kernel for each would cost as much
        # as a small tensor's.
        abar = jnp.where(jnp.isfinite(agar), agar, jnp.float32(0))
        base = c_min + (1 - c_min) * abar
        some = base > 0
        trust = jnp.where(some, jnp.where(some, base, 1) ** robustness, robustness == 0)
        # Multiplied by: XLA would turn a / b / c into a / (b c), which is 0 / 0 for small b and c.
        inverse = share(jnp.float32(1), jnp.maximum(abar + eps, tiny))

        def scaled(
            u: jax.Array, m: jax.Array, v: jax.Array, trust: jax.Array, inverse: jax.Array
        ) -> jax.Array:
            signal = (up(m) * (1 / c1)) ** 2
            part = share(signal, jnp.maximum(signal + up(v) * (1 / c2), tiny))
            return (up(u) * trust * jnp.clip(part * inverse, rel_floor, 1)).astype(u.dtype)

        leaves, structure = jax.tree.flatten(updates)
        columns = zip(leaves, mus, nus, unstacked(trust), unstacked(inverse), strict=True)
        new = jax.tree.unflatten(structure, [scaled(*column) for column in columns])
        return new, SnrConfidenceState(state.agar.replace(agar))

    return optax.GradientTransformationExtraArgs(*typed(init, update))
