"""What is read of nodes of `torch.fx`, with types: its own are unions that no checker can follow."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """Positional arguments."""
    return node.args


def first_arg(node: fx.Node) -> fx.Node:
    """The first argument of a node that takes a tensor there."""
    (first, *_) = args_of(node)
    return first


def function_of(node: fx.Node) -> Callable[..., Any]:
    """What a node of kind `call_function` calls; of the other kinds the target is a name."""
    assert callable(node.target)
    return node.target


def value_of(node: fx.Node) -> Any:
    """The fake tensor (or several) that stands for a node; a sub-graph for the node that names one."""
    return node.meta["val"]


def inputs_of(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders, in order."""
    return list(graph.find_nodes(op="placeholder"))


def results_of(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that a graph returns, in order."""
    (results,) = args_of(graph.output_node())
    return list(results)


def return_(graph: fx.Graph, results: Sequence[fx.Node]) -> None:
    """Makes `results` what the graph returns."""
    graph.output_node().args = (tuple(results),)


def mark_like(new: fx.Node, old: fx.Node, value: Any) -> fx.Node:
    """`new` as of the same origin as `old`, with `value` standing for it."""
    new.meta.update({k: v for k, v in old.meta.items() if k not in ("aval", "broadcast_of")})
    new.meta["val"] = value
    return new


def is_array(value: Any) -> bool:
    """Whether what stands for a node is a tensor of a dimension or more, or holds one."""
    if isinstance(value, Tensor):
        return value.ndim > 0
    return isinstance(value, (tuple, list)) and any(map(is_array, value))


def is_scalar(value: Any) -> bool:
    """Whether what stands for a node is a 0-d tensor."""
    return isinstance(value, Tensor) and value.ndim == 0


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of what stands for a node; of several results, which are alike, that of the first."""
    while isinstance(value, (tuple, list)):
        value = next((v for v in value if v is not None), None)
    return () if value is None else tuple(value.shape)
