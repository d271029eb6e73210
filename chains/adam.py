"""Adam and NAdam with decoupled weight decay, optionally cautious."""

from typing import Any

import optax

from chainrule.transforms import chain, decoupled_weight_decay, live, scale_by_adam


@live(static=("mu_dtype", "nu_dtype", "mask"))
def adam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | None = 0.0,
    *,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """x"""
    return chain(
        scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        decoupled_weight_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
