"""Updates in the loop that sums them, in what is traced for Inductor.

Exported files have what is below the line.
"""

# pyright: reportPrivateUsage=false, reportUnusedFunction=false
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------


def _copy_early(graph: torch.fx.Graph) -> None:
    """Copies that a traced function ends with, into inputs, come as soon as nobody reads the old value any more, where
    what they copy is also summed; whatever follows reads the copy.

    On a CPU Inductor makes one loop for both. Behind the sum it would make another, which reads all again.
    """
    summed, order = _summed(graph), {node: k for k, node in enumerate(graph.nodes)}
    for written in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        target, new = written.args
        if new not in summed:
            continue
        last = max({target, new, *_readers(target)} - {written}, key=order.__getitem__)
        last.append(written)
        for user in set(new.users) - {written, graph.output_node()}:
            if order[user] > order[last]:
                user.replace_input_with(new, written)


def _readers(node: Any) -> Iterator[Any]:
    """Whoever reads the memory of a traced node, directly or through views of it."""
    for user in node.users:
        yield user
        if getattr(user.target, "is_view", False):
            yield from _readers(user)


def _summed(graph: torch.fx.Graph) -> set[Any]:
    """The tensors of a traced function that something reduces to a number, directly or through others."""
    found: set[Any] = set()
    for node in reversed(graph.nodes):
        value = node.meta.get("val")
        if node in found or (isinstance(value, Tensor) and not value.ndim):
            found.update(x for x in node.all_input_nodes if getattr(x.meta["val"], "ndim", 0))
    return found
