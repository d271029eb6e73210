r"""Scales updates by a confidence calibrated on AGAR, the share of the gradient that is signal.

    AGAR = mean_i [ m_i^2 / max(v_i, m_i^2) ],   m = mu / (1 - b1^t),  v = nu / (1 - b2^t)
    u' = confidence(AGAR) u
    confidence(x) = clip(x, c_min, 1) for the first samples,
                    c_min + (1 - c_min) sigmoid((x - tau) / std) after

tau and std are the mean and standard deviation of the first `tau_init_steps` samples; the map is
frozen then.

Source: the CASMO repository, its first version (commit 2bed798), THEORY.md. Departures, each an
argument that leads back: the code centres on a clipped median (`center`, `tau_clip_range`), takes
the moments as they are, which puts AGAR near one for hundreds of steps whatever the gradient
(`debias`), clamps them, which raises AGAR of heavy tails (`clamp_factor`), adds an eps that makes
AGAR depend on the gradient's scale (`eps`), replaces the user's c_min (`adapt_c_min`) and lets the
tensors of granularity "parameter" share one calibration, which ends in the middle of a step
(`shared_calibration`).
"""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from chainrule.transforms._agar import clamped, signal_share
from chainrule.transforms._calibration import Calibration, CalibrationState, check_calibration
from chainrule.transforms._checks import (
    check_bounds,
    check_choice,
    check_params,
    require,
    zeros_like,
)
from chainrule.transforms._numerics import bias_correction, ema, increment, up
from chainrule.transforms._per_parameter import PerParameter
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._trees import leaves_beside, map_unmasked
from chainrule.transforms._words import checked_words

_REMEDY = (
    "use `chainrule.chain` in place of `optax.chain` with a link before it that keeps moments, "
    'such as `scale_by_adam`, or source="direction" (Adam\'s updates are enough) or source="own" '
    "(it keeps moments itself)"
)


class AgarConfidenceState(NamedTuple):
    """State of `agar_confidence`."""

    count: jax.Array | None
    """int32 scalar: updates made; `None` if the moments come from upstream."""
    mu: optax.Updates | None
    """First moment, like the parameters, in `mu_dtype`; `None` unless source is "own"."""
    nu: optax.Updates | None
    """Second moment, like the parameters, in `nu_dtype`; `None` unless source is "own"."""
    agar: jax.Array | PerParameter
    """float32 scalar, with granularity "parameter" one for each: AGAR of the last update."""
    confidence: jax.Array | PerParameter
    """Likewise: what the last update was multiplied by."""
    calibration: CalibrationState
    """The samples and the map; one, or with granularity "parameter" one a parameter."""

    metric_fields = ("agar", "confidence")


