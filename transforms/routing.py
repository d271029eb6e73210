"""Which leaves of a tree go to Muon and which to Adam, by label, path and number of axes.

A matrix of a hidden layer goes to Muon. Biases, embeddings and output layers, whatever their shape, and leaves of fewer
than two axes go to Adam (Jordan et al., 2024). Departure: KerasOptimizers, from which the two words come, leave output
layers to Muon (`words=("bias", "embedding")`).
"""

import dataclasses
import functools
import logging
from typing import Any

import jax
import numpy as np

from chainrule.transforms._checks import check_arrays
from chainrule.transforms._layers import named_like, vocabulary
from chainrule.transforms._selection import select
from chainrule.transforms._trees import path_name

MUON, ADAM = "muon", "adam"

_logger = logging.getLogger("chainrule.routing")


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


WORDS = ("bias", "embedding")


@dataclasses.dataclass(frozen=True)
class Routing:
    """A rule from a tree to labels `"muon"` and `"adam"`; call it with a tree, or print its `plan`.

    The first that applies decides: a label; an excluded leaf; a word in the path; what a leaf is known to be by its
    name or shape; the number of axes. Each plan is logged once, by the logger `chainrule.routing` at INFO, with every
    leaf in it.

    *Names.* A leaf is an embedding or an output layer if its name, its module's or the one's above is one that the
    large libraries give these: `transforms._layers` lists them (`embed_tokens`, `wte`, `patch_embed`, `lm_head`,
    `classifier`, `score`, and at the top of a model `fc`, `output`, ...). *Shapes.* So is a matrix with a dimension of
    at least 8192 that occurs in no more than two leaves and is at least four times every other dimension: a vocabulary.
    What neither tells (the last layer of an unnamed sequence) goes to Muon unless it is excluded; for a torch model
    `chainrule.torch_routing(model)` looks at its modules.

    Args:
      exclude: leaves that go to Adam although they are matrices: one or more regular expressions, searched in each
        leaf's slash-joined path (KerasOptimizers' `exclude_layers`), a set of whole paths or (in a torch bridge) of
        parameters, a function of the path and the leaf, or a tree of booleans.
      words: leaves with one of these in the lower-cased path go to Adam, and no others by their name or shape; unlike a
        pattern, a word may occur nowhere. `("bias", "embedding")` is KerasOptimizers' rule, `()` sends every matrix to
        Muon. `None`: these two words and what names and shapes tell.
      labels: a tree of `"muon"`, `"adam"` or `None` (the other rules decide), each for all leaves
        below it, or a function from the tree to such a tree.

    >>> import jax.numpy as jnp
    >>> hidden = {"bias": jnp.ones(4), "kernel": jnp.ones((4, 4))}
    >>> params = {"lm_head": jnp.ones((4, 9)), "hidden": hidden, "wte": jnp.ones((9, 4))}
    >>> print(Routing().plan(params))
    leaf           shape   route  reason
    hidden/bias    (4,)    adam   'bias' in the path
    hidden/kernel  (4, 4)  muon   a matrix
    lm_head        (4, 9)  adam   an output layer, by 'lm_head'
    wte            (9, 4)  adam   an embedding, by 'wte'
    >>> Routing(exclude="hiden")(params)
    Traceback (most recent call last):
      ...
    ValueError: Routing: `exclude` pattern 'hiden' matches none of the leaves 'hidden/bias', ...
    """

    exclude: Any = None
    words: tuple[str, ...] | None = None
    labels: Any = None

    def plan(self, tree: Any) -> RoutingPlan:
        """Every leaf of `tree` with its route and the reason.

        Args:
          tree: parameters by name, of JAX or (`dict(model.named_parameters())`) of torch.

        Raises:
          ValueError: a pattern, path, parameter or function that matches no leaf; a label that is not `"muon"`,
            `"adam"` or `None`.
          TypeError: an `exclude` of another kind.
        """
        check_arrays("Routing", tree)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        shapes = [tuple(np.shape(leaf)) for _, leaf in leaves]
        excluded = jax.tree.leaves(select("Routing", "exclude", self.exclude, tree))
        size = vocabulary(shapes) if self.words is None else None
        routes = []
        for (path, _), shape, out, label in zip(
            leaves, shapes, excluded, self._given(tree), strict=True
        ):
            name = path_name(path)
            if label is not None:
                route, reason = label, "labelled"
            elif out:
                route, reason = ADAM, "excluded"
            else:
                route, reason = self._by_rule(name, shape, size)
            routes.append(Route(name, shape, route, reason))
        return RoutingPlan(tuple(routes))

    def _by_rule(self, name: str, shape: tuple[int, ...], size: int | None) -> tuple[str, str]:
        """The route of a leaf and its reason, where none was given; `size`: of the vocabulary."""
        found = [
            word for word in (WORDS if self.words is None else self.words) if word in name.lower()
        ]
        if found:
            return ADAM, f"{found[0]!r} in the path"
        if len(shape) < 2:
            return ADAM, "fewer than two axes"
        if self.words is None and (known := named_like(name)):
            return ADAM, known
        if size in shape and len(shape) == 2:
            return ADAM, f"vocabulary-shaped, by {size}"
        return MUON, "a matrix" if len(shape) == 2 else "matrices"

    def __call__(self, tree: Any) -> Any:
        """A tree of labels like `tree`, as `optax.partition` asks for."""
        plan = self.plan(tree)
        if _logger.isEnabledFor(logging.INFO):
            _log_once(plan)
        labels = [route.label for route in plan.routes]
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


@functools.lru_cache(maxsize=256)
def _log_once(plan: RoutingPlan) -> None:
    # Routing is asked again at every update: without the cache it would be logged as often.
    count = sum(route.label == MUON for route in plan.routes)
    event = {
        "event": "routing",
        "muon": count,
        "adam": len(plan.routes) - count,
        "routes": [dataclasses.asdict(route) for route in plan.routes],
    }
    text = "routing: of %d leaves %d go to Muon\n%s"
    _logger.info(text, len(plan.routes), count, plan, extra={"event": event})


HIDDEN_MATRICES = Routing()
"""The default of `chains.muon`."""
