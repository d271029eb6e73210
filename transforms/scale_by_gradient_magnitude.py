r"""Multiplies each tensor's update by a running mean of its gradient's magnitude: one number of state a tensor.

    c_1 = mean|g_1|,    c_t = decay c_{t-1} + (1 - decay) mean|g_t|,    u'_t = c_t u_t

Source: COSMIC, repository commit 96f1a8c (tier 1).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import check_bounds, check_choice, check_params, require
from chainrule.transforms._numerics import ema, increment, up
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._trees import leaves_beside, map_to_other_shapes, map_unmasked
from chainrule.transforms._words import checked_words


class ScaleByGradientMagnitudeState(NamedTuple):
    """State of `scale_by_gradient_magnitude`."""

    count: jax.Array
    """int32 scalar: updates made."""
    magnitude: optax.Updates
    """c, float32 scalars, one a parameter."""

    metric_fields = ("magnitude",)


@checked_words
def scale_by_gradient_magnitude(
    decay: jax.typing.ArrayLike = 0.99, *, kernel: str = "xla"
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each tensor's update by an EMA of mean |g|, which starts at its first value.

    $$c_t = \beta c_{t-1} + (1-\beta)\,\overline{|g_t|},\quad u'_t = c_t u_t$$

    Args:
      decay: decay of the mean magnitude, in [0, 1).
      kernel: what finds the mean on a CPU: `"xla"`; `"native"`, the compiled kernel; `"auto"`, what is faster.

    Returns:
      A `optax.GradientTransformationExtraArgs`. `update` needs the raw gradient as `grad`, which
      `chainrule.chain` supplies.

    Raises:
      ValueError: `decay` outside its range; at `update`, no `grad`.

    >>> import chainrule
    >>> tx = chainrule.chain(optax.scale_by_sign(), scale_by_gradient_magnitude())
    >>> params = jnp.zeros(2)
    >>> tx.update(jnp.array([3.0, -1.0]), tx.init(params))[0].tolist()
    [2.0, -2.0]

    References:
      COSMIC, https://github.com/Kranium2002/COSMIC
    """
    check_bounds("scale_by_gradient_magnitude", decay=decay)
    check_choice("scale_by_gradient_magnitude", "kernel", kernel, ("xla", "native", "auto"))

    def init(params: Tree) -> ScaleByGradientMagnitudeState:
        check_params("scale_by_gradient_magnitude", params)
        return ScaleByGradientMagnitudeState(
            jnp.zeros((), jnp.int32),
            map_to_other_shapes(lambda _: jnp.zeros((), jnp.float32), params),
        )

    def mean_magnitude(g: jax.Array) -> jax.Array:
        # Of the finite entries: one that is not would stay in the EMA for ever.
        from chainrule.native import primitives

        (total,) = primitives.sums.bind(jnp.float32(1), g, kind="magnitude", batch=0, kernel=kernel)
        return total.reshape(()) / max(g.size, 1)

    def update(
        updates: Tree,
        state: ScaleByGradientMagnitudeState,
        params: Tree = None,
        *,
        grad: Tree = None,
        **_: Any,
    ) -> tuple[Tree, ScaleByGradientMagnitudeState]:
        del params
        grad = require(
            "scale_by_gradient_magnitude",
            "grad",
            grad,
            "compose with `chainrule.chain`, or pass `grad=gradients` to `update`",
        )

        def magnitude(u: jax.Array, g: jax.Array, old: jax.Array) -> jax.Array:
            del u
            mean = mean_magnitude(g)
            return jnp.where(state.count == 0, mean, ema(decay, old, mean)).astype(jnp.float32)

        leaves_beside("scale_by_gradient_magnitude", "grad", updates, grad)
        magnitudes = map_unmasked(magnitude, updates, grad, state.magnitude)
        new = jax.tree.map(lambda u, c: (c * up(u)).astype(u.dtype), updates, magnitudes)
        return new, ScaleByGradientMagnitudeState(increment(state.count), magnitudes)

    return optax.GradientTransformationExtraArgs(*typed(init, update))
