"""Where each leaf of a chain's state lives in the state of a torch-like optimizer.

A chain's state is one pytree; a torch optimizer keeps a dict of named tensors for every parameter. A part of the state
that has the structure of the parameters (`mu`, say) is split over them; everything else (a step count, a random key)
belongs to the whole group.
"""

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax

from chainrule.bridges.step.vectors import THROUGH
from chainrule.transforms import TieredState, hyperparams
from chainrule.transforms._trees import PLACEHOLDER


class Slot(NamedTuple):
    """The home of one leaf of the state."""

    owner: int | None
    """Position of the parameter in the flattened tree; None: the leaf belongs to the group."""
    name: str
    """Readable, and unique among the leaves with this owner and those of the group; the other parameters of a list do
    not count, so that a parameter's state is called the same in all lists."""
    path: str = ""
    """Where it is in the chain's state: what it was called up to version 0.2 where two parameters clashed."""


def _parts(path: tuple[Any, ...]) -> tuple[str | int, ...]:
    return tuple(_part(key) for key in path if key is not THROUGH)


def _part(key: Any) -> str | int:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return key.name
    if isinstance(key, jax.tree_util.SequenceKey):
        return key.idx
    return str(getattr(key, "key", key))


def _short(path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The last name of a path, with the indices that follow it."""
    names = [i for i, part in enumerate(path) if isinstance(part, str)]
    return path[names[-1] :] if names else path


def _own_lists(init: Callable[[Any], Any], size: int) -> set[tuple[Any, ...]]:
    """The paths of lists of a size that `init` makes whatever the parameters are, so that they are not like them."""
    found: set[tuple[Any, ...]] = set()

    def note(path: tuple[Any, ...], node: Any) -> bool:
        if type(node) is list and len(node) == size:
            found.add(path)
        return False

    try:
        made = jax.eval_shape(init, PLACEHOLDER)
    except (AttributeError, LookupError, TypeError, ValueError):
        return found  # it knows the parameters as a list and nothing else
    jax.tree_util.tree_flatten_with_path(made, is_leaf=note, is_leaf_takes_path=True)
    return found


def slots(
    state: Any,
    params: Any,
    init: Callable[[Any], Any] | None = None,
    reserved: Collection[str] = (),
) -> list[Slot]:
    """The home of every leaf of `state`, in the order of `jax.tree.leaves(state)`.

    A leaf is named by its field (`"mu"`); where two of one parameter, or one of its and one of the group, would have
    one name, both are named by their path (`"0.mu"`, `"1.mu"`).

    Args:
      state: the state of a chain, with any leaves.
      params: the parameters it was made for: a dict by name or a list.
      init: of the chain, to tell a list that is the chain's own from one like a list of parameters; without it every
        list that is as long is taken for one.
      reserved: names that a bridge needs itself; a leaf whose path is one of them begins with `chain.`.

    >>> import jax.numpy as jnp, optax
    >>> params = {"w": jnp.ones(2), "b": jnp.ones(1)}
    >>> [slot[:2] for slot in slots(optax.adam(0.1).init(params), params)]
    [(None, 'count'), (0, 'mu'), (1, 'mu'), (0, 'nu'), (1, 'nu')]
    """
    keys = sorted(params) if isinstance(params, dict) else list(range(len(params)))
    position = {key: i for i, key in enumerate(keys)}

    def like_params(node: Any) -> bool:
        if isinstance(node, TieredState):
            return True
        if isinstance(params, dict):
            return isinstance(node, dict) and node.keys() == params.keys()
        return type(node) is list and len(node) == len(params)

    named = isinstance(params, dict)
    own = set() if init is None or named else _own_lists(init, len(keys))

    def of_params(path: tuple[Any, ...], node: Any) -> bool:
        return like_params(node) and path not in own

    found: list[tuple[int | None, tuple[str | int, ...], tuple[str | int, ...]]] = []
    for path, node in jax.tree_util.tree_flatten_with_path(state, of_params, True)[0]:
        prefix = _parts(path)
        if not keys or not of_params(path, node):
            found.append((None, prefix, ()))
            continue
        for inner, _ in jax.tree_util.tree_flatten_with_path(node)[0]:
            parts = _parts(inner)
            if not isinstance(node, TieredState):
                key = inner[0].key if isinstance(params, dict) else inner[0].idx
                found.append((position[key], prefix, parts[1:]))
            elif parts[0] == "inner" and len(node.inner) == len(keys):
                owner = parts[1]
                assert isinstance(owner, int)
                found.append((owner, prefix + parts[:1] + parts[2:], ()))
            else:
                found.append((None, prefix + parts, ()))

    def text(*parts: tuple[str | int, ...]) -> str:
        name = ".".join(str(part) for path in parts for part in path) or "state"
        return f"chain.{name}" if name in reserved else name

    of_owner = Counter((owner, text(_short(prefix), suffix)) for owner, prefix, suffix in found)
    owners_of = Counter(short for _, short in of_owner)

    def slot(
        owner: int | None, prefix: tuple[str | int, ...], suffix: tuple[str | int, ...]
    ) -> Slot:
        short, path = text(_short(prefix), suffix), text(prefix, suffix)
        among_all = owners_of[short] > 1 if owner is None else of_owner[None, short] > 0
        return Slot(owner, path if among_all or of_owner[owner, short] > 1 else short, path)

    return [slot(*place) for place in found]


def live_leaves(state_structure: Any) -> dict[str, int]:
    """Name of every live hyperparameter -> position of its leaf in the flattened state.

    A chain inside a tier has its hyperparameters once for each tensor: they are the tensor's state and none of these.

    >>> import chainrule, jax.numpy as jnp
    >>> state = chainrule.chains.adam(weight_decay=None).init({"w": jnp.ones(2)})
    >>> sorted(live_leaves(jax.tree.structure(state)))
    ['b1', 'b2', 'eps', 'eps_root', 'learning_rate']
    """
    numbered = jax.tree.unflatten(state_structure, range(state_structure.num_leaves))

    def is_tiered(node: Any) -> bool:
        return isinstance(node, TieredState)

    def outside(node: Any) -> Any:
        return node._replace(inner=()) if is_tiered(node) else node

    found = hyperparams(jax.tree.map(outside, numbered, is_leaf=is_tiered))
    return {name: int(position) for name, position in found.items()}
