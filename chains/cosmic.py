"""COSMIC: optimizer state as a budget, spent on the parameters that gain from it."""

from collections.abc import Sequence
from typing import Any

import optax

from chainrule.transforms import (
    TierPolicy,
    chain,
    decoupled_weight_decay,
    gradient_gate,
    live,
    presets,
    quantized_state,
    scale_by_dual_ema,
    scale_by_gradient_magnitude,
    tiered_state,
)

PRESETS = {
    "original": {
        "decay": "gated",
        "debias": "second",
        "clock": "chain",
        "keep_long": True,
        "policy": TierPolicy(
            first_reassignment=None,
            rounding="half_even",
            margin_baseline="last_reassignment",
            budget_counts="parameters",
        ),
    },
    "safe": {
        "gate_tier_max": 1,
        "gate_min_scale": 0.1,
        "gate_warmup_steps": 300,
        "policy": TierPolicy({2: 0.1, 1: 0.2}, reassignment_interval=100),
    },
    "fast": {
        "b1": 0.8,
        "b1_long": 0.95,
        "gate_tier_max": 2,
        "gate_min_scale": 0.05,
        "gate_warmup_steps": 100,
        "gate_update_interval": 5,
        "policy": TierPolicy(
            {2: 0.2, 1: 0.3},
            warmup_fractions={2: 0.5, 1: 0.3},
            warmup_steps=50,
            reassignment_interval=50,
        ),
    },
    "memory": {
        "gate_tier_max": 1,
        "gate_min_scale": 0.1,
        "policy": TierPolicy({2: 0.1, 1: 0.2}, reassignment_interval=100),
    },
}