@checked_words
def agar_confidence(
    tau_init_steps: int | None = None,
    *,
    c_min: jax.typing.ArrayLike = 0.1,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    source: str = "upstream",
    granularity: str = "group",
    center: str = "mean",
    tau_clip_range: tuple[float, float] | None = None,
    clamp_factor: jax.typing.ArrayLike | None = None,
    debias: bool = True,
    eps: jax.typing.ArrayLike | None = None,
    adapt_c_min: bool = False,
    shared_calibration: bool = False,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by one confidence in (0, 1], for the whole tree or tensor by tensor.

    $$u' = c\,u,\qquad
    c = c_{min} + (1 - c_{min})\,\sigma\!\Big(\frac{\mathrm{AGAR} - \tau}{s}\Big),\qquad
    \mathrm{AGAR} = \overline{\hat\mu^2 / \max(\hat\nu, \hat\mu^2)}$$

    What it does to training is a schedule of the rate and, where decay follows it unscaled, the
    inverse one of the decay for a step; the second seems to be what harms (`chainrule evidence E1`).

    AGAR is 1 for a constant gradient and about \((1-b_1)/(1+b_1)\) for noise. Entries whose
    gradient was always zero have AGAR 0. An AGAR that is not finite is shown as such by
    `chainrule.metrics`, never becomes a sample, and yields the least confidence.

    Args:
      tau_init_steps: samples that the calibration takes, at least 1. `None`: max(500, 50 / (1 -
        b1)).
      c_min: least confidence, in [0, 1].
      b1: decay of the first moment, in [0, 1); that of its owner if it comes from upstream.
      b2: decay of the second moment, likewise.
      source: `"upstream"`, the moments of an earlier link, and no memory of its own; `"direction"`,
        recovered from Adam's updates, of which m^2/v is the square, up to Adam's eps; `"own"`,
        moments kept here of the argument `grad`, or of the updates where it is not given.
      granularity: `"group"`, one AGAR over all entries of the tree; `"parameter"`, one a tensor.
      center: tau is the `"mean"` of the samples (THEORY.md) or their `"median"` (the repository's
        code).
      tau_clip_range: bounds of tau, within [0, 1]; the repository has (0.01, 0.5), which usually
        binds. `None`: none.
      clamp_factor: clamp moments to this many times their mean magnitude before AGAR, positive; the
        repository has 10. `None`: no clamp.
      debias: divide the moments by 1 - b^t; the repository does not.
      eps: least noise, and added to the denominator, at least 0; the repository has Adam's eps.
        `None`: no such number, so that AGAR does not depend on the gradient's scale.
      adapt_c_min: once calibrated, replace c_min by 0.1, 0.3 or 0.5 as the samples vary, as the
        repository does.
      shared_calibration: with granularity "parameter", one calibration that takes a sample from
        each tensor at each step, in leaf order, as in the repository. Otherwise each tensor has its
        own.
      mu_dtype: dtype of an own `mu`, default the parameter's.
      nu_dtype: dtype of an own `nu`, default the parameter's.

    Returns:
      A `optax.GradientTransformationExtraArgs`. Its `update` takes the extra arguments `mu`, `nu`,
      `count` and `grad`.

    Raises:
      ValueError: an argument outside its range; `clamp_factor` with source "direction"; at
        `update`, missing moments.
      TypeError: a parameter that is not real floating point.

    >>> tx = optax.chain(optax.scale_by_adam(), agar_confidence(source="direction"))
    >>> u, state = tx.update(jnp.array([3.0, -0.5]), tx.init(jnp.zeros(2)))
    >>> print(f"{state[1].agar:.3f} {state[1].confidence:.3f}")
    1.000 1.000

    References:
      CASMO, repository commit 2bed798.
    """
    owner = "agar_confidence"
    check_bounds(
        owner,
        tau_init_steps=tau_init_steps,
        c_min=c_min,
        b1=b1,
        b2=b2,
        clamp_factor=clamp_factor,
        eps=eps,
    )
    check_choice(owner, "source", source, ("upstream", "direction", "own"))
    check_choice(owner, "granularity", granularity, ("group", "parameter"))
    check_calibration(owner, tau_init_steps, center, tau_clip_range)
    if clamp_factor is not None and source == "direction":
        raise ValueError(
            f'{owner}: `clamp_factor` clamps the moments, which source="direction" has not; use '
            'source="upstream" or "own", or clamp_factor=None'
        )
    by_group = granularity == "group"

    def calibration(steps: int) -> Calibration:
        return Calibration(steps, center, tau_clip_range, c_min, adapt_c_min)

    def init(params: Tree) -> AgarConfidenceState:
        check_params(owner, params, real=True)
        steps = _default_steps(b1) if tau_init_steps is None else int(tau_init_steps)
        shape = () if by_group or shared_calibration else (len(jax.tree.leaves(params)),)

        def each(value: float) -> jax.Array | PerParameter:
            return jnp.float32(value) if by_group else PerParameter.full(value, params)

        own = source == "own"
        return AgarConfidenceState(
            count=None if source == "upstream" else jnp.zeros((), jnp.int32),
            mu=zeros_like(owner, params, mu_dtype) if own else None,
            nu=zeros_like(owner, params, nu_dtype) if own else None,
            agar=each(0.0),
            confidence=each(1.0),
            calibration=calibration(steps).init(shape),
        )

    def update(
        updates: Tree,
        state: AgarConfidenceState,
        params: Tree = None,
        *,
        mu: Tree = None,
        nu: Tree = None,
        count: jax.Array | None = None,
        grad: Tree = None,
        **_: Any,
    ) -> tuple[Tree, AgarConfidenceState]:
        del params
        kept: dict[str, Any] = {}
        if state.count is not None:
            count = kept["count"] = increment(state.count)
        if state.mu is not None and state.nu is not None:
            gradient = updates if grad is None else grad
            mu = map_unmasked(lambda _, old, g: ema(b1, old, g), updates, state.mu, gradient)
            nu = map_unmasked(
                lambda _, old, g: ema(b2, old, up(g) ** 2), updates, state.nu, gradient
            )
            kept["mu"] = optax.tree.cast_like(mu, state.mu)
            kept["nu"] = optax.tree.cast_like(nu, state.nu)
        if source == "direction":
            ms = jax.tree.leaves(updates)
            vs = [jnp.float32(1)] * len(ms)
        else:
            ms, vs = (
                leaves_beside(owner, name, updates, require(owner, name, tree, _REMEDY))
                for name, tree in (("mu", mu), ("nu", nu))
            )

        scale = jnp.float32(1)  # of nu, so that m^2 / (scale v) is the wanted ratio
        if debias != (source == "direction"):
            count = require(owner, "count", count, _REMEDY)
            scale = bias_correction(b1, count) ** 2 / bias_correction(b2, count)
            scale = 1 / scale if source == "direction" else scale
        if clamp_factor is not None:
            ms, vs = clamped(ms, vs, clamp_factor, eps, by_group)
        agar, counts = signal_share(ms, vs, scale, eps, by_group)

        fit = calibration(state.calibration.samples.shape[-1])
        side_by_side = state.calibration.filled.ndim == 1
        samples = agar.astype(jnp.float32).reshape((-1, 1) if side_by_side else (-1,))
        fitted, confidence = fit(
            state.calibration, samples, jnp.asarray(counts).reshape(samples.shape)
        )
        confidence = confidence.reshape(-1)

        leaves, structure = jax.tree.flatten(updates)
        factors = [confidence[0 if by_group else i] for i in range(len(leaves))]
        new = [(up(u) * c).astype(u.dtype) for u, c in zip(leaves, factors, strict=True)]

        def shown(old: Any, vector: jax.Array) -> jax.Array | PerParameter:
            return vector[0] if by_group else old.replace(vector)

        state = state._replace(
            agar=shown(state.agar, samples.reshape(-1)),
            confidence=shown(state.confidence, confidence),
            calibration=fitted,
            **kept,
        )
        return jax.tree.unflatten(structure, new), state

    return optax.GradientTransformationExtraArgs(*typed(init, update))


def _default_steps(b1: Any) -> int:
    """Long enough for the first moment to forget its start 50 times over."""
    if isinstance(b1, jax.core.Tracer):
        raise ValueError(
            "agar_confidence: tau_init_steps=None derives the length of a buffer from `b1`, which "
            "is traced; give `tau_init_steps` an integer"
        )
    return max(500, round(50 / (1 - float(b1))))
