"""What makes a state readable from outside: by later links, by `metrics`, by `hyperparams`, by `quantized_state`.

Every state is a NamedTuple, as in optax. What else a state says of itself it says by one of the members below; none of
them is inherited from here, so optax's own states count where they have them.
"""

from collections.abc import Callable, Mapping
from typing import (
    Any,
    ClassVar,
    NamedTuple,
    Protocol,
    TypeAlias,
    TypeGuard,
    TypeVar,
    runtime_checkable,
)

import jax

Tree: TypeAlias = Any
"""A tree of arrays, like the parameters or not. No type of Python says which; optax's own, `optax.Updates`, is a
union with scalars that has neither leaves nor fields."""

_S = TypeVar("_S")


class _Update(Protocol[_S]):
    """`update` of a gradient transformation with states of one type; it may take extra arguments by name."""

    def __call__(self, updates: Tree, state: _S, params: Tree = None, /) -> tuple[Tree, _S]: ...


def typed(init: Callable[[Tree], _S], update: _Update[_S]) -> tuple[Any, Any]:
    """The two functions of a gradient transformation, whose states a type checker has seen to be of one type.

    optax lets `update` be called with the state of any transformation, so a checker refuses the two where they say
    what their state is.
    """
    return init, update


@runtime_checkable
class Posts(Protocol):
    """A state that says itself what it offers to later links, because its fields are not what they see."""

    def posted(self) -> dict[str, Any]:
        """`mu`, `nu`, `trace`, `count` or `b1` -> a tree like the parameters, or a scalar."""
        ...


@runtime_checkable
class HasMetrics(Protocol):
    """A state with fields that `chainrule.metrics` shows."""

    metric_fields: ClassVar[tuple[str, ...]]
    """Their names. A value with a method `tree` (`PerParameter`) is shown as that tree."""


@runtime_checkable
class HasHyperparams(Protocol):
    """A state with live hyperparameters: `LiveState`, and that of `optax.inject_hyperparams`."""

    hyperparams: Mapping[str, jax.Array]
    """By name, scalars; set them between steps and the compiled step goes on with the new values."""


@runtime_checkable
class TakesCodes(Protocol):
    """A state whose transform steps some of its moments in codes, as `quantized_state` holds them."""

    codes_for: ClassVar[tuple[str, ...]]
    """The names of those fields; their codes must be of one format."""


def is_state(node: Any) -> TypeGuard[NamedTuple]:
    """Whether `node` is a NamedTuple.

    >>> import optax
    >>> is_state(optax.EmptyState()), is_state((1, 2))
    (True, False)
    """
    return isinstance(node, tuple) and hasattr(node, "_asdict")


def holds_moments(node: Any) -> TypeGuard[NamedTuple]:
    """Whether the fields of `node` are looked into for moments: a NamedTuple whose class name ends in `State`.

    The suffix tells a state from parameters that are themselves a NamedTuple (with a field `mu`, say).

    >>> import optax, typing
    >>> Layer = typing.NamedTuple("Layer", [("mu", float)])
    >>> holds_moments(optax.EmptyState()), holds_moments(Layer(0.5))
    (True, False)
    """
    return is_state(node) and type(node).__name__.endswith("State")


def has_hyperparams(node: Any) -> TypeGuard[HasHyperparams]:
    """Whether `node` is a state with a mapping `hyperparams`."""
    return is_state(node) and isinstance(getattr(node, "hyperparams", None), Mapping)
