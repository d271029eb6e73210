r"""Divides each tensor by one number: the root of a running mean of its squared gradient.

    nu_t = decay nu_{t-1} + (1 - decay) mean(g_t^2)      a scalar a tensor
    u_t  = g_t / (sqrt(nu_t / (1 - decay^t)) + eps)

With a momentum leaf of `adaptive_beta1` the numerator is its bias-corrected moment. Source:
STAMLite, repository version 0.1.0. Departure: a mean square that is not finite is left out of nu;
taken in, it would freeze the tensor for ever.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chainrule.transforms._checks import check_bounds, check_params
from chainrule.transforms._momentum_leaf import MomentumLeaf
from chainrule.transforms._numerics import abs_sq, bias_correction, ema, increment, up
from chainrule.transforms._per_parameter import PerParameter, stacked, unstacked
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._words import checked_words


class ScaleByTensorRmsState(NamedTuple):
    """State of `scale_by_tensor_rms`."""

    count: jax.Array
    """int32 scalar: updates made."""
    mean_square: PerParameter
    """EMA of the mean square of each tensor's gradient, in `stat_dtype`."""


@checked_words
def scale_by_tensor_rms(
    decay: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    debias_eps: jax.typing.ArrayLike = 0.0,
    stat_dtype: Any = jnp.float32,
) -> optax.GradientTransformation:
    r"""Scales each tensor by the inverse root mean square of its gradients.

    $$u_t = \frac{g_t}{\sqrt{\nu_t / (1 - \beta^t)} + \epsilon},\quad \nu_t = \beta\nu_{t-1} +
    (1-\beta)\,\overline{g_t^2}$$

    Args:
      decay: decay of the mean square, in [0, 1).
      eps: added to the denominator, at least 0.
      debias_eps: added to \(1 - \beta^t\) and to the divisor of a momentum leaf, at least 0 (the
        repository's eps).
      stat_dtype: dtype of the mean squares.

    Returns:
      A `optax.GradientTransformation`.

    Raises:
      ValueError: an argument outside its range.
      TypeError: a parameter that is not floating point.

    >>> tx = scale_by_tensor_rms()
    >>> u, _ = tx.update(jnp.array([3.0, -4.0]), tx.init(jnp.zeros(2)))
    >>> [round(float(x), 3) for x in u]
    [0.849, -1.131]

    References:
      STAM, package `stam-optimizer` 0.1.0.
    """
    check_bounds("scale_by_tensor_rms", decay=decay, eps=eps, debias_eps=debias_eps)

    def init(params: Tree) -> ScaleByTensorRmsState:
        check_params("scale_by_tensor_rms", params)
        return ScaleByTensorRmsState(
            jnp.zeros((), jnp.int32), PerParameter.full(0.0, params, stat_dtype)
        )

    def update(
        updates: Tree, state: ScaleByTensorRmsState, params: Tree = None
    ) -> tuple[Tree, ScaleByTensorRmsState]:
        del params
        count = increment(state.count)
        correction = bias_correction(decay, count) + debias_eps

        leaves, structure = jax.tree.flatten(updates)
        if structure != state.mean_square.structure:
            state.mean_square.match("scale_by_tensor_rms", updates)

        def mean_square(u: Any) -> jax.Array:
            if isinstance(u, MomentumLeaf):
                u, known = u.grad, u.mean_square
                if known is not None:
                    return known
            return jnp.sum(abs_sq(u)) / max(u.size, 1)

        new, old = stacked([mean_square(u) for u in leaves]), up(state.mean_square.values)
        squares = jnp.where(jnp.isfinite(new), ema(decay, old, new), old)
        # No finite gradient yet: there is no scale, and eps alone would make a step of any size.
        seen = squares > 0
        scales = jnp.where(seen, 1 / (jnp.sqrt(jnp.where(seen, squares, 1) / correction) + eps), 0)
        carry = np.array([isinstance(u, MomentumLeaf) for u in leaves])
        if carry.any():
            given = [
                u.correction if isinstance(u, MomentumLeaf) else jnp.float32(1) for u in leaves
            ]
            scales = scales / (stacked(given) + debias_eps * carry)

        def direction(u: Any, scale: jax.Array) -> jax.Array:
            dtype, u = (u.grad.dtype, u.mu) if isinstance(u, MomentumLeaf) else (u.dtype, up(u))
            return jnp.where(scale > 0, scale * u, 0).astype(dtype)

        new = [direction(*each) for each in zip(leaves, unstacked(scales), strict=True)]
        return jax.tree.unflatten(structure, new), ScaleByTensorRmsState(
            count, state.mean_square.replace(squares)
        )

    return optax.GradientTransformation(*typed(init, update))
