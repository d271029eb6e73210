r"""Keeps the entries of an update that agree in sign with the gradient, and scales them up for those it drops.

    m = 1[u g > 0],    u' = u m c,    c = 1 / max(mean(m), mean_floor)   "clamped_mean" (C-AdamW)
                                          1 / (mean(m) + eps)            "mean" (KerasOptimizers)
                                          size / (sum(m) + 1)            "count" (C-Lion)
                                          1                              "none"

Source: Liang et al., "Cautious Optimizers: Improving Training with One Line of Code", 2024, algorithm 1, and its
repository. Departure: the repository's C-AdamW compares the gradient with the first moment, here with the update. For
Adam the two have one sign; for a Nesterov or orthogonalised direction only the update's is the sign of the step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import check_arrays, check_bounds, check_choice, require
from chainrule.transforms._numerics import up
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._trees import leaves_beside, map_to_other_shapes, map_unmasked
from chainrule.transforms._words import checked_words


class CautiousState(NamedTuple):
    """State of `cautious`."""

    kept_fraction: optax.Updates
    """float32 scalar for each parameter: the fraction of entries kept in the last update."""

    metric_fields = ("kept_fraction",)


@checked_words
def cautious(
    normalizer: str | None = "clamped_mean",
    *,
    mean_floor: jax.typing.ArrayLike = 1e-3,
    eps: jax.typing.ArrayLike = 1e-8,
    negated: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Zeroes the entries of each update whose sign is not the gradient's.

    $$u'_i = u_i\, m_i\, c, \qquad m_i = \mathbb 1[u_i\, g_i > 0]$$

    It belongs before `scale_by_learning_rate`, where an update has the sign of the gradient that it descends. Put it
    before weight decay to spare the decay, after it to mask the two together. An update that agrees with the gradient
    nowhere becomes zero; a NaN among the updates, not among the gradients,
    stays, and spreads over its tensor. For complex leaves \(u g\) is \(\mathrm{Re}(\bar u
    g)\).

    Args:
      normalizer: c, one factor a tensor: `"clamped_mean"`, `"mean"`, `"count"` or `"none"` as above. `None`: no
        caution, the updates pass.
      mean_floor: least mean of the mask that is divided by, positive (`"clamped_mean"`).
      eps: added to the mean of the mask, at least 0 (`"mean"`).
      negated: the updates already point downhill (after `scale_by_learning_rate`, or a whole optimizer): keep where
        \(u g < 0\).

    Returns:
      A `optax.GradientTransformationExtraArgs`. Its `update` takes the extra argument `grad`, the raw gradient.

    Raises:
      ValueError: an argument outside its range; at `update`, `grad` is missing.

    >>> tx = cautious()
    >>> g, u = jnp.array([1.0, -1.0]), jnp.array([0.5, 0.5])
    >>> tx.update(u, tx.init(g), grad=g)[0].tolist()
    [1.0, 0.0]

    References:
      Liang et al., https://arxiv.org/abs/2411.16085
    """
    check_bounds("cautious", mean_floor=mean_floor, eps=eps)
    if normalizer is None:
        return optax.with_extra_args_support(optax.identity())
    check_choice("cautious", "normalizer", normalizer, ("clamped_mean", "mean", "count", "none"))

    def init(params: Tree) -> CautiousState:
        check_arrays("cautious", params)
        ones = map_to_other_shapes(lambda _: jnp.ones((), jnp.float32), params)
        return CautiousState(ones)

    def update(
        updates: Tree,
        state: CautiousState,
        params: Tree = None,
        *,
        grad: Tree = None,
        **extra_args: Any,
    ) -> tuple[Tree, CautiousState]:
        del state, params, extra_args
        grad = require(
            "cautious",
            "grad",
            grad,
            "use `chainrule.chain` in place of `optax.chain`, or call `update(..., grad=gradients)`",
        )

        def agreeing(u: jax.Array, g: jax.Array) -> jax.Array:
            if jnp.iscomplexobj(u):
                product = (jnp.conj(u) * g).real
            else:  # a number of the sign of u g, which itself is zero for small numbers
                product = jnp.where(u > 0, g, -g)
            agrees = product < 0 if negated else product > 0
            return jnp.where(agrees | jnp.isnan(u), up(u), 0)

        def fraction(kept: jax.Array) -> jax.Array:
            # Counts the non-zero entries in arithmetic alone: XLA:CPU fuses that into the sum, and no comparison.
            return (jnp.sum(jnp.sign(jnp.abs(kept))) / max(kept.size, 1)).astype(jnp.float32)

        def factor(size: int, mean: jax.Array) -> Any:
            if normalizer == "clamped_mean":
                return 1 / jnp.maximum(mean, mean_floor)
            if normalizer == "mean":
                # Where nothing is kept the factor multiplies zeros; it must be finite, also with eps = 0.
                return 1 / jnp.where(mean > 0, mean + eps, 1)
            return size / (mean * size + 1) if normalizer == "count" else 1

        leaves_beside("cautious", "grad", updates, grad)
        kept = map_unmasked(agreeing, updates, grad)
        means = map_unmasked(fraction, kept)
        new = map_unmasked(
            lambda u, k, mean: (k * factor(k.size, mean)).astype(u.dtype), updates, kept, means
        )
        return new, CautiousState(means)

    return optax.GradientTransformationExtraArgs(*typed(init, update))
