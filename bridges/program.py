"""From a chain and the shapes of one parameter group to the function a bridge runs every step."""

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.bridges.rounding import apply_updates
from chainrule.bridges.scalars import apart, together

Struct = jax.ShapeDtypeStruct


class NeedsLossFunction(TypeError):
    """A chain evaluates the loss by itself, in JAX, which a torch closure cannot do for it."""


class StateChanges(TypeError):
    """A chain whose update returns state or parameters of another structure or other shapes than it was given."""


class Extras(NamedTuple):
    """What a step takes beside parameters, gradients and state: two scalars."""

    multiplier: Any
    """float32: factor on the updates of a chain that exposes no learning rate."""
    value: Any
    """float32: the loss at the parameters, for chains that ask for it."""


class BridgeState(NamedTuple):
    """The state a step maps: the chain's, and the bridge's own."""

    chain: Any
    """The chain's state, `apart`."""
    rounding: Any
    """int32 [2], the seed and step of stochastic rounding; or None."""


class Update(NamedTuple):
    """What a step shall compute.

    Attributes:
      chain: the gradient transformation.
      multiplier: whether updates are multiplied by `Extras.multiplier`.
      rounding: whether bfloat16 parameters are rounded stochastically.
      value: whether the chain is given the loss.
    """

    chain: optax.GradientTransformation
    multiplier: bool
    rounding: bool
    value: bool

    def __call__(
        self, params: Any, grads: Any, state: BridgeState, extras: Extras
    ) -> tuple[Any, BridgeState]:
        """New parameters and new state; a pure JAX function."""
        if (
            self.rounding
        ):  # float32 gradients, so that the updates are float32 when they meet the parameters
            grads = jax.tree.map(
                lambda g: g.astype(jnp.float32) if g.dtype == jnp.bfloat16 else g, grads
            )
        offered = {"grad": grads, **({"value": extras.value} if self.value else {})}
        updates, new = self.chain.update(
            grads, together(state.chain), params, **_taken(self.chain.update, offered)
        )
        if self.multiplier:
            updates = jax.tree.map(lambda u: u * extras.multiplier.astype(u.dtype), updates)
        rounding = state.rounding
        new_params = apply_updates(params, updates, rounding)
        if rounding is not None:
            rounding = rounding + jnp.array([0, 1], jnp.int32)
        return new_params, BridgeState(apart(new), rounding)


def _taken(update: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the extra arguments that `update` takes."""
    parameters = inspect.signature(update).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    names = {p.name for p in parameters}
    return {name: value for name, value in offered.items() if name in names}


def as_transformation(chain: Any) -> optax.GradientTransformation:
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


_LOSS_FUNCTION = re.compile(r"\b(value_fn|obj_fn|grad_fn)\b")


def settled(
    trace: Callable[[BridgeState], tuple[Any, tuple[Any, BridgeState]]],
    params: Any,
    state: BridgeState,
) -> tuple[Any, BridgeState]:
    """Traces a step until the dtypes of the state it returns are those that it takes.

    Some optax chains change dtypes at their first update (float32 moments of bfloat16 parameters); JAX then goes on
    with the new ones, so these are the ones a program is made for.

    Args:
      trace: maps structs of the state to a program and the structs that the program returns.
      params: structs of the parameters.
      state: structs of the initial state.

    Returns:
      The program and the structs of its state.

    Raises:
      NeedsLossFunction: the chain asks for a function that evaluates the loss.
      StateChanges: structure or shapes of state or parameters do not stay what they are.
    """
    for _ in range(4):
        try:
            program, (new_params, new) = trace(state)
        except (TypeError, ValueError) as error:
            asked = _LOSS_FUNCTION.search(str(error))
            if asked is None:
                raise
            raise NeedsLossFunction(
                f"this chain evaluates the loss by itself: it asks for `{asked[1]}`, a function that JAX can trace, "
                "and a torch closure is none. Use a variant that works from the value alone (`optax.lbfgs` with "
                "`linesearch=None`, `optax.polyak_sgd`, `optax.contrib.momo`), or run the chain in JAX"
            ) from error
        _check_structure("parameters", params, new_params)
        _check_structure("state", state, new)
        if list(map(_kind, jax.tree.leaves(state))) == list(map(_kind, jax.tree.leaves(new))):
            return program, state
        state = new
    raise StateChanges("the dtypes of the chain's state go on changing from update to update")


def _kind(struct: Any) -> tuple[str, bool]:
    return str(struct.dtype), bool(getattr(struct, "weak_type", False))


def _check_structure(what: str, old: Any, new: Any) -> None:
    before, after = jax.tree.structure(old), jax.tree.structure(new)
    if before != after:
        raise StateChanges(
            f"the chain's update changes the structure of its {what}, from {before} to {after}; a bridge needs one "
            "that stays as it is"
        )
    leaves = jax.tree_util.tree_leaves_with_path(old)
    for (path, a), b in zip(leaves, jax.tree.leaves(new), strict=True):
        if a.shape != b.shape:
            path = [key for key in path if key != jax.tree_util.GetAttrKey("chain")]
            name = jax.tree_util.keystr(tuple(path), simple=True, separator=".")
            raise StateChanges(
                f"the chain's update changes the shape of `{name}` in its {what} from {a.shape} to {b.shape}; a bridge "
                "needs one that stays as it is"
            )
