"""CASMO: Adam whose step is scaled by how much of the gradient is signal; its first and its 0.4 form."""

from typing import Any

import optax

from chainrule.transforms import (
    agar_confidence,
    chain,
    decoupled_weight_decay,
    live,
    scale_by_adam,
    scale_by_belief,
    snr_confidence,
)


@live(
    static=(
        "tau_init_steps",
        "tau_clip_range",
        "granularity",
        "center",
        "debias",
        "adapt_c_min",
        "shared_calibration",
        "mu_dtype",
        "nu_dtype",
        "mask",
    )
)
def casmo(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | None = 0.0,
    tau_init_steps: int | None = None,
    tau_clip_range: tuple[float, float] | None = None,
    c_min: float = 0.1,
    granularity: str = "group",
    agar_clamp_factor: float | None = None,
    *,
    center: str = "mean",
    debias: bool = True,
    agar_eps: float = 0.0,
    adapt_c_min: bool = False,
    shared_calibration: bool = False,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    return chain(
        scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        agar_confidence(
            tau_init_steps,
            c_min,
            b1=b1,
            b2=b2,
            granularity=granularity,
            center=center,
            tau_clip_range=tau_clip_range,
            clamp_factor=agar_clamp_factor,
            debias=debias,
            eps=agar_eps,
            adapt_c_min=adapt_c_min,
            shared_calibration=shared_calibration,
        ),
        decoupled_weight_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@live(static=("deviation", "mu_dtype", "nu_dtype", "mask"))
def casmo_snr(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | None = 0.0,
    c_min: float = 0.1,
    robustness: float = 0.5,
    rel_floor: float = 0.1,
    *,
    deviation: str = "unbiased",
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    return chain(
        scale_by_belief(b1, b2, eps, deviation=deviation, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        snr_confidence(robustness, c_min, rel_floor, eps, b1=b1, b2=b2, deviation=deviation),
        decoupled_weight_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
