"""Muon: momentum, orthogonalised, for hidden matrices; Adam for the rest."""

from typing import Any

import optax

from chainrule.transforms import (
    HIDDEN_MATRICES,
    cautious,
    chain,
    decoupled_weight_decay,
    ema_momentum,
    live,
    newton_schulz,
    presets,
    scale_by_adam,
)


@presets(
    {
        "original": {"ns_dtype": "bfloat16", "dims": "oihw", "scale_axes": "out_in"},
        "torch": {
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "ns_dtype": "bfloat16",
            "eps_scope": "clamped",
            "scale_axes": "out_in",
        },
        "optax": {"debias": True, "ns_eps": 1e-8, "adam_lr_ratio": 1.0, "adam_b2": 0.999},
    },
    same={"optax": {"adam_eps": "ns_eps"}},
)
@live(
    static=(
        "coefficients",
        "ns_steps",
        "preconditioning",
        "ns_dtype",
        "ns_sharding",
        "dims",
        "scale_axes",
        "routing",
        "mu_dtype",
        "nu_dtype",
        "mask",
    )
)
def muon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    beta: float = 0.95,
    weight_decay: float | None = 0.0,
    nesterov: str | None = "lerp",
    debias: bool = False,
    coefficients: Any = "keller_jordan",
    ns_steps: int | None = None,
    preconditioning: str | None = None,
    ns_eps: float = 1e-7,
    eps_scope: str = "added",
    ns_dtype: Any = None,
    gram: bool | str = "auto",
    ns_sharding: Any = None,
    dims: Any = "batched",
    scale: str | None = "spectral",
    scale_factor: float = 1.0,
    scale_axes: Any = "in_out",
    dual_norm: bool = False,
    caution: str | None = None,
    routing: Any = HIDDEN_MATRICES,
    adam_lr_ratio: float = 0.015,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_eps: float = 1e-10,
    adam_weight_decay: float | None = None,
    use_nadam: bool | str = False,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    mask: Any = None,
    preset: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon on hidden matrices, Adam on everything else.

    | link | atom | equation |
    |---|---|---|
    | matrices: momentum | `ema_momentum` | m = (1 - beta) g + beta mu, mu = EMA(g) |
    | matrices: orthogonalise | `newton_schulz` | u = s(shape) NS(m) |
    | matrices: caution | `cautious` | u 1[u g > 0] c |
    | the rest: direction | `scale_by_adam` | u = mu_hat / (sqrt(nu_hat) + eps) |
    | the rest: caution | `cautious` | u 1[u g > 0] c |
    | the rest: own decay | `decoupled_weight_decay` | u + adam_weight_decay p |
    | the rest: own rate | `optax.scale` | adam_lr_ratio u |
    | decay | `decoupled_weight_decay` | u + weight_decay p |
    | rate | `optax.scale_by_learning_rate` | -learning_rate u |

    The rest are vectors, biases, embeddings and output layers; `Routing` says by which names and shapes it knows these.
    `print(Routing().plan(params))` shows where each leaf goes and why, and the logger `chainrule.routing` says it once,
    at INFO. For a torch model `routing=chainrule.torch_routing(model)` looks at its modules too. Every numeric argument
    is live: see `chainrule.set_hyperparams`. The state is one moment a matrix, two for the rest.

    Args:
      learning_rate: a number, scalar array or schedule, at least 0.
      beta: decay of the momentum, in [0, 1).
      weight_decay: decoupled weight decay of every leaf, times `learning_rate` but not
        `adam_lr_ratio`, at least 0; `None` leaves the link out.
      nesterov: look-ahead of the momentum: `"lerp"`; `"raw"` and `"elementwise"` (KerasOptimizers);
        `None` (`ema_momentum`).
      debias: divide the momentum by the weight it has given to gradients (optax.contrib.muon).
      coefficients: of the Newton-Schulz polynomial: a name, three numbers, or three a step
        (`newton_schulz`).
      ns_steps: number of Newton-Schulz steps, an integer in [1, 100); `None`: 4 for `"aol"`, else 5.
      preconditioning: what a momentum is divided by first: `"frobenius"`, `"schatten"`, `"aol"`; `None`: what its
        coefficients are made for (`newton_schulz`).
      ns_eps: keeps the division by the norm finite, at least 0.
      eps_scope: `"added"`, divide by |m| + ns_eps; `"clamped"`, by max(|m|, ns_eps) (torch.optim.Muon).
      ns_dtype: dtype of the iteration, default float32 at least; `"bfloat16"` is what
        torch.optim.Muon and KerasOptimizers use.
      gram: whether the iteration may run on the small Gram matrix (`newton_schulz`).
      ns_sharding: spreads the iteration over devices, `NamedSharding(mesh, PartitionSpec("data"))`: matrices of one
        shape are stacked, and each device iterates on its own of them (`newton_schulz`).
      dims: how leaves of more than two axes are read as matrices: `"batched"`, `"hwio"`, `"oihw"`,
        axes, or a function of path and shape (`newton_schulz`).
      scale: `"spectral"`, sqrt(max(1, out / in)); `"rms"`, sqrt(max(out, in)); `None`.
      scale_factor: multiplies it, positive: 0.2 with `"rms"` gives AdamW's RMS.
      scale_axes: `"in_out"` for (in, out) kernels, `"out_in"` for torch's, or two axes (out, in) of the leaf.
      dual_norm: multiply by the dual norm of the momentum (`adaptive` in optax.contrib.muon).
      caution: normalizer of `cautious` (`"mean"` is KerasOptimizers'), or `None` for no caution.
      routing: a `Routing`, such as `Routing(exclude="^last")`, or a function from the parameters to labels `"muon"` and
        `"adam"`.
      adam_lr_ratio: what `learning_rate` is multiplied by for the rest, at least 0.
      adam_b1: decay of Adam's first moment, in [0, 1).
      adam_b2: decay of its second moment, in [0, 1).
      adam_eps: added to its denominator, at least 0.
      adam_weight_decay: more decay for the rest, times `learning_rate` and `adam_lr_ratio`, at least
        0; `None`: no link.
      use_nadam: Adam with Nesterov momentum: `False`, `True` or `"keras"` (`scale_by_adam`).
      mu_dtype: dtype of the first moments, default the parameter's.
      nu_dtype: dtype of Adam's second moment, default the parameter's.
      mask: which parameters `weight_decay` is for, as in `optax.adamw`.
      preset: arguments for those that are not given: `"original"`, Jordan's for torch's kernels; `"torch"`,
        `torch.optim.Muon`; `"optax"`, `optax.contrib.muon`; `None`: none.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range; a pattern of the routing that matches nothing; a vector
        routed to Muon; `update` without parameters while there is decay.

    >>> import jax.numpy as jnp
    >>> tx = muon(1.0, weight_decay=None, coefficients="classical", ns_steps=12)
    >>> params = {"hidden": jnp.eye(2), "gain": jnp.ones(2)}
    >>> grads = {"hidden": jnp.array([[3.0, 0.0], [0.0, -0.5]]), "gain": jnp.ones(2)}
    >>> updates, state = tx.update(grads, tx.init(params))
    >>> print(updates["hidden"].round(3), updates["gain"].round(3))
    [[-1. -0.]
     [-0.  1.]] [-0.015 -0.015]

    References:
      Jordan et al., https://kellerjordan.github.io/posts/muon/
      Liu et al., https://arxiv.org/abs/2502.16982
    """
    return chain(
        optax.partition(
            {
                "muon": chain(
                    ema_momentum(beta, nesterov, debias=debias, mu_dtype=mu_dtype),
                    newton_schulz(
                        coefficients,
                        ns_steps,
                        preconditioning=preconditioning,
                        eps=ns_eps,
                        eps_scope=eps_scope,
                        scale=scale,
                        scale_factor=scale_factor,
                        scale_axes=scale_axes,
                        dims=dims,
                        dual_norm=dual_norm,
                        dtype=ns_dtype,
                        gram=gram,
                        sharding=ns_sharding,
                    ),
                    cautious(caution),
                ),
                "adam": chain(
                    scale_by_adam(
                        adam_b1,
                        adam_b2,
                        adam_eps,
                        nesterov=use_nadam,
                        mu_dtype=mu_dtype,
                        nu_dtype=nu_dtype,
                    ),
                    cautious(caution),
                    decoupled_weight_decay(adam_weight_decay),
                    optax.scale(adam_lr_ratio),
                ),
            },
            routing,
            mask_compatible_extra_args=True,
        ),
        decoupled_weight_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
