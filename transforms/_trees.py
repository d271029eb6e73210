"""Trees of which a part is masked or selected."""

import re
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


def select(owner: str, argument: str, selection: Any, tree: Any) -> Any:
    """A tree of booleans like `tree`: which of its leaves `selection` means.

    Args:
      owner: the atom that took the selection, for the messages.
      argument: its name there, likewise.
      selection: a regular expression or several, searched in each leaf's slash-joined path; a function of the path and
        the leaf; a tree of booleans of which each holds for all below it; or `None`, no leaf.
      tree: the tree whose leaves are selected.

    Raises:
      ValueError: a pattern occurs in no path.

    >>> select("atom", "exclude", "bias", {"bias": 1.0, "kernel": 2.0})
    {'bias': True, 'kernel': False}
    >>> select("atom", "exclude", ["bias", "gain"], {"bias": 1.0, "kernel": 2.0})
    Traceback (most recent call last):
      ...
    ValueError: atom: `exclude` pattern 'gain' matches none of the leaves 'bias', 'kernel'
    """
    if selection is None:
        return jax.tree.map(lambda _: False, tree)
    if isinstance(selection, str):
        selection = (selection,)
    if isinstance(selection, (list, tuple)) and all(isinstance(s, str) for s in selection):
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        for pattern in selection:
            if not any(re.search(pattern, name) for name in names):
                listed = ", ".join(map(repr, names))
                raise ValueError(
                    f"{owner}: `{argument}` pattern {pattern!r} matches none of the leaves {listed}"
                )
        return jax.tree_util.tree_map_with_path(
            lambda path, _: any(re.search(s, path_name(path)) for s in selection), tree
        )
    if callable(selection):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: bool(selection(path_name(path), leaf)), tree
        )
    return jax.tree.map(
        lambda chosen, below: jax.tree.map(lambda _: bool(chosen), below), selection, tree
    )
