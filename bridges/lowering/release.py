"""Programs that are gone with their last user: a graph of ``torch.fx`` is a tangle of cycles, which only the cyclic
collector would free, late and in one long pass."""

import weakref
from typing import Any

from torch import fx


def dissolve(module: fx.GraphModule) -> None:
    """Takes a graph and its sub-graphs apart; they are of no use after it."""
    graphs = [m.graph for m in module.modules() if isinstance(m, fx.GraphModule)]
    for graph in filter(vars, graphs):  # a sub-graph may be in two modules
        for node in reversed(list(graph.nodes)):  # users come after what they use
            graph.erase_node(node)
        vars(graph).clear()


def dissolve_with(owner: Any, module: fx.GraphModule) -> None:
    """Takes a graph apart when `owner`, its only user, is gone.

    Args:
      owner: an object or a function that is in no cycle itself.
      module: the graph.
    """
    weakref.finalize(owner, dissolve, module).atexit = False
