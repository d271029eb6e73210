r"""Shrinks updates while the gradient's signal is unstable, tier by tier.

    a_t = mean over gated tensors of mean|g|           v_t = mean of var(g) / (mean|g|^2 + 1e-12)
    e_t = 0.9 e_{t-1} + 0.1 a_t (first: a_1)           d_t = |a_t - e_t| / (e_t + 1e-12)
    raw = min(fall(d_t; 1/2, 1), fall(v_t; 4, 8), min_scale if the loss jumped by more than a quarter)
    u'_i = u_i max(tier_scale[tier_i] gate_i, min_lr_scale),    gate_i = ramp(raw) if tier_i <= tier_max else 1

with fall(x; lo, hi) = 1 below lo, min_scale above hi, linear between; ramp = 1 up to step w, then 1
- min(1, (t - w)/w) (1 - raw).

Source: COSMIC, repository commit 96f1a8c. Departure: a loss has jumped if it rose by a quarter of
its magnitude, so that negative losses are judged alike; and a gate that is not finite stands open.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import check_bounds, check_choice, require
from chainrule.transforms._numerics import increment, up
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._trees import leaves_beside
from chainrule.transforms._words import checked_words

_EPS = 1e-12


class GradientGateState(NamedTuple):
    """State of `gradient_gate`: scalars."""

    count: jax.Array
    """int32: updates made."""
    gate_scale: jax.Array
    """float32: the gate of the last update, after the ramp."""
    raw: jax.Array
    """float32: the last gate measured, before the ramp."""
    signal: jax.Array
    """float32: EMA of the mean magnitude, NaN before the first measurement."""
    loss: jax.Array
    """float32: the last loss, NaN if none was given."""

    metric_fields = ("gate_scale",)


@checked_words
def gradient_gate(
    tier_max: int = 0,
    *,
    min_scale: jax.typing.ArrayLike = 0.2,
    warmup_steps: jax.typing.ArrayLike = 200,
    update_interval: jax.typing.ArrayLike = 10,
    tier_scale: Sequence[float] = (1.0, 1.0, 1.0),
    min_lr_scale: jax.typing.ArrayLike = 0.1,
    kernel: str = "xla",
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies each tensor's update by its tier's rate and, up to a tier, by a gate on noisy gradients.

    $$u'_i = u_i\,\max(\text{scale}[t_i]\cdot\text{gate}_i,\ \mathrm{min\_lr\_scale})$$

    Args:
      tier_max: the highest tier that is gated; -1: none.
      min_scale: the gate where it is most closed, in (0, 1].
      warmup_steps: steps for which the gate stays open, and over which it then comes in, at least
        0.
      update_interval: steps between measurements, at least 1.
      tier_scale: a rate for each tier, lowest first, each at least 0.
      min_lr_scale: least factor, in [0, 1].
      kernel: what measures on a CPU. `"xla"`; `"native"`, the compiled kernel, in one pass; `"auto"`,
        the kernel in a bridge, else XLA.

    Returns:
      A `optax.GradientTransformationExtraArgs`. `update` takes `grad`, and what an earlier
      `tiered_state` posts (`tiers`, `synced_tiers` and `full_sync`; without, every tensor is of tier
      0), as `chainrule.chain` supplies them, and `value`, the loss, if there is one.

    Raises:
      ValueError: an argument outside its range; at `update`, no `grad`, or a tensor in a tier without a rate.

    >>> tx = gradient_gate(warmup_steps=0, update_interval=1)
    >>> g = jnp.array([0.0] * 99 + [1.0])
    >>> u, _ = tx.update(jnp.ones(100), tx.init(g), grad=g)
    >>> round(float(u[0]), 2)
    0.2

    References:
      COSMIC, https://github.com/Kranium2002/COSMIC
    """
    check_bounds(
        "gradient_gate",
        tier_max=tier_max,
        min_scale=min_scale,
        warmup_steps=warmup_steps,
        update_interval=update_interval,
        min_lr_scale=min_lr_scale,
    )
    check_choice("gradient_gate", "kernel", kernel, ("xla", "native", "auto"))
    for scale in tier_scale:
        check_bounds("gradient_gate", tier_scale=scale)
    scales = tuple(tier_scale)

    def init(params: Tree) -> GradientGateState:
        del params
        # An array for each, so that the state can be donated.
        scalars = (jnp.full((), x, jnp.float32) for x in (1, 1, jnp.nan, jnp.nan))
        return GradientGateState(jnp.zeros((), jnp.int32), *scalars)

    def fall(x: jax.Array, low: float, high: float) -> jax.Array:
        return 1 - jnp.clip((x - low) / (high - low), 0, 1) * (1 - min_scale)

    def statistics(gradients: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Of the gradients: the mean magnitude, and the mean of variance over squared mean magnitude."""
        from chainrule.native import primitives

        mean_abs, _, variance, _ = primitives.statistics.bind(*gradients, kernel=kernel)
        return jnp.mean(mean_abs), jnp.mean(variance / (mean_abs**2 + _EPS))

    def measure(
        gradients: list[jax.Array], state: GradientGateState, value: Any
    ) -> tuple[jax.Array, ...]:
        """The raw gate and the new signal."""
        magnitude, ratio = statistics(gradients)
        signal = jnp.where(jnp.isnan(state.signal), magnitude, 0.9 * state.signal + 0.1 * magnitude)
        change = jnp.abs(magnitude - signal) / (signal + _EPS)
        raw = jnp.minimum(fall(change, 0.5, 1.0), fall(ratio, 4.0, 8.0))
        if value is not None:
            jumped = value - state.loss > 0.25 * (jnp.abs(state.loss) + _EPS)  # false for NaN
            raw = jnp.where(jumped, jnp.minimum(raw, min_scale), raw)
        finite = jnp.isfinite(raw) & jnp.isfinite(signal)
        found = jnp.where(finite, raw, 1.0), jnp.where(finite, signal, state.signal)
        return tuple(x.astype(jnp.float32) for x in found)

    def update(
        updates: Tree,
        state: GradientGateState,
        params: Tree = None,
        *,
        grad: Tree = None,
        tiers: tuple[int, ...] | None = None,
        synced_tiers: tuple[int, ...] | None = None,
        full_sync: Any = False,
        value: Any = None,
        **_: Any,
    ) -> tuple[Tree, GradientGateState]:
        del params
        grad = require(
            "gradient_gate",
            "grad",
            grad,
            "compose with `chainrule.chain`, or pass `grad=gradients` to `update`",
        )
        grads = leaves_beside("gradient_gate", "grad", updates, grad)
        leaves, treedef = jax.tree.flatten(updates)
        own = (0,) * len(leaves) if tiers is None else tiers
        synced = own if synced_tiers is None else synced_tiers
        if len(own) != len(leaves):
            raise ValueError(
                f"gradient_gate: the earlier `tiered_state` has {len(own)} tensors, the updates have {len(leaves)}; "
                "put `gradient_gate` beside it, both inside or both outside of `optax.partition`, `optax.masked` or "
                "`optax.flatten`"
            )
        highest = max((*own, *synced), default=0)
        if highest >= len(scales):
            raise ValueError(
                f"gradient_gate: `tier_scale` must have a rate for each tier, got {len(scales)} for "
                f"tiers up to {highest}"
            )
        count = increment(state.count)
        gated = [g for g, tier in zip(grads, own, strict=True) if tier <= tier_max]

        raw, signal = state.raw, state.signal
        scale = jnp.ones((), jnp.float32)
        if gated:
            every = jnp.asarray(update_interval, jnp.int32)
            measures = (jax.lax.rem(count, every) == 0) | jnp.isnan(state.signal)
            raw, signal = jax.lax.cond(
                measures, lambda g: measure(g, state, value), lambda _: (raw, signal), gated
            )
            ramp = jnp.clip((count - warmup_steps) / jnp.maximum(warmup_steps, 1), 0, 1)
            scale = (1 - ramp * (1 - raw)).astype(jnp.float32)

        def factor(tier: int) -> jax.Array:
            return jnp.maximum((scale if tier <= tier_max else 1.0) * scales[tier], min_lr_scale)

        factors = {
            tier: factor(tier) if now == tier else jnp.where(full_sync, factor(now), factor(tier))
            for tier, now in dict(zip(own, synced, strict=True)).items()
        }
        new = [(up(u) * factors[tier]).astype(u.dtype) for u, tier in zip(leaves, own, strict=True)]
        loss = state.loss if value is None else jnp.asarray(value, jnp.float32)
        return jax.tree.unflatten(treedef, new), GradientGateState(count, scale, raw, signal, loss)

    return optax.GradientTransformationExtraArgs(*typed(init, update))
