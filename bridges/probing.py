"""What a chain says of itself when it is traced or run once: before a bridge runs it for good."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chainrule.bridges.step.slots import live_leaves
from chainrule.native.dtypes import x64_if_wide
from chainrule.transforms import assign

RATE = "learning_rate"


def starting_rate(chain: optax.GradientTransformation) -> float | None:
    """The live learning rate that a chain starts with; None if it has none, or follows a schedule.

    >>> starting_rate(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)), starting_rate(optax.sgd(0.1))
    (0.1, None)
    """
    chain = optax.with_extra_args_support(chain)
    state = chain.init({})
    live = live_leaves(jax.tree.structure(state))
    if RATE not in live or RATE not in settable(chain, {}, state, live):
        return None
    return float(str(np.float32(jax.tree.leaves(state)[live[RATE]])))


def settable(chain: Any, params: Any, state: Any, live: dict[str, int]) -> dict[str, int]:
    """The live hyperparameters that an update leaves as they are: a schedule would write its own value."""
    leaves, structure = jax.tree.flatten(state)

    def update(params: Any, leaves: Any) -> Any:
        state = jax.tree.unflatten(structure, leaves)
        return jax.tree.leaves(chain.update(params, state, params, grad=params)[1])

    jaxpr = jax.make_jaxpr(update)(params, leaves).jaxpr
    given = jaxpr.invars[len(jaxpr.invars) - len(leaves) :]
    return {name: i for name, i in live.items() if jaxpr.outvars[i] is given[i]}


def decays(chain: optax.GradientTransformation, structs: dict[str, jax.ShapeDtypeStruct]) -> bool:
    """Whether updates for gradients of zero depend on the parameters: a weight decay in the chain.

    Args:
      chain: it is initialised and updated once or twice.
      structs: shapes and dtypes of the parameters by name.
    """
    chain = optax.with_extra_args_support(chain)

    def updates(size: Any) -> list[Any]:
        params = {name: jnp.full(s.shape, size, s.dtype) for name, s in structs.items()}
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.tree.leaves(chain.update(zeros, chain.init(params), params, grad=zeros)[0])

    @jax.jit
    def differ(small: Any, large: Any) -> Any:  # noise is the same for both
        pairs = zip(updates(small), updates(large), strict=True)
        return jnp.any(jnp.stack([jnp.any(a != b) for a, b in pairs]))

    with x64_if_wide(structs):
        return bool(differ(1.0, 2.0))


def in_tiers(chain: optax.GradientTransformation, tiers: Sequence[int] | None) -> Any:
    """`chain` whose state starts with the parameters in these tiers; None: in those that it gives them."""
    if tiers is None:
        return chain

    def init(params: Any) -> Any:
        return assign(chain.init(params), tiers, params)

    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(chain).update)
