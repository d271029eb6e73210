"""Trees of which a part is masked or selected."""

from collections.abc import Callable
from typing import Any

import jax
import optax


def is_masked(node: Any) -> bool:
    """Whether `node` stands for a leaf that is left out."""
    return isinstance(node, optax.MaskedNode)


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


def unmasked_leaves(tree: Any, other: Any) -> list[Any]:
    """The leaves of `other` where those of `tree` are not masked.

    >>> unmasked_leaves({"a": 1.0, "b": optax.MaskedNode()}, {"a": 2.0, "b": 3.0})
    [2.0]
    """
    return jax.tree.leaves(map_unmasked(lambda _, x: x, tree, other))


def path_name(path: tuple[Any, ...]) -> str:
    """The keys of a leaf's path joined by slashes.

    >>> tree = {"dense": [1.0, 2.0]}
    >>> [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['dense/0', 'dense/1']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")
