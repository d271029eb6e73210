"""Graphs that are gone with their last user: a graph of ``torch.fx`` is a tangle of cycles, which only the cyclic
collector would free, late and in one long pass."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import fx


def dissolve(graphs: Iterable[fx.Graph]) -> None:
    """Takes graphs apart; they are of no use after it."""
    for graph in filter(vars, graphs):  # one may be there twice
        for node in reversed(list(graph.nodes)):  # users come after what they use
            graph.erase_node(node)
        vars(graph).clear()


def graphs_in(attributes: Iterable[Any]) -> list[fx.Graph]:
    """The graphs of the modules among `attributes`, and of those inside them."""
    modules = [m for m in attributes if isinstance(m, fx.GraphModule)]
    return [m.graph for top in modules for m in top.modules() if isinstance(m, fx.GraphModule)]


def dissolve_with(owner: Any, graphs: Iterable[fx.Graph]) -> None:
    """Takes graphs apart when `owner`, their only user, is gone.

    Args:
      owner: an object or a function that is in no cycle itself.
      graphs: whose nodes nothing else holds.
    """
    weakref.finalize(owner, dissolve, list(graphs)).atexit = False
