"""`optax.add_decayed_weights` as an optional link.

    u'_t = u_t + weight_decay p_{t-1}

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019. Departures from optax:
`None` is no link at all, and updates keep their dtype when the parameters have a wider one.
"""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import optax

from chainrule.transforms._checks import check_bounds
from chainrule.transforms._protocols import Tree
from chainrule.transforms._words import checked_words


@checked_words
def decoupled_weight_decay(
    weight_decay: jax.typing.ArrayLike | None,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformation:
    """Adds `weight_decay` times the parameters to the updates; multiply by the learning rate after it.

    Args:
      weight_decay: at least 0. The number 0: `update` does not need the parameters. `None`: no link, and neither.
      mask: a tree of booleans like the parameters, or a function from the parameters to one: which
        leaves decay.

    Returns:
      A `optax.GradientTransformation`.

    Raises:
      ValueError: `weight_decay` is negative; at `update`, the parameters are missing.

    >>> import jax.numpy as jnp
    >>> tx = decoupled_weight_decay(0.5)
    >>> params = jnp.array([1.0, 2.0])
    >>> tx.update(jnp.zeros(2), tx.init(params), params)[0].tolist()
    [0.5, 1.0]

    References:
      Loshchilov & Hutter, https://arxiv.org/abs/1711.05101
    """
    check_bounds("decoupled_weight_decay", weight_decay=weight_decay)
    if weight_decay is None:
        return optax.identity()
    is_zero = isinstance(weight_decay, numbers.Real) and weight_decay == 0
    # optax says `float`, and takes arrays.
    decay = optax.add_decayed_weights(weight_decay, mask)  # pyright: ignore[reportArgumentType]

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        if params is None and is_zero:
            return updates, state
        if params is None:
            raise ValueError(
                "decoupled_weight_decay: needs the parameters; call `update(updates, state, params)`, "
                "or build the chain with weight_decay=None"
            )
        decayed, state = decay.update(updates, state, params)
        return optax.tree.cast_like(decayed, updates), state

    return optax.GradientTransformation(decay.init, update)