@presets(PRESETS)
@live(
    static=(
        *(
            "tiered",
            "policy",
            "blend_by",
            "decay",
            "start",
            "debias",
            "clock",
            "keep_long",
            "gate_tier_max",
        ),
        *("tier_scale", "bits", "block", "smaller", "rounding", "state_dtype", "mask", "kernel"),
    )
)
def cosmic(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float | None = 0.999,
    *,
    eps: float = 1e-8,
    weight_decay: float | None = 0.0,
    b1_long: float = 0.99,
    tiered: bool = True,
    policy: TierPolicy | None = None,
    gate_tier_max: int = 0,
    gate_min_scale: float = 0.2,
    gate_warmup_steps: int = 200,
    gate_update_interval: int = 10,
    tier_scale: Sequence[float] = (1.0, 1.0, 1.0),
    min_lr_scale: float = 0.1,
    blend_by: str = "synced_tier",
    decay: str = "decoupled",
    start: str = "zero",
    debias: str = "both",
    clock: str = "own",
    keep_long: bool = False,
    bits: int | None = None,
    block: int | None = 256,
    smaller: str = "keep",
    rounding: str = "nearest",
    state_dtype: Any = None,
    mask: Any = None,
    kernel: str = "auto",
    preset: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""COSMIC: full state for tensors with a strong signal, one number or none for the others.

    | link | atom | equation |
    |---|---|---|
    | tier 2 | `scale_by_dual_ema` | u = mu_hat / (sqrt(nu_hat) + eps) |
    | tier 1 | `optax.scale_by_sign`, `scale_by_gradient_magnitude` | u = c sign(g), c = EMA(mean abs(g)) |
    | tier 0 | `optax.scale_by_sign` | u = sign(g) |
    | gate | `gradient_gate` | u max(tier_scale gate, min_lr_scale) |
    | decay | `decoupled_weight_decay` | u + weight_decay p |
    | rate | `optax.scale_by_learning_rate` | -learning_rate u |

    Call `chainrule.retier(state, grads, params)` before each `update`; the torch bridge does so by
    itself. Every numeric argument is live: see `chainrule.set_hyperparams`.

    Args:
      learning_rate: a number, scalar array or schedule, at least 0.
      b1: decay of the short EMA, in [0, 1).
      b2: decay of the second moment, in [0, 1); `None`: no denominator.
      eps: added to the denominator, at least 0.
      weight_decay: at least 0. With 0 `update` needs no parameters; `None`: no link.
      b1_long: decay of the long EMA and of tier 1's magnitude, in [0, 1).
      tiered: `False`: every tensor has both EMAs and nu, and its tier sets their blend, (0, 1/2,
        1).
      policy: who is in which tier, a `TierPolicy`.
      gate_tier_max: highest tier that is gated, -1 to 2.
      gate_min_scale: the gate where it is most closed, in (0, 1].
      gate_warmup_steps: steps the gate stays open, and then comes in over, at least 0.
      gate_update_interval: steps between the gate's measurements, at least 1.
      tier_scale: a rate for each tier, lowest first.
      min_lr_scale: least product of tier rate and gate, in [0, 1].
      blend_by: with `tiered=False`, whether full-sync steps change the blend (`"synced_tier"`) or
        not (`"tier"`).
      decay: `"decoupled"`; or `"gated"`, as COSMIC's code has it: the decay is multiplied by the
        tier's rate, the gate and tier 1's magnitude too.
      start: `"zero"` or `"gradient"`: where EMAs start.
      debias: `"both"` moments are bias corrected, or `"second"` only, as in COSMIC.
      clock: `"own"`, corrections count from a tensor's promotion; `"chain"`, from the first step,
        as in COSMIC.
      keep_long: store the long EMA of tier 2 although it is not used, as COSMIC does.
      bits: 4 or 8: the EMAs are held in so many bits (see `quantized_state`); `None`: they are not.
      block: elements that share a scale; `None`: the whole tensor.
      smaller: whether tensors smaller than a block are held so too, `"keep"` or `"quantize"`.
      rounding: of the quantised EMAs, `"nearest"` or `"stochastic"`.
      state_dtype: dtype of the moments, default the parameter's.
      mask: which parameters decay, as in `optax.adamw`; with decoupled decay only.
      kernel: `"xla"`; `"native"`, the compiled kernel (CPU only, no gradient through it); `"auto"`,
        what `benchmarks/speed/native.py` finds faster on the CPU: the kernel in a bridge and with
        `bits`; else XLA.
      preset: arguments for those that are not given: `"original"`, what the repository does where this differs from
        it; `"safe"`, `"fast"` or `"memory"`, the repository's own.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range; `update` without parameters while there is decay.

    >>> import chainrule, jax.numpy as jnp
    >>> tx = cosmic(learning_rate=0.5)
    >>> params = {"w": jnp.zeros(2)}
    >>> grads = {"w": jnp.array([3.0, -0.5])}
    >>> state = chainrule.retier(tx.init(params), grads, params)
    >>> updates, state = tx.update(grads, state, params)
    >>> [round(float(x), 3) for x in updates["w"]], chainrule.metrics(state)["tier_occupancy"]
    ([-0.5, 0.5], {2: 1})

    References:
      COSMIC, https://github.com/Kranium2002/COSMIC
    """
    inside, outside = {"decoupled": (None, weight_decay), "gated": (weight_decay, None)}[decay]
    full: dict[str, Any] = {
        "start": start,
        "debias": debias,
        "clock": clock,
        "state_dtype": state_dtype,
        "kernel": kernel,
    }
    held: dict[str, Any] = {"fields": ("mu", "mu_long"), "smaller": smaller, "rounding": rounding}
    blended = scale_by_dual_ema(
        b1, b1_long=b1_long, b2=b2, eps=eps, blend=(0.0, 0.5, 1.0), blend_by=blend_by, **full
    )
    short = scale_by_dual_ema(b1, b1_long=b1_long, b2=b2, eps=eps, keep_long=keep_long, **full)
    blended = chain(quantized_state(blended, bits, block, **held), decoupled_weight_decay(inside))
    short = chain(quantized_state(short, bits, block, **held), decoupled_weight_decay(inside))
    magnitude = chain(
        optax.scale_by_sign(),
        decoupled_weight_decay(inside),
        scale_by_gradient_magnitude(b1_long, kernel=kernel),
    )
    sign = chain(optax.scale_by_sign(), decoupled_weight_decay(inside))
    tiers: dict[bool, dict[int, optax.GradientTransformation]]
    tiers = {True: {2: short, 1: magnitude, 0: sign}, False: dict.fromkeys((2, 1, 0), blended)}
    return chain(
        tiered_state(tiers[tiered], policy),
        gradient_gate(
            gate_tier_max,
            min_scale=gate_min_scale,
            warmup_steps=gate_warmup_steps,
            update_interval=gate_update_interval,
            tier_scale=tier_scale,
            min_lr_scale=min_lr_scale,
            kernel=kernel,
        ),
        decoupled_weight_decay(outside, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
