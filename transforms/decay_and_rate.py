"""The two links that end an optimizer, or none where the chain before them is an optimizer already.

    u'_t = -learning_rate (u_t + weight_decay p_{t-1})

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019.
"""

from collections.abc import Callable
from typing import Any

import optax

from chainrule.transforms._checks import check_bounds
from chainrule.transforms._words import checked_words
from chainrule.transforms.decoupled_weight_decay import decoupled_weight_decay


@checked_words
def decay_and_rate(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    weight_decay: float | None = None,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Decoupled weight decay and the learning rate, both optional.

    Args:
      learning_rate: a number, scalar array or schedule, at least 0. `None`: the updates pass.
      weight_decay: decoupled weight decay, at least 0. `None`: none, and `update` needs no parameters.
      mask: which parameters decay, as in `optax.adamw`.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range; `weight_decay` without `learning_rate`; at `update`, parameters missing
        while there is decay.

    >>> import jax.numpy as jnp
    >>> tx = decay_and_rate(learning_rate=0.5, weight_decay=1.0)
    >>> params = jnp.array([2.0])
    >>> tx.update(jnp.ones(1), tx.init(params), params)[0].item()
    -1.5

    References:
      Loshchilov & Hutter, https://arxiv.org/abs/1711.05101
    """
    check_bounds("decay_and_rate", learning_rate=learning_rate, weight_decay=weight_decay)
    if learning_rate is not None:
        rate = optax.scale_by_learning_rate(learning_rate)
        return optax.chain(decoupled_weight_decay(weight_decay, mask), rate)
    if weight_decay is not None:
        raise ValueError(
            "decay_and_rate: `weight_decay` is multiplied by `learning_rate`, got "
            f"weight_decay={weight_decay} with learning_rate=None; give both, or let the chain before it decay"
        )
    return optax.with_extra_args_support(optax.identity())
