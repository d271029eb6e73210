r"""A first moment whose decay b1 follows how varied the gradient is, tensor by tensor.

    residual (STAM):     r = g - mu_{t-1};  sigma = EMA_{b2}(mean r^2);  tau = EMA_{td}(mean |r|);
                         z = sigma / (tau^2 + 1e-8)
    moments (STAMLite):  m1 = EMA_{md}(mean g);  m2 = EMA_{md}(mean g^2);
                         z = max(m2 - m1^2, 0) / (m2 + eps)
    both:                s = z / (1 + z);  b1 = b1_base (1 - a s)
    noise (ours):        b1 = 1 - k, the gain with which mu follows a drifting gradient best: see `_noise_signal.py`
    all:                 b1 within [max(1/2, b1_base (1 - a)), b1_base];  mu_t = b1 mu_{t-1} + (1 - b1) g

Source: the STAM repository, version 0.1.0. Departure: `debias` divides the EMAs of the residual
signal, whose horizons differ, by 1 - decay^t; without it z starts at ten times its value and b1
near 0.735 whatever the gradient. b1 falls back to b1_base where the signal is not finite or, in the
residual form, sigma >= fallback_threshold (tau^2 + 1e-8). And large entries are clamped: one square
that overflows would set the second moments to infinity for ever.

What the signals measure differs. z of the repository's two compares entries of one gradient with each
other: it does not change when all noise grows tenfold, and in the residual form b1 *rises* for a while
when noise jumps, since tau reacts before sigma. `"noise"` compares gradients over time: b1 rises with
noise and falls with drift.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms import _noise_signal
from chainrule.transforms._checks import check_bounds, check_choice, check_params, zeros_like
from chainrule.transforms._momentum_leaf import MomentumLeaf
from chainrule.transforms._numerics import HUGE, bias_correction, ema, finite, increment, up
from chainrule.transforms._per_parameter import PerParameter, unstacked
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._sums import means
from chainrule.transforms._words import checked_words


class AdaptiveBeta1State(NamedTuple):
    """State of `adaptive_beta1`. The numbers for each parameter are in `stat_dtype`."""

    count: jax.Array
    """int32 scalar: updates made."""
    mu: optax.Updates
    """First moment, like the parameters, in `state_dtype`."""
    b1: PerParameter
    """Decay used in the last update."""
    b1_prod: PerParameter
    """Product of all decays used: 1 - b1_prod is the weight that `mu` has given to gradients."""
    first: PerParameter
    """`"residual"`: tau, EMA of mean |r|; `"moments"`: EMA of mean g; `"noise"`: of mean |g_t - g_{t-1}|^2."""
    second: PerParameter
    """`"residual"`: sigma, EMA of mean r^2; `"moments"`: EMA of mean g^2; `"noise"`: of mean |g_t - mu_hat_{t-1}|^2."""
    nonfinite: PerParameter
    """bool: the last gradient had entries that are not finite, or squares that overflow."""
    noise: _noise_signal.NoiseSignalState | None = None
    """`"noise"`: the last gradient, in `state_dtype`, and numbers for each parameter; else `None`."""

    metric_fields = ("b1", "nonfinite")


@checked_words
def adaptive_beta1(
    b1_base: jax.typing.ArrayLike = 0.9,
    *,
    adapt_strength: jax.typing.ArrayLike = 0.2,
    signal: str = "residual",
    b2: jax.typing.ArrayLike = 0.999,
    tau_decay: jax.typing.ArrayLike = 0.99,
    fallback_threshold: jax.typing.ArrayLike = 100.0,
    moment_decay: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    b1_update_interval: jax.typing.ArrayLike = 1,
    debias: bool = True,
    debias_eps: jax.typing.ArrayLike = 0.0,
    nonfinite: str = "skip",
    max_abs: jax.typing.ArrayLike | None = HUGE,
    state_dtype: Any = None,
    stat_dtype: Any = jnp.float32,
) -> optax.GradientTransformation:
    r"""Keeps a first moment with a per-tensor adaptive decay and hands it on with the raw gradient.

    $$b_1 = \mathrm{clip}\big(b_{base}(1 - a\,s),\ \max(\tfrac12, b_{base}(1-a)),\ b_{base}\big),
    \quad s = z/(1+z)$$

    and with signal "noise", for noise \(s^2\) and drift \(d^2\) of the gradient a step,

    $$b_1 = \mathrm{clip}\Big(1 - \frac{2d}{d + \sqrt{d^2 + 4 s^2}},\ \dots\Big)$$

    The updates it returns are momentum leaves, which `scale_by_adam` and `scale_by_tensor_rms` of
    this package read; any other link raises a `TypeError` that says so.

    Args:
      b1_base: largest decay, in [0.5, 1).
      adapt_strength: a, how far b1 may fall below `b1_base`, relatively, in [0, 0.5].
      signal: `"residual"` (STAM), `"moments"` (STAMLite) or `"noise"`, which keeps the last gradient
        too and wants room, such as `b1_base=0.98, adapt_strength=0.45`.
      b2: decay of sigma, in [0, 1) (residual).
      tau_decay: decay of tau, in [0, 1) (residual).
      fallback_threshold: b1 is `b1_base` where sigma reaches this many times tau^2, positive
        (residual).
      moment_decay: decay of the two EMAs, in [0, 1) (moments, noise).
      eps: added to the denominator of z, at least 0 (moments).
      b1_update_interval: b1 is renewed at updates 1, 1 + k, 1 + 2k, ...; an integer, at least 1.
      debias: divide the EMAs by 1 - decay^t before z (residual, moments).
      debias_eps: added to that divisor, at least 0 (the STAMLite repository uses its eps here).
      nonfinite: entries that are NaN or infinite are always zeroed in the moment and in the
        gradient handed on. `"skip"`: the statistics of a tensor with such entries are not taken in
        and its b1 is `b1_base` (as STAM documents; free of charge). `"zero"`: the statistics are of
        the zeroed gradient (as STAM's code does; the zeroed gradient is then written to memory
        first, which makes the step several times slower in XLA on CPU).
      max_abs: clamp on finite entries, positive, so that squares do not overflow; `None`: none, as
        in the repository.
      state_dtype: dtype of `mu` and of the last gradient, default the parameter's.
      stat_dtype: dtype of the scalars, default float32 (EMAs with decay 0.99 stall in bfloat16).

    Returns:
      A `optax.GradientTransformation`.

    Raises:
      ValueError: an argument outside its range.
      TypeError: a parameter that is not real floating point.

    >>> from chainrule.transforms import scale_by_adam
    >>> tx = optax.chain(adaptive_beta1(), scale_by_adam())
    >>> u, state = tx.update(jnp.array([3.0, -0.5]), tx.init(jnp.zeros(2)))
    >>> u.round(4).tolist()
    [1.0, -1.0]
    >>> 0.72 <= float(state[0].b1.tree()) <= 0.9
    True

    References:
      STAM, package `stam-optimizer` 0.1.0. Muth (1960), JASA 55, 299-306, on the best decay of an
      average; Mehra (1970), IEEE TAC 15, 175-184, on measuring it.
    """
    check_bounds(
        "adaptive_beta1",
        b1_base=b1_base,
        adapt_strength=adapt_strength,
        b2=b2,
        tau_decay=tau_decay,
        fallback_threshold=fallback_threshold,
        moment_decay=moment_decay,
        eps=eps,
        b1_update_interval=b1_update_interval,
        debias_eps=debias_eps,
        max_abs=max_abs,
    )
    check_choice("adaptive_beta1", "nonfinite", nonfinite, ("skip", "zero"))
    check_choice("adaptive_beta1", "signal", signal, ("residual", "moments", "noise"))
    decays = (tau_decay, b2) if signal == "residual" else (moment_decay, moment_decay)

    def init(params: Tree) -> AdaptiveBeta1State:
        check_params("adaptive_beta1", params, real=True)

        def each(value: Any, dtype: Any = stat_dtype) -> PerParameter:
            return PerParameter.full(value, params, dtype)

        def zeros() -> Tree:
            return zeros_like("adaptive_beta1", params, state_dtype)

        return AdaptiveBeta1State(
            count=jnp.zeros((), jnp.int32),
            mu=zeros(),
            b1=each(b1_base),
            b1_prod=each(1.0),
            first=each(0.0),
            second=each(0.0),
            nonfinite=each(False, bool),
            noise=_noise_signal.start(params, zeros(), stat_dtype) if signal == "noise" else None,
        )

    def update(
        updates: Tree, state: AdaptiveBeta1State, params: Tree | None = None
    ) -> tuple[Tree, AdaptiveBeta1State]:
        del params
        count = increment(state.count)
        renew = state.count % jnp.asarray(b1_update_interval, jnp.int32) == 0
        raw, structure = jax.tree.flatten(updates)
        mus = structure.flatten_up_to(state.mu)
        safe = [finite(g, max_abs) for g in raw]
        measured = raw if nonfinite == "skip" else safe
        noise = state.noise
        if noise is not None:
            mean, square = _noise_signal.square_differences(noise, measured, mus, state.b1_prod)
        elif signal == "residual":
            mean, square = means("residual", measured, mus)
        else:
            mean, square = means("moments", measured)
        bad = ~(jnp.isfinite(mean) & jnp.isfinite(square))
        left_out = bad if nonfinite == "skip" else None
        if noise is not None:
            noise, left_out = _noise_signal.averaged(noise, moment_decay, bad)

        def taken_in(decay: Any, old: jax.Array, new: jax.Array) -> jax.Array:
            new = ema(decay, old, new)
            return new if left_out is None else jnp.where(left_out, up(old), new)

        first = taken_in(decays[0], state.first.values, mean)
        second = taken_in(decays[1], state.second.values, square)
        b1, fall_back = wanted(count, first, second, noise)
        if nonfinite == "skip":
            fall_back |= bad
        lowest = jnp.maximum(0.5, b1_base * (1 - adapt_strength))
        b1 = jnp.where(fall_back, b1_base, jnp.clip(b1, lowest, b1_base))
        b1 = jnp.where(renew, b1, up(state.b1.values))
        b1_prod = up(state.b1_prod.values) * b1
        if noise is not None:
            noise = _noise_signal.stepped(noise, measured, b1, b1_prod, bad)

        if signal == "moments" and nonfinite == "skip":
            # The scale of `scale_by_tensor_rms` leaves the gradient out too, so what overflowed must not move anything.
            safe = [
                jnp.where(is_bad & (jnp.abs(up(g)) >= HUGE), 0, g)
                for g, is_bad in zip(safe, unstacked(bad), strict=True)
            ]
        mu = [ema(*each) for each in zip(unstacked(b1), mus, safe, strict=True)]
        squares = unstacked(square) if signal == "moments" else [None] * len(mu)
        corrections = unstacked(1 - b1_prod)
        leaves = [MomentumLeaf(*each) for each in zip(mu, safe, corrections, squares, strict=True)]
        return jax.tree.unflatten(structure, leaves), AdaptiveBeta1State(
            count=count,
            mu=optax.tree.cast_like(jax.tree.unflatten(structure, mu), state.mu),
            b1=state.b1.replace(b1),
            b1_prod=state.b1_prod.replace(b1_prod),
            first=state.first.replace(first),
            second=state.second.replace(second),
            nonfinite=state.nonfinite.replace(bad),
            noise=noise,
        )

    def wanted(
        count: jax.Array, first: jax.Array, second: jax.Array, noise: Any
    ) -> tuple[Any, jax.Array]:
        """b1 before it is held in its bounds, and where it is `b1_base` instead."""
        if noise is not None:
            return _noise_signal.best_b1(noise, first, second)
        if debias:
            first = first / (bias_correction(decays[0], count) + debias_eps)
            second = second / (bias_correction(decays[1], count) + debias_eps)
        if signal == "residual":
            scale = first * first + 1e-8
            z = second / scale
            fall_back = ~jnp.isfinite(second) | (second >= fallback_threshold * scale)
        else:
            scale = second + eps
            scale = jnp.where(scale == 0, 1, scale)  # 0 / 0 has no derivative, wanted or not
            z = jnp.maximum(second - first * first, 0) / scale
            fall_back = ~jnp.isfinite(z)
        return b1_base * (1 - adapt_strength * z / (1 + z)), fall_back

    return optax.GradientTransformation(*typed(init, update))
