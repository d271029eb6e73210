"""The dtypes that a chain's state keeps, and what a bridge refuses in an update."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax

_Program = TypeVar("_Program")
_State = TypeVar("_State")


class NeedsLossFunction(TypeError):
    """A chain evaluates the loss by itself, in JAX, which a closure of another framework cannot do for it."""


class StateChanges(TypeError):
    """A chain whose update returns state or parameters of another structure or other shapes than it was given."""


_LOSS_FUNCTION = re.compile(r"\b(value_fn|obj_fn|grad_fn)\b")


def settled(
    trace: Callable[[Any], tuple[_Program, tuple[Any, Any]]], params: Any, state: _State
) -> tuple[_Program, _State]:
    """Traces a step until the dtypes of the state that it returns are those that it takes.

    Some optax chains change dtypes at their first update (float32 moments of bfloat16 parameters); JAX then goes on
    with the new ones, so these are the ones a program is made for.

    Args:
      trace: maps structs of the state to a program and the structs (parameters, state) that it returns.
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
