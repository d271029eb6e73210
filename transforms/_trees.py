"""Trees of which a part is masked, selected or absent, and what stands for a whole tree."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from chainrule.transforms._protocols import Tree


def is_masked(node: Any) -> bool:
    """Whether `node` stands for a leaf that is left out."""
    return isinstance(node, optax.MaskedNode)


class _Any:
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "ANY"


ANY: Any = _Any()
"""Static data of a state that `optax.tree.map_params` asks for: it holds for every state of this kind."""


def _placeholder() -> Any:
    seen: list[Any] = []

    def init(params: Tree) -> Tree:
        seen.append(params)
        return params

    optax.tree.map_params(init, lambda x: x, 0.0)
    return seen[0]


PLACEHOLDER = _placeholder()
"""What `optax.tree.map_params` gives to `init` in the place of the parameters."""


def is_placeholder(params: Any) -> bool:
    """Whether `params` is what `optax.tree.map_params` gives to `init`: it stands for the parameters, whatever they
    are, and what `init` makes in their shapes must hold it in their place."""
    return isinstance(params, type(PLACEHOLDER))


def map_to_other_shapes(f: Callable[..., Any], params: Any) -> Any:
    """`jax.tree.map` to leaves in other shapes than the parameters': `optax.tree.map_params` does not take them for
    parameters.

    >>> map_to_other_shapes(lambda p: p.size, {"w": np.ones((2, 3))})
    {'w': 6}
    """
    return np.zeros(()) if is_placeholder(params) else jax.tree.map(f, params)


def where_updated(updates: Any, params: Any) -> Any:
    """`params` with `None` where `updates` has it: what gets no gradient is no parameter.

    So one may pass a whole Equinox model, of which some leaves are functions, as optax lets one do. Parameters of
    another structure stay as they are, for the caller to refuse.

    >>> where_updated({"w": 1.0, "f": None}, {"w": 2.0, "f": abs})
    {'f': None, 'w': 2.0}
    """

    def taken(u: Any, p: Any) -> Any:
        return None if u is None else p

    try:
        return jax.tree.map(taken, updates, params, is_leaf=lambda x: x is None)
    except ValueError:
        return params


def map_unmasked(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` that keeps the masked leaves of `tree`, whatever `rest` holds in their place.

    Inside `optax.partition` the updates are masked while the raw gradient among the extra arguments is whole.

    >>> masked = {"a": 1.0, "b": optax.MaskedNode()}
    >>> map_unmasked(lambda u, g: u + g, masked, {"a": 2.0, "b": 3.0})
    {'a': 3.0, 'b': MaskedNode()}
    """
    return jax.tree.map(
        lambda x, *others: x if is_masked(x) else f(x, *others), tree, *rest, is_leaf=is_masked
    )


def leaves_beside(owner: str, name: str, updates: Any, tree: Any, remedy: str = "") -> list[Any]:
    """The leaves of `tree` beside those of `updates` that are not masked.

    Args:
      owner: the atom that reads `tree`, for the messages.
      name: the extra argument that it came as, likewise.
      updates: the updates of this link.
      tree: what an earlier link keeps, or the gradient: like the updates, but it may lack what is masked in them.
      remedy: for an update beside which there is nothing.

    Raises:
      ValueError: `tree` has nothing, or something of another shape, in the place of an update.

    >>> masked = {"a": 1.0, "b": optax.MaskedNode()}
    >>> leaves_beside("atom", "mu", masked, {"a": 2.0, "b": 3.0})
    [2.0]
    >>> leaves_beside("atom", "mu", {"a": 1.0, "b": 2.0}, masked)
    Traceback (most recent call last):
      ...
    ValueError: atom: no earlier link keeps `mu` of 'b'; put `atom` beside the link that does, inside its
    `optax.partition` or `optax.masked`
    """
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_masked)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_masked)]
    try:
        others = structure.flatten_up_to(tree)
    except (TypeError, ValueError):
        others = [tree]  # another structure altogether
    alike = len(others) == len(leaves)
    for path, leaf, other in zip(paths, leaves, others, strict=False):
        if is_masked(leaf):
            continue
        if is_masked(other):
            beside = f"put `{owner}` beside the link that does, inside its `optax.partition` or `optax.masked`"
            raise ValueError(
                f"{owner}: no earlier link keeps `{name}` of {path_name(path)!r}; {remedy or beside}"
            )
        alike &= jax.tree_util.all_leaves([other]) and np.shape(other) == np.shape(leaf)
    if not alike:
        raise ValueError(
            f"{owner}: `{name}` must be like the updates, {_shapes(updates)}, got {_shapes(tree)}; a wrapper that "
            f"reshapes the updates, such as `optax.flatten`, must go around the links that keep `{name}` too: "
            f"`optax.flatten(chainrule.chain(..., {owner}(...)))`"
        )
    return [x for x, leaf in zip(others, leaves, strict=True) if not is_masked(leaf)]


def _shapes(tree: Any) -> str:
    return str(jax.tree.map(np.shape, tree))


def path_name(path: tuple[Any, ...]) -> str:
    """The keys of a leaf's path joined by slashes.

    The name that a box of Flax (`nnx.Param`, `nn.Partitioned`) has for what is in it is left out: `nnx.Optimizer` gives
    boxes to `init` and bare arrays to `update`, and a leaf must have one name.

    >>> tree = {"dense": [1.0, 2.0]}
    >>> [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['dense/0', 'dense/1']
    """
    attribute = jax.tree_util.GetAttrKey
    above = path[-2:-1]
    if path[-1:] == (attribute("value"),) and above and not isinstance(above[0], attribute):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")
