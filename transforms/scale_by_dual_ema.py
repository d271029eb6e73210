r"""Two EMAs of the gradient with a short and a long horizon, blended, over the root of a second moment.

    mu_t = b1 mu_{t-1} + (1 - b1) g_t        mu_long_t = b1_long mu_long_{t-1} + (1 - b1_long) g_t
    m_t  = blend mu_hat_t + (1 - blend) mu_long_hat_t
    nu_t = b2 nu_{t-1} + (1 - b2) g_t^2      u_t = m_t / (sqrt(nu_hat_t) + eps)

Source: COSMIC, repository commit 96f1a8c (tier 2). Departures: both moments are bias corrected, by
the count of updates that this state has seen, where COSMIC corrects only nu, by the global step;
and an EMA whose weight in the blend is 0 is not stored.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._blended_step import blended_step
from chainrule.transforms._checks import check_bounds, check_choice, require, zeros_like
from chainrule.transforms._numerics import bias_correction, increment
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._words import checked_words


class ScaleByDualEmaState(NamedTuple):
    """State of `scale_by_dual_ema`; moments are like the parameters, in `state_dtype`."""

    count: jax.Array
    """int32 scalar: updates made since `init`."""
    mu: optax.Updates | None
    """EMA with the short horizon; `None` if `blend` is 0."""
    mu_long: optax.Updates | None
    """EMA with the long horizon; `None` if `blend` is 1."""
    nu: optax.Updates | None
    """Second moment; `None` with `b2=None`."""

    codes_for = ("mu", "mu_long")  # see `quantized_state`


@checked_words
def scale_by_dual_ema(
    b1: jax.typing.ArrayLike = 0.9,
    *,
    b1_long: jax.typing.ArrayLike = 0.99,
    b2: jax.typing.ArrayLike | None = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    blend: float | Sequence[float] = 1.0,
    blend_by: str = "synced_tier",
    start: str = "zero",
    debias: str = "both",
    clock: str = "own",
    keep_long: bool = False,
    state_dtype: Any = None,
    kernel: str = "xla",
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by a blend of two EMAs over the root of the second moment.

    $$u_t = \frac{\beta\hat\mu_t + (1-\beta)\hat\mu^{long}_t}{\sqrt{\hat\nu_t} + \epsilon}$$

    Args:
      b1: decay of the EMA with the short horizon, in [0, 1).
      b1_long: decay of the EMA with the long horizon, in [0, 1).
      b2: decay of the second moment, in [0, 1); `None`: no denominator and no second moment.
      eps: added to the denominator, at least 0.
      blend: weight of the short EMA, in [0, 1]; or one for each tier, lowest first, of which
        `tiered_state` says the one in force (arguments `tier` and `synced_tier` of `update`).
      blend_by: `"synced_tier"`, full-sync steps take the blend of the higher tier; `"tier"`, they
        do not.
      start: `"zero"`, EMAs start at zero; `"gradient"`, at the first gradient.
      debias: `"both"`, both moments are divided by 1 - decay^t (the first not with
        `start="gradient"`); `"second"`, only nu, as COSMIC does.
      clock: the t of the correction. `"own"`: updates of this state; `"chain"`: the step that
        `tiered_state` counts (argument `step` of `update`), as COSMIC does: a tensor promoted late
        then takes steps several times too large.
      keep_long: store the long EMA although the blend does not use it (COSMIC does, for its
        mismatch signal).
      state_dtype: dtype of the moments, default the parameter's.
      kernel: on a CPU `"xla"`; `"native"`, the compiled kernel; `"auto"`, what
        `benchmarks/speed/native.py` finds faster: the kernel in a bridge and on what
        `quantized_state` holds in codes; else XLA.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range; `clock="chain"` or a blend for each tier without
      `tiered_state`.
      TypeError: a parameter that is not floating point.

    >>> tx = scale_by_dual_ema()
    >>> u, state = tx.update(jnp.array([3.0, -0.5]), tx.init(jnp.zeros(2)))
    >>> [round(float(x), 4) for x in u], state.mu_long
    ([1.0, -1.0], None)

    References:
      COSMIC, https://github.com/Kranium2002/COSMIC
    """
    check_bounds("scale_by_dual_ema", b1=b1, b1_long=b1_long, b2=b2, eps=eps)
    check_choice("scale_by_dual_ema", "blend_by", blend_by, ("tier", "synced_tier"))
    check_choice("scale_by_dual_ema", "start", start, ("zero", "gradient"))
    check_choice("scale_by_dual_ema", "debias", debias, ("both", "second"))
    check_choice("scale_by_dual_ema", "clock", clock, ("own", "chain"))
    check_choice("scale_by_dual_ema", "kernel", kernel, ("xla", "native", "auto"))
    blends = tuple(blend) if isinstance(blend, Sequence) else (blend,)
    for weight in blends:
        check_bounds("scale_by_dual_ema", blend=weight)
    by_tier = isinstance(blend, Sequence)
    has_short = any(weight != 0 for weight in blends)
    has_long = keep_long or any(weight != 1 for weight in blends)

    def init(params: Tree) -> ScaleByDualEmaState:
        def zeros() -> Tree:
            return zeros_like("scale_by_dual_ema", params, state_dtype)

        return ScaleByDualEmaState(
            count=jnp.zeros((), jnp.int32),
            mu=zeros() if has_short else None,
            mu_long=zeros() if has_long else None,
            nu=None if b2 is None else zeros(),
        )

    def update(
        updates: Tree,
        state: ScaleByDualEmaState,
        params: Tree = None,
        *,
        step: jax.Array | None = None,
        tier: int | None = None,
        synced_tier: Any = None,
        **_: Any,
    ) -> tuple[Tree, ScaleByDualEmaState]:
        del params
        remedy = "wrap it in `tiered_state`, or pass it to `update`"
        count = increment(state.count)
        if clock == "chain":
            t = require("scale_by_dual_ema", "step", step, remedy)
        else:
            t = count
        if by_tier:
            index = synced_tier if blend_by == "synced_tier" else tier
            index = require("scale_by_dual_ema", blend_by, index, remedy)
            short = jnp.asarray(blends, jnp.float32)[index]
        else:
            short = blends[0]

        # As the primitive has them: a correction must be that of the decay that the EMA really has.
        short_decay, long_decay = (jnp.asarray(b, jnp.float32) for b in (b1, b1_long))
        second_decay = jnp.asarray(0.0 if b2 is None else b2, jnp.float32)

        def decay(b: jax.Array) -> jax.Array:
            # Started at the gradient, an EMA is the gradient after the first update, as one of decay 0 is.
            return b if start == "zero" else jnp.where(state.count == 0, 0.0, b)

        corrected = debias == "both" and start == "zero"
        correct_short = bias_correction(short_decay, t) if corrected else 1.0
        correct_long = bias_correction(long_decay, t) if corrected else 1.0
        numbers = {
            "b1": decay(short_decay),
            "b1_long": decay(long_decay),
            "b2": second_decay,
            "eps": eps,
            "nu_correction": 1.0 if b2 is None else bias_correction(second_decay, t),
            "denominator": "none" if b2 is None else "root",
            "kernel": kernel,
        }
        if not has_short:  # the long EMA is the only one
            numbers |= {"b1": decay(long_decay), "mu_correction": correct_long}
            only = state._replace(mu=state.mu_long, mu_long=None)
            new, after = blended_step(updates, only, numbers)
            return new, after._replace(count=count, mu=None, mu_long=after.mu)
        if not has_long or (keep_long and not by_tier and short == 1):
            numbers["mu_correction"] = correct_short
        else:
            # w mu / c + (1 - w) mu_long / c_long with one correction for the sum.
            correction = 1 / (short / correct_short + (1 - short) / correct_long)
            weight = jnp.minimum(short * correction / correct_short, 1.0)
            numbers |= {"mu_correction": correction, "blend": weight}
        new, after = blended_step(updates, state, numbers)
        return new, after._replace(count=count)

    return optax.GradientTransformationExtraArgs(*typed(init, update))
