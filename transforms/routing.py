"""Which leaves of a tree go to Muon and which to Adam, by label, path and number of axes.

A matrix of a hidden layer goes to Muon. Biases and embeddings, whatever their shape, and leaves of
fewer than two axes go to Adam (Jordan et al., 2024; the words in the path as in KerasOptimizers).
An output layer is a matrix too: exclude it by a pattern.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from chainrule.transforms._selection import select
from chainrule.transforms._trees import path_name

MUON, ADAM = "muon", "adam"


@dataclasses.dataclass(frozen=True)
class Route:
    """Where one leaf goes, and why."""

    path: str
    shape: tuple[int, ...]
    label: str
    reason: str


@dataclasses.dataclass(frozen=True)
class RoutingPlan:
    """The routes of a tree's leaves; prints as a table."""

    routes: tuple[Route, ...]

    def __str__(self) -> str:
        rows = [(r.path or "(the tree)", str(r.shape), r.label, r.reason) for r in self.routes]
        rows.insert(0, ("leaf", "shape", "route", "reason"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]
            )
            for row in rows
        )


@dataclasses.dataclass(frozen=True)
class Routing:
    """A rule from a tree to labels `"muon"` and `"adam"`; call it with a tree, or print its `plan`.

    The first that applies decides: a label, an excluded path, a word in the path, the number of
    axes.

    Args:
      exclude: leaves that go to Adam although they are matrices: one or more regular expressions,
        searched in each leaf's slash-joined path (KerasOptimizers' `exclude_layers`), a function of
        the path and the leaf, or a tree of booleans.
      words: leaves with one of these in the lower-cased path go to Adam; unlike a pattern, a word may
        occur nowhere. Leave `"embedding"` out to orthogonalise embeddings too.
      labels: a tree of `"muon"`, `"adam"` or `None` (the other rules decide), each for all leaves
        below it, or a function from the tree to such a tree.

    >>> hidden = {"bias": jnp.ones(4), "kernel": jnp.ones((4, 4))}
    >>> params = {"embedding": jnp.ones((9, 4)), "hidden": hidden}
    >>> print(Routing().plan(params))
    leaf           shape   route  reason
    embedding      (9, 4)  adam   'embedding' in the path
    hidden/bias    (4,)    adam   'bias' in the path
    hidden/kernel  (4, 4)  muon   a matrix
    >>> Routing(exclude="hiden")(params)
    Traceback (most recent call last):
      ...
    ValueError: Routing: `exclude` pattern 'hiden' matches none of the leaves 'embedding', ...
    """

    exclude: Any = None
    words: tuple[str, ...] = ("bias", "embedding")
    labels: Any = None

    def plan(self, tree: Any) -> RoutingPlan:
        """Every leaf of `tree` with its route and the reason.

        Raises:
          ValueError: a pattern that matches no leaf; a label that is not `"muon"`, `"adam"` or `None`.
        """
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        excluded = jax.tree.leaves(select("Routing", "exclude", self.exclude, tree))
        routes = []
        for (path, leaf), out, label in zip(leaves, excluded, self._given(tree), strict=True):
            name, shape = path_name(path), jnp.shape(leaf)
            found = [word for word in self.words if word in name.lower()]
            if label is not None:
                route, reason = label, "labelled"
            elif out:
                route, reason = ADAM, "excluded"
            elif found:
                route, reason = ADAM, f"{found[0]!r} in the path"
            elif len(shape) < 2:
                route, reason = ADAM, "fewer than two axes"
            else:
                route, reason = MUON, "a matrix" if len(shape) == 2 else "matrices"
            routes.append(Route(name, shape, route, reason))
        return RoutingPlan(tuple(routes))

    def __call__(self, tree: Any) -> Any:
        """A tree of labels like `tree`, as `optax.partition` asks for."""
        labels = [route.label for route in self.plan(tree).routes]
        return jax.tree.unflatten(jax.tree.structure(tree), labels)

    def _given(self, tree: Any) -> list[str | None]:
        """The label given to each leaf, if any."""
        labels = self.labels(tree) if callable(self.labels) else self.labels
        given: list[str | None] = []
        jax.tree.map(
            lambda label, below: given.extend([label] * len(jax.tree.leaves(below))),
            labels,
            tree,
            is_leaf=lambda node: node is None,
        )
        for label in given:
            if label not in (MUON, ADAM, None):
                raise ValueError(f"Routing: `labels` must be 'muon', 'adam' or None, got {label!r}")
        return given


HIDDEN_MATRICES = Routing()
"""The default of `chains.muon`."""
