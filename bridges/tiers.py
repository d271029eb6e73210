"""Moving parameters between tiers (`chainrule.transforms.tiered_state`) from a bridge.

A move changes the shape of the state, so a bridge calls `chainrule.retier` between steps and makes a new program where
it moved something.
"""

from collections.abc import Sequence
from typing import Any

import jax

from chainrule.transforms import TieredState, retier


def _is_tiered(node: Any) -> bool:
    return isinstance(node, TieredState)


def tiered_states(state: Any) -> list[TieredState]:
    """The states with tiers inside `state`."""
    return [node for node in jax.tree.leaves(state, is_leaf=_is_tiered) if _is_tiered(node)]


def tiers_of(state: Any) -> tuple[int, ...] | None:
    """The tier of every parameter, in the order of `jax.tree.leaves`; None if the chain has no tiers.

    Raises:
      ValueError: the chain has two states with tiers.
    """
    found = tiered_states(state)
    if len(found) > 1:
        raise ValueError(
            "TorchBridge: this chain holds two tiered states; give each its own parameter group"
        )
    return found[0].assignment.tiers if found else None


def is_due(state: Any) -> bool:
    """Whether the policy of a state may move parameters before the next update."""
    return any(node.assignment.policy.due(int(node.count) + 1) for node in tiered_states(state))


def retiered(states: Sequence[Any], grads: Sequence[Any], params: Sequence[Any]) -> list[Any]:
    """The states of several groups, which share one budget, after their moves.

    Args:
      states: JAX states.
      grads: the gradients of this step, each like its parameters.
      params: the parameters.
    """
    return list(retier(tuple(states), tuple(grads), tuple(params)))
