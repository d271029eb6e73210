r"""The decay of a first moment that follows a drifting gradient best: a Kalman filter with its gain measured.

The gradient of a tensor is taken as a mean that drifts, seen through noise:

    g_t = theta_t + s e_t,        theta_t = theta_{t-1} + d h_t        (e, h white, of unit variance)

A first moment m_t = m_{t-1} + k_t (g_t - m_{t-1}), with k = 1 - b1 but for bias correction, is off by

    E |m_t - theta_t|^2 = n_t s^2 + l_t d^2,    n_t = (1 - k_t)^2 n_{t-1} + k_t^2,   l_t = (1 - k_t)^2 (l_{t-1} + 1)

which at a constant b1 tends to s^2 (1 - b1) / (1 + b1) + d^2 b1^2 / (1 - b1^2): noise asks for a larger b1, drift for a
smaller one. The sum is least at the steady gain of the Kalman filter of this model (Muth 1960; Harvey 1989, 4.1.2),

    k = 2 d / (d + sqrt(d^2 + 4 s^2)),          b1 = 1 - k

Noise and drift are told apart by two differences that a tensor shows at every step, over its entries:

    E |g_t - g_{t-1}|^2 = 2 s^2 + d^2,          E |g_t - m_{t-1}|^2 = (1 + n_{t-1}) s^2 + (1 + l_{t-1}) d^2

(Mehra 1970 estimates a filter's gain from its innovations in this way.) Both sides are averaged with one decay over the
same steps, so the averages' bias corrections and horizons cancel, also while b1 moves.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._numerics import ema, root, up
from chainrule.transforms._per_parameter import PerParameter, unstacked
from chainrule.transforms._sums import means


class NoiseSignalState(NamedTuple):
    """What tells noise and drift apart, beside the averages of the two squared differences."""

    previous: optax.Updates
    """The last gradient that was taken in, like the moment."""
    started: PerParameter
    """bool: there is one."""
    weight: PerParameter
    """Weight that the averages have given to differences: their bias correction."""
    noise_factor: PerParameter
    """Average of 1 + n, the factor of s^2 in the residual."""
    drift_factor: PerParameter
    """Average of 1 + l, the factor of d^2 in the residual."""
    noise_share: PerParameter
    """n: the moment's squared error for each s^2."""
    drift_share: PerParameter
    """l: the moment's squared error for each d^2."""


def start(params: Any, previous: Any, dtype: Any) -> NoiseSignalState:
    """The state before the first gradient; `previous` is zeros like the moment."""

    def each(value: Any, dtype: Any = dtype) -> PerParameter:
        return PerParameter.full(value, params, dtype)

    return NoiseSignalState(previous, each(False, bool), *(each(0.0) for _ in range(5)))


def square_differences(
    state: NoiseSignalState, grads: list[jax.Array], mus: list[jax.Array], b1_prod: PerParameter
) -> list[jax.Array]:
    """The means of |g - previous|^2 and |g - m|^2 over each tensor, as two vectors.

    Args:
      state: before the gradients.
      grads: the gradients.
      mus: the moments before them, without bias correction.
      b1_prod: product of the decays used for `mus`.
    """
    previous = jax.tree.leaves(state.previous)
    corrections = unstacked(_weight(up(b1_prod.values)))
    moments = [up(mu) / c for mu, c in zip(mus, corrections, strict=True)]
    return [means("residual", grads, other)[1] for other in (previous, moments)]


def averaged(
    state: NoiseSignalState, decay: Any, bad: jax.Array
) -> tuple[NoiseSignalState, jax.Array]:
    """The state with the factors averaged as the differences are, and where these are left out.

    They are where a gradient is `bad`, and where it is the first, which has no difference.
    """
    left_out = bad | ~state.started.values

    def taken_in(old: PerParameter, new: Any) -> PerParameter:
        values = up(old.values)
        return old.replace(jnp.where(left_out, values, ema(decay, values, new)))

    new = state._replace(
        weight=taken_in(state.weight, jnp.float32(1)),
        noise_factor=taken_in(state.noise_factor, 1 + up(state.noise_share.values)),
        drift_factor=taken_in(state.drift_factor, 1 + up(state.drift_share.values)),
    )
    return new, left_out


def best_b1(
    state: NoiseSignalState, steps: jax.Array, residuals: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """1 - k for the averages of the squared differences, and where these do not tell noise from drift.

    >>> import numpy as np
    >>> state = start(jnp.zeros(()), jnp.zeros(()), jnp.float32)
    >>> b1, (noise, drift) = 0.9, (4.0, 0.04)
    >>> one, n, l = (x * jnp.ones(1) for x in (1.0, 2 / (1 + b1), 1 / (1 - b1**2)))
    >>> state = state._replace(**{k: PerParameter(v, None) for k, v in
    ...                           {"weight": one, "noise_factor": n, "drift_factor": l}.items()})
    >>> best, unknown = best_b1(state, (2 * noise + drift) * one, n * noise + l * drift)
    >>> print(f"{best[0]:.3f} {1 - 0.4 / (0.2 + (0.04 + 16) ** 0.5):.3f}")
    0.905 0.905
    """
    weight, noise_factor, drift_factor = (
        up(v.values) for v in (state.weight, state.noise_factor, state.drift_factor)
    )
    apart = 2 * drift_factor - noise_factor  # 0 until a moment is more than the last gradient
    known = apart > 1e-3 * drift_factor
    steps = steps / jnp.where(known, weight, 1)
    noise = jnp.maximum((drift_factor * steps - residuals) / jnp.where(known, apart, 1), 0)
    drift = root(jnp.maximum(steps - 2 * noise, 0))
    scale = drift + root(drift * drift + 4 * noise)
    known &= scale > 0
    return 1 - 2 * drift / jnp.where(known, scale, 1), ~known


def stepped(
    state: NoiseSignalState,
    grads: list[jax.Array],
    b1: jax.Array,
    b1_prod: jax.Array,
    bad: jax.Array,
) -> NoiseSignalState:
    """The state after the moments took the gradients in with decays `b1`, whose product is `b1_prod`.

    A gradient that is `bad` is no previous one.
    """
    old, structure = jax.tree.flatten(state.previous)
    previous = [
        jnp.where(is_bad, before, g.astype(before.dtype))
        for is_bad, before, g in zip(unstacked(bad), old, grads, strict=True)
    ]
    gain = (1 - b1) / _weight(b1_prod)
    kept = (1 - gain) ** 2
    return state._replace(
        previous=jax.tree.unflatten(structure, previous),
        started=state.started.replace(state.started.values | ~bad),
        noise_share=state.noise_share.replace(kept * up(state.noise_share.values) + gain**2),
        drift_share=state.drift_share.replace(kept * (up(state.drift_share.values) + 1)),
    )


def _weight(b1_prod: jax.Array) -> jax.Array:
    """What a moment is divided by: 1 before the first gradient, when it is 0."""
    return jnp.where(b1_prod < 1, 1 - b1_prod, 1)
