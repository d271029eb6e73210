"""The function that a bridge runs every step: new parameters and new state, from parameters, gradients and state."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.bridges.step.rounding import apply_updates
from chainrule.bridges.step.vectors import stack, unstack


class Assigning(NamedTuple):
    """A transformation whose `update` returns what becomes of the parameters, in place of updates to be added."""

    init: Callable[..., Any]
    update: Callable[..., Any]


class Extras(NamedTuple):
    """What a step takes beside parameters, gradients and state: two scalars, and trees that its caller gives."""

    multiplier: Any
    """float32: factor on the updates of a chain that exposes no learning rate."""
    value: Any
    """float32: the loss at the parameters, for chains that ask for it."""
    given: dict[str, Any] = {}  # noqa: RUF012 -- never written
    """Extra arguments of the chain by name."""


class BridgeState(NamedTuple):
    """The state a step maps: the chain's, and the bridge's own."""

    chain: Any
    """The chain's state, `unstack`ed."""
    rounding: Any
    """int32 [2], the seed and step of stochastic rounding; or None."""


class StepFunction(NamedTuple):
    """What a step shall compute.

    Attributes:
      chain: the gradient transformation.
      multiplier: whether updates are multiplied by `Extras.multiplier`.
      rounding: whether bfloat16 parameters are rounded stochastically.
      value: whether the chain is given the loss.
    """

    chain: optax.GradientTransformation | Assigning
    multiplier: bool
    rounding: bool
    value: bool

    def __call__(
        self, params: Any, grads: Any, state: BridgeState, extras: Extras
    ) -> tuple[Any, BridgeState]:
        """New parameters and new state; a pure JAX function."""
        if self.rounding:  # float32 gradients, for updates that meet the parameters in float32
            grads = jax.tree.map(
                lambda g: g.astype(jnp.float32) if g.dtype == jnp.bfloat16 else g, grads
            )
        offered = {"grad": grads, **({"value": extras.value} if self.value else {}), **extras.given}
        updates, new = self.chain.update(
            grads, stack(state.chain), params, **_taken(self.chain.update, offered)
        )
        if isinstance(self.chain, Assigning):
            return updates, BridgeState(unstack(new), state.rounding)
        if self.multiplier:
            updates = jax.tree.map(lambda u: u * extras.multiplier.astype(u.dtype), updates)
        rounding = state.rounding
        new_params = apply_updates(params, updates, rounding)
        if rounding is not None:
            rounding = rounding + jnp.array([0, 1], jnp.int32)
        return new_params, BridgeState(unstack(new), rounding)


def _taken(update: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the extra arguments that `update` takes."""
    parameters = inspect.signature(update).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    names = {p.name for p in parameters}
    return {name: value for name, value in offered.items() if name in names}


def as_transformation(chain: Any) -> Any:
    """The transformation that `chain` is, or that it makes when called.

    Args:
      chain: a gradient transformation, an `optax.MultiSteps`, or a function without arguments that returns one.

    Raises:
      TypeError: it is none of these.
    """
    if not hasattr(chain, "update") and callable(chain):
        chain = chain()
    if hasattr(chain, "gradient_transformation"):
        chain = chain.gradient_transformation()
    if not (callable(getattr(chain, "init", None)) and callable(getattr(chain, "update", None))):
        raise TypeError(
            "expected a gradient transformation (`init` and `update`) or a function without arguments that returns "
            f"one, got {type(chain).__name__}"
        )
    return chain
