"""STAM and STAMLite: a first-moment decay that follows how varied the gradient is, over Adam's or
one RMS a tensor."""

from typing import Any

import optax

from chainrule.transforms import (
    adaptive_beta1,
    chain,
    decoupled_weight_decay,
    live,
    presets,
    scale_by_adam,
    scale_by_tensor_rms,
)


@presets(
    {"original": {"debias": False, "nonfinite": "zero", "max_abs": None}},
    same={"original": {"debias_eps": "eps"}},
)
@live(static=("debias", "state_dtype", "nu_dtype", "mask"))
def stam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1_base: float = 0.9,
    b2: float = 0.999,
    *,
    eps: float = 1e-8,
    weight_decay: float | None = 0.01,
    adapt_strength: float = 0.2,
    tau_decay: float = 0.99,
    fallback_threshold: float = 100.0,
    debias: bool = True,
    debias_eps: float = 0.0,
    nonfinite: str = "skip",
    max_abs: float | None = 281474976710656.0,
    state_dtype: Any = None,
    nu_dtype: Any = None,
    mask: Any = None,
    preset: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""STAM: Adam whose first-moment decay falls where the residual of the gradient is varied.

    | link | atom | equation |
    |---|---|---|
    | first moment | `adaptive_beta1` | mu = b1 mu + (1 - b1) g, b1 = clip(b1_base (1 - a s)) |
    | direction | `scale_by_adam(b1=None)` | u = mu_hat / (sqrt(nu_hat) + eps) |
    | decay | `decoupled_weight_decay` | u + weight_decay p |
    | rate | `optax.scale_by_learning_rate` | -learning_rate u |

    Every numeric argument is live: see `chainrule.set_hyperparams`. The state has AdamW's size.

    Args:
      learning_rate: a number, scalar array or schedule, at least 0.
      b1_base: largest decay of the first moment, in [0.5, 1).
      b2: decay of the second moment and of the residual's, in [0, 1).
      eps: added to the denominator, at least 0.
      weight_decay: decoupled weight decay, at least 0. With 0 `update` needs no parameters; `None`: no link.
      adapt_strength: how far b1 may fall below `b1_base`, relatively, in [0, 0.5].
      tau_decay: decay of the mean absolute residual, in [0, 1).
      fallback_threshold: b1 is `b1_base` where the variance of the residual reaches this many times
        its squared mean.
      debias: debias the two residual EMAs; the repository does not (`False`).
      debias_eps: added to Adam's bias corrections; the repository adds its eps (`debias_eps=eps`).
      nonfinite: a tensor whose gradient is not finite everywhere is left out of the statistics
        (`"skip"`, as documented), or enters them with those entries zeroed (`"zero"`, as in the
        repository's code); the entries are zeroed either way.
      max_abs: clamp on gradient entries before they are squared, 2^48; the repository has none
        (`None`).
      state_dtype: dtype of the first moment, default the parameter's.
      nu_dtype: dtype of the second moment, default the parameter's.
      mask: which parameters decay, as in `optax.adamw`.
      preset: `"original"`, what the repository does where this differs from it, for arguments that are not given
        (`chainrule show stam` lists them); `None`: nothing.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range; `update` without parameters while there is decay.

    >>> import jax.numpy as jnp
    >>> tx = stam(learning_rate=0.5, weight_decay=None)
    >>> u, state = tx.update(jnp.array([3.0, -0.5]), tx.init(jnp.zeros(2)))
    >>> [round(float(x), 3) for x in u]
    [-0.5, 0.5]

    References:
      STAM, package `stam-optimizer` 0.1.0.
    """
    return chain(
        adaptive_beta1(
            b1_base,
            adapt_strength=adapt_strength,
            b2=b2,
            tau_decay=tau_decay,
            fallback_threshold=fallback_threshold,
            debias=debias,
            nonfinite=nonfinite,
            max_abs=max_abs,
            state_dtype=state_dtype,
        ),
        scale_by_adam(b1=None, b2=b2, eps=eps, debias_eps=debias_eps, nu_dtype=nu_dtype),
        decoupled_weight_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@presets(
    {"original": {"nonfinite": "zero", "max_abs": None}},
    same={"original": {"debias_eps": "eps", "stat_dtype": "state_dtype"}},
)
@live(static=("state_dtype", "stat_dtype", "mask"))
def stam_lite(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1_base: float = 0.9,
    *,
    eps: float = 1e-8,
    weight_decay: float | None = 0.01,
    adapt_strength: float = 0.2,
    moment_decay: float = 0.99,
    b1_update_interval: int = 5,
    debias_eps: float = 0.0,
    nonfinite: str = "skip",
    max_abs: float | None = 281474976710656.0,
    state_dtype: Any = None,
    stat_dtype: Any = "float32",
    mask: Any = None,
    preset: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""STAMLite: STAM with one second moment a tensor, half of AdamW's state.

    | link | atom | equation |
    |---|---|---|
    | first moment | `adaptive_beta1(signal="moments")` | mu = b1 mu + (1 - b1) g, b1 renewed every k updates |
    | direction | `scale_by_tensor_rms` | u = mu_hat / (sqrt(nu_hat) + eps), nu = EMA(mean g^2) |
    | decay | `decoupled_weight_decay` | u + weight_decay p |
    | rate | `optax.scale_by_learning_rate` | -learning_rate u |

    Every numeric argument is live: see `chainrule.set_hyperparams`.

    Args:
      learning_rate: a number, scalar array or schedule, at least 0.
      b1_base: largest decay of the first moment, in [0.5, 1).
      eps: added to the denominators, at least 0.
      weight_decay: decoupled weight decay, at least 0. With 0 `update` needs no parameters; `None`: no link.
      adapt_strength: how far b1 may fall below `b1_base`, relatively, in [0, 0.5].
      moment_decay: decay of the mean and mean square of each tensor's gradient, in [0, 1).
      b1_update_interval: b1 is renewed at updates 1, 1 + k, 1 + 2k, ...; an integer, at least 1.
      debias_eps: added to the bias corrections; the repository adds its eps (`debias_eps=eps`).
      nonfinite: a tensor whose gradient is not finite everywhere is left out of the statistics
        (`"skip"`, as documented), or enters them with those entries zeroed (`"zero"`, as in the
        repository's code); the entries are zeroed either way.
      max_abs: clamp on gradient entries before they are squared, 2^48; the repository has none
        (`None`).
      state_dtype: dtype of the first moment, default the parameter's.
      stat_dtype: dtype of the scalars; the repository stores them in `state_dtype`, where bfloat16
        stalls them.
      mask: which parameters decay, as in `optax.adamw`.
      preset: `"original"`, what the repository does where this differs from it, for arguments that are not given
        (`chainrule show stam_lite` lists them); `None`: nothing.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range; `update` without parameters while there is decay.

    >>> import jax.numpy as jnp
    >>> tx = stam_lite(learning_rate=0.1, weight_decay=None)
    >>> u, state = tx.update(jnp.array([3.0, -4.0]), tx.init(jnp.zeros(2)))
    >>> [round(float(x), 3) for x in u]
    [-0.085, 0.113]

    References:
      STAM, package `stam-optimizer` 0.1.0.
    """
    return chain(
        adaptive_beta1(
            b1_base,
            adapt_strength=adapt_strength,
            signal="moments",
            moment_decay=moment_decay,
            eps=eps,
            b1_update_interval=b1_update_interval,
            debias_eps=debias_eps,
            nonfinite=nonfinite,
            max_abs=max_abs,
            state_dtype=state_dtype,
            stat_dtype=stat_dtype,
        ),
        scale_by_tensor_rms(moment_decay, eps, debias_eps=debias_eps, stat_dtype=stat_dtype),
        decoupled_weight_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
