"""Arguments that select leaves of a tree: patterns, paths, parameters of torch, functions, booleans.

A pattern or function that selects nothing is an error, so that a slip of the pen does not go unnoticed. A torch
optimizer has a tree for each parameter group, and what one of them lacks another may have; and a tensor of torch has
no place in a traced tree. So a bridge traces chains inside `naming`, which tells `select` the names of tensors and
collects what it misses.
"""

import contextlib
import re
from collections.abc import (
    Callable,
    Generator,
    Hashable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np

from chainrule.transforms._trees import is_placeholder, path_name


class Selections:
    """What a bridge knows of the leaves that arguments select, while it traces a chain inside `naming`.

    Attributes:
      names: the path of the leaf that a tensor means, by the tensor's `id`.
      found: what has selected a leaf, in any tree that shares this set.
      missed: what has selected none, with the error to be raised if no other tree has it either.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        found: set[tuple[str, Hashable]],
        missed: dict[tuple[str, Hashable], ValueError],
    ):
        self.names, self.found, self.missed = names, found, missed


_SELECTIONS: ContextVar[Selections | None] = ContextVar("_SELECTIONS", default=None)


@contextlib.contextmanager
def naming(selections: Selections) -> Generator[None]:
    """Within it `select` knows which leaf a tensor means, and leaves it to the caller to raise for what it misses."""
    token = _SELECTIONS.set(selections)
    try:
        yield
    finally:
        _SELECTIONS.reset(token)


def select(owner: str, argument: str, selection: Any, tree: Any) -> Any:
    """A tree of booleans like `tree`: which of its leaves `selection` means.

    Args:
      owner: the atom that took the selection, for the messages.
      argument: its name there, likewise.
      selection: a regular expression or several (a list), searched in each leaf's slash-joined path; a set of whole
        paths; in a torch bridge, a set or list of parameters; a function of the path and the leaf; a tree of booleans
        of which each holds for all below it; or `None`, no leaf.
      tree: the tree whose leaves are selected.

    Raises:
      ValueError: a pattern, a path, a parameter or the function selects no leaf of a tree that has some.
      TypeError: `selection` is none of these.

    >>> select("atom", "exclude", "bias", {"bias": 1.0, "kernel": 2.0})
    {'bias': True, 'kernel': False}
    >>> select("atom", "exclude", {"kernel"}, {"bias": 1.0, "kernel": 2.0})
    {'bias': False, 'kernel': True}
    >>> select("atom", "exclude", ["bias", "gain"], {"bias": 1.0, "kernel": 2.0})
    Traceback (most recent call last):
      ...
    ValueError: atom: `exclude` pattern 'gain' matches none of the leaves 'bias', 'kernel'
    """
    where = f"{owner}: `{argument}`"
    if isinstance(selection, (list, tuple)) and not all(isinstance(s, str) for s in selection):
        selection = set(selection) if all(map(_is_parameter, selection)) else selection
    if selection is None or isinstance(selection, (str, list, tuple)):
        patterns = (selection,) if isinstance(selection, str) else selection or ()
        if all(isinstance(s, str) for s in patterns):
            return _selected(where, [_by_pattern(s) for s in patterns], tree)
    if isinstance(selection, (set, frozenset)):
        return _selected(where, [_by_identity(where, s, tree) for s in selection], tree)
    if callable(selection) and not hasattr(selection, "named_parameters"):
        name = getattr(selection, "__name__", type(selection).__name__)
        return _selected(where, [_Member(selection, f"function {name}", selection)], tree)
    return _by_booleans(where, selection, tree)


class _Member(NamedTuple):
    """One of the things that select leaves."""

    key: Hashable
    text: str
    selects: Callable[[str, Any], Any]
    required: bool = True


def _by_pattern(pattern: str) -> _Member:
    return _Member(
        pattern, f"pattern {pattern!r}", lambda path, _: re.search(pattern, path) is not None
    )


def _is_parameter(value: Any) -> bool:
    return hasattr(value, "requires_grad")  # a tensor of torch, which is not imported here


def _by_identity(where: str, member: Any, tree: Any) -> _Member:
    """What a name or a parameter in a set selects."""
    if isinstance(member, str):
        return _Member(("name", member), f"name {member!r}", lambda path, _: path == member)
    if not _is_parameter(member):
        kind = type(member).__name__
        arrays = "; an array of JAX is another one after each update, so give its path"
        raise TypeError(
            f"{where} is a set of names or of torch parameters, got {kind} in it"
            f"{arrays if isinstance(member, (jax.Array, np.ndarray)) else ''}"
        )
    context = _SELECTIONS.get()
    if context is None and not any(leaf is member for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            f"{where} holds a torch parameter of shape {tuple(member.shape)}, which is none of these leaves; outside a "
            "`TorchBridge` give names"
        )
    name = context and context.names.get(id(member))
    return _Member(
        id(member),
        f"parameter of shape {tuple(member.shape)}",
        lambda path, leaf: leaf is member or path == name,
        required=member.requires_grad,  # a frozen one need not be anywhere
    )


def _selected(where: str, members: Sequence[_Member], tree: Any) -> Any:
    """The leaves that any of `members` selects; each must select one."""
    context, structure = _SELECTIONS.get(), jax.tree.structure(tree)
    leaves = [(path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    chosen = [False] * len(leaves)
    for key, text, selects, required in members:
        hits = [bool(selects(name, leaf)) for name, leaf in leaves]
        chosen = [a or b for a, b in zip(chosen, hits, strict=True)]
        if any(hits) and context:
            context.found.add((where, key))
        elif leaves and required and not any(hits):
            listed = ", ".join(repr(name) for name, _ in leaves)
            error = ValueError(f"{where} {text} matches none of the leaves {listed}")
            if context is None:
                raise error
            context.missed.setdefault((where, key), error)
    return jax.tree.unflatten(structure, chosen)


def _by_booleans(where: str, selection: Any, tree: Any) -> Any:
    if is_placeholder(tree):
        return tree
    # JAX warns of other iterables where it takes them for leaves.
    is_tree = not isinstance(selection, (Iterator, KeysView, ValuesView))
    for chosen in jax.tree.leaves(selection) if is_tree else [selection]:
        if not (isinstance(chosen, (bool, np.bool_)) or _is_boolean_array(chosen)):
            got = type(selection).__name__
            got += "" if chosen is selection else f" with {type(chosen).__name__} in it"
            raise TypeError(
                f"{where} must be a path pattern or several, a set of paths or (`set(module.parameters())`) of torch "
                f"parameters, a function of path and leaf, or a tree of booleans, got {got}"
            )
    return jax.tree.map(
        lambda chosen, below: jax.tree.map(lambda _: bool(chosen), below), selection, tree
    )


def _is_boolean_array(value: Any) -> bool:
    return (
        isinstance(value, (jax.Array, np.ndarray)) and value.shape == () and value.dtype == np.bool_
    )
