"""Adam and NAdam with decoupled weight decay, optionally cautious."""

from typing import Any

import optax

from chainrule.transforms import (
    cautious,
    chain,
    decoupled_weight_decay,
    live,
    presets,
    scale_by_adam,
)


@presets(
    {
        "cautious": {"eps": 1e-6, "caution": "clamped_mean"},
        "keras": {"b2": 0.995, "weight_decay": 0.004},
    }
)
@live(static=("debias", "mu_dtype", "nu_dtype", "mask"))
def adam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    *,
    eps: float = 1e-8,
    weight_decay: float | None = 0.0,
    eps_root: float = 0.0,
    caution: str | None = None,
    debias: bool = True,
    eps_scope: str = "corrected",
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    mask: Any = None,
    preset: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with decoupled weight decay (AdamW), optionally cautious.

    | link | atom | equation |
    |---|---|---|
    | direction | `scale_by_adam` | u = mu_hat / (sqrt(nu_hat + eps_root) + eps) |
    | caution | `cautious` | u 1[u g > 0] c |
    | decay | `decoupled_weight_decay` | u + weight_decay p |
    | rate | `optax.scale_by_learning_rate` | -learning_rate u |

    Every numeric argument is live: see `chainrule.set_hyperparams`.

    Args:
      learning_rate: a number, scalar array or schedule, at least 0.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the denominator outside the root, at least 0.
      weight_decay: decoupled weight decay, at least 0. With 0 `update` needs no parameters; `None`: no link.
      eps_root: added inside the root, at least 0.
      caution: normalizer of `cautious` (`"clamped_mean"` is C-AdamW), or `None` for no caution.
      debias: divide the moments by 1 - b^t.
      eps_scope: `"corrected"` or `"raw"`, whether eps is added after or before the second moment's bias correction.
      mu_dtype: dtype of the first moment, default the parameter's.
      nu_dtype: dtype of the second moment, default the parameter's.
      mask: which parameters decay, as in `optax.adamw`.
      preset: arguments for those that are not given: `"cautious"`, the cautious optimizers' authors; `"keras"`,
        KerasOptimizers; `None`: none.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range; `update` without parameters while there is decay.

    >>> import jax.numpy as jnp
    >>> tx = adam(learning_rate=1.0, weight_decay=None, caution="clamped_mean")
    >>> u, state = tx.update(jnp.array([3.0, -0.5]), tx.init(jnp.zeros(2)))
    >>> print(u.round(3))
    [-1.  1.]

    References:
      Kingma & Ba, https://arxiv.org/abs/1412.6980
      Loshchilov & Hutter, https://arxiv.org/abs/1711.05101
      Liang et al., https://arxiv.org/abs/2411.16085
    """
    return chain(
        scale_by_adam(
            b1,
            b2,
            eps,
            eps_root,
            debias=debias,
            eps_scope=eps_scope,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        cautious(caution),
        decoupled_weight_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@presets({"keras": {"b2": 0.995, "weight_decay": 0.004, "nesterov": "keras"}})
@live(static=("nesterov", "debias", "mu_dtype", "nu_dtype", "mask"))
def nadam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    *,
    eps: float = 1e-8,
    weight_decay: float | None = 0.0,
    eps_root: float = 0.0,
    nesterov: bool | str = True,
    caution: str | None = None,
    debias: bool = True,
    eps_scope: str = "corrected",
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    mask: Any = None,
    preset: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""NAdam, Adam with Nesterov momentum, with decoupled weight decay and optional caution.

    | link | atom | equation |
    |---|---|---|
    | direction | `scale_by_adam(nesterov=True)` | u = (b1 mu_hat + (1 - b1) g_hat) / (sqrt(nu_hat + eps_root) + eps) |
    | caution | `cautious` | u 1[u g > 0] c |
    | decay | `decoupled_weight_decay` | u + weight_decay p |
    | rate | `optax.scale_by_learning_rate` | -learning_rate u |

    Every numeric argument is live: see `chainrule.set_hyperparams`.

    Args:
      learning_rate: a number, scalar array or schedule, at least 0.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the denominator outside the root, at least 0.
      weight_decay: decoupled weight decay, at least 0. With 0 `update` needs no parameters; `None`: no link.
      eps_root: added inside the root, at least 0.
      nesterov: `True`, the bias corrections of Dozat and optax; `"keras"`, those of KerasOptimizers (`scale_by_adam`).
      caution: normalizer of `cautious` (`"mean"` is KerasOptimizers'), or `None` for no caution.
      debias: divide the moments by 1 - b^t.
      eps_scope: `"corrected"` or `"raw"`, whether eps is added after or before the second moment's bias correction.
      mu_dtype: dtype of the first moment, default the parameter's.
      nu_dtype: dtype of the second moment, default the parameter's.
      mask: which parameters decay, as in `optax.adamw`.
      preset: arguments for those that are not given: `"keras"`, KerasOptimizers; `None`: none.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range; `update` without parameters while there is decay.

    >>> import jax.numpy as jnp
    >>> tx = nadam(learning_rate=1.0, weight_decay=None)
    >>> u, state = tx.update(jnp.array([3.0, -0.5]), tx.init(jnp.zeros(2)))
    >>> print(f"{u[0]:.3f}")
    -1.474

    References:
      Dozat, "Incorporating Nesterov Momentum into Adam", 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
      Loshchilov & Hutter, https://arxiv.org/abs/1711.05101
    """
    return chain(
        scale_by_adam(
            b1,
            b2,
            eps,
            eps_root,
            nesterov=nesterov,
            debias=debias,
            eps_scope=eps_scope,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        cautious(caution),
        decoupled_weight_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
