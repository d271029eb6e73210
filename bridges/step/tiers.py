"""Moving parameters between tiers (`chainrule.transforms.tiered_state`) from a bridge, and logging their gates.

A move changes the shape of the state, so a bridge calls `chainrule.retier` between steps and makes a new program where
it moved something.
"""

import contextlib
import logging
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax

from chainrule.native.dtypes import x64_if_wide
from chainrule.transforms import GradientGateState, TieredState, retier

TIERS = "tiers"
"""The entry that keeps the tiers of a group beside its state: static in JAX."""

_logger = logging.getLogger("chainrule.gate")


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
        raise ValueError("this chain holds two tiered states; give each its own parameter group")
    return found[0].assignment.tiers if found else None


def retiered(states: Sequence[Any], grads: Sequence[Any], params: Sequence[Any]) -> list[Any]:
    """The states of several groups, which share one budget, after their moves.

    Args:
      states: JAX states.
      grads: the gradients of this step, each like its parameters.
      params: the parameters.
    """
    with x64_if_wide(params):
        return list(retier(tuple(states), tuple(grads), tuple(params)))


def _gates(state: Any) -> list[GradientGateState]:
    def is_gate(node: Any) -> bool:
        return isinstance(node, GradientGateState)

    return [node for node in jax.tree.leaves(state, is_leaf=is_gate) if is_gate(node)]


@contextlib.contextmanager
def gates_logged(states: Callable[[], Sequence[Any]]) -> Generator[None]:
    """Logs every gate that a step moves, if `chainrule.gate` logs at INFO; else costs nothing.

    Args:
      states: the states of the groups, as they are when it is called.
    """
    if not _logger.isEnabledFor(logging.INFO):
        yield
        return

    def scales() -> list[float]:
        return [float(gate.gate_scale) for state in states() for gate in _gates(state)]

    before = scales()
    yield
    gates = [(group, gate) for group, state in enumerate(states()) for gate in _gates(state)]
    for (group, gate), old, new in zip(gates, before, scales(), strict=True):
        if new != old:
            event = {"group": group, "step": int(gate.count), "gate_scale": new, "before": old}
            _logger.info("gate", extra={"event": event})
