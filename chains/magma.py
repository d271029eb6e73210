"""Magma: any optimizer, its updates scaled by how well momentum and gradient agree and dropped at random."""

from typing import Any

import optax

from chainrule.transforms import chain, decay_and_rate, live, momentum_alignment_mask, presets


@presets({"original": {}, "pypi": {"moment": "own"}})
@live(static=("inner", "exclude", "seed", "state_dtype", "decay_mask"))
def magma(
    inner: optax.GradientTransformation,
    *,
    mask_prob: float = 0.5,
    tau: float = 2.0,
    alignment_ema: float = 0.9,
    momentum_beta: float = 0.9,
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: float | None = None,
    moment: str = "mu",
    init_alignment: float = 1.0,
    exclude: Any = None,
    seed: Any = 0,
    state_dtype: Any = None,
    decay_mask: Any = None,
    preset: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Magma around an optimizer, or around a direction.

    | link | atom | equation |
    |---|---|---|
    | inner | any chain, ours or optax's | u |
    | mask | `momentum_alignment_mask` | u s m, s = e s + (1 - e) sigmoid(cos(mu, g) / tau), m ~ Bernoulli(mask_prob) |
    | decay | `decay_and_rate` | u + weight_decay p, with `learning_rate` |
    | rate | `decay_and_rate` | -learning_rate u, with `learning_rate` |

    A whole optimizer as `inner` has its weight decay scaled and masked with its update, as in the repository. To leave
    decay alone give a direction, such as `scale_by_adam()`, and `learning_rate` and `weight_decay` here. Every numeric
    argument is live: see `chainrule.set_hyperparams`. No moment is stored but the inner one.

    Args:
      inner: any gradient transformation.
      mask_prob: probability that a tensor's update is applied, in [0, 1].
      tau: temperature of the alignment, positive.
      alignment_ema: e, decay of the alignment, in [0, 1).
      momentum_beta: decay of Magma's own moment, in [0, 1) (`moment="own"`).
      learning_rate: a number, scalar array or schedule, at least 0; `None` if `inner` has its own.
      weight_decay: decoupled weight decay after the mask, at least 0; needs `learning_rate`.
      moment: `"mu"`, `"nu"` or `"trace"`, as the inner chain names it, or `"own"` (`inner` without momentum; Magma
        0.1.1).
      init_alignment: alignment that `init` writes, in [0, 1].
      exclude: parameters left alone: path patterns, a set of paths or (in a torch bridge) of parameters, a function of
        path and parameter, or a tree of booleans.
      seed: an integer or a threefry key.
      state_dtype: dtype of Magma's own moment, default the parameter's.
      decay_mask: which parameters decay, as `mask` of `optax.adamw`.
      preset: `"original"`, the repository, which these defaults are; `"pypi"`, its package 0.1.1, for arguments that
        are not given; `None`: nothing.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range; `weight_decay` without `learning_rate`; at `update`, `inner` keeps no
        such moment.

    >>> import jax.numpy as jnp
    >>> tx = magma(optax.adamw(1e-3), mask_prob=1.0)
    >>> params = jnp.ones(2)
    >>> u, state = tx.update(jnp.array([3.0, -0.5]), tx.init(params), params)
    >>> print(f"{u[1] / 1e-3:.3f}")
    0.962

    References:
      Joo et al., https://arxiv.org/abs/2602.15322
      Magma, package `magma-optimizer` 0.1.1 and repository commit 222980f.
    """
    return chain(
        inner,
        momentum_alignment_mask(
            mask_prob,
            tau=tau,
            alignment_ema=alignment_ema,
            momentum_beta=momentum_beta,
            moment=moment,
            init_alignment=init_alignment,
            exclude=exclude,
            seed=seed,
            state_dtype=state_dtype,
        ),
        decay_and_rate(learning_rate, weight_decay=weight_decay, mask=decay_mask),
    )
