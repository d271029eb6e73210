"""A chain's numbers for each parameter (`PerParameter`, one vector) as a bridge keeps them: scalars beside the
parameter that each belongs to, so that a parameter may be left out of a step or join later."""

from typing import Any

import jax

from chainrule.transforms import PerParameter
from chainrule.transforms._per_parameter import stacked


class _Through:
    """The step of a path from `Unstacked` to its tree; it has no name."""

    def __str__(self) -> str:
        return "unstacked"


THROUGH = _Through()


@jax.tree_util.register_pytree_with_keys_class
class Unstacked:
    """What `PerParameter` is in the state that a bridge keeps: a tree of scalars like the parameters."""

    def __init__(self, scalars: Any):
        self._scalars = scalars

    def tree(self) -> Any:
        return self._scalars

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        return ((THROUGH, self._scalars),), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Unstacked":
        return cls(*children)


def unstack(state: Any) -> Any:
    """`state` with its vectors as scalars.

    >>> import jax.numpy as jnp
    >>> state = {"b1": PerParameter.full(0.5, {"w": 0.0, "b": 0.0})}
    >>> sorted(unstack(state)["b1"].tree()), stack(unstack(state))["b1"].values.tolist()
    (['b', 'w'], [0.5, 0.5])
    """
    return _replaced(state, PerParameter, lambda node: Unstacked(node.tree()))


def stack(state: Any) -> Any:
    """`state` with its scalars as vectors: undoes `unstack`."""

    def vector(node: Unstacked) -> PerParameter:
        leaves, structure = jax.tree.flatten(node.tree())
        return PerParameter(stacked(leaves), structure)

    return _replaced(state, Unstacked, vector)


def _replaced(state: Any, kind: type, new: Any) -> Any:
    def found(node: Any) -> bool:
        return isinstance(node, kind)

    return jax.tree.map(lambda x: new(x) if found(x) else x, state, is_leaf=found)
