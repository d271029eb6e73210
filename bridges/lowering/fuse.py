"""Multiply-add patterns of an eager program as `lerp`, `addcmul`, `addcdiv` and `add(alpha=)`.

Memory passes are what an eager step costs. Factors of tensors are gathered (``-lr * ((mu / c) / d)`` is ``mu / d`` with
one factor) and handed to the operation that reads the tensor anyway. Results change by float32 rounding.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from chainrule.bridges.lowering.simplify import drop_dead, merge_common

Scalar = fx.Node | float
"""A factor: a number, or a 0-d tensor of the program."""


class _Scaled(NamedTuple):
    """A tensor times factors, over others."""

    tensor: fx.Node
    factors: tuple[Scalar, ...] = ()
    divisors: tuple[Scalar, ...] = ()


def fuse(graph: fx.Graph, values: dict[fx.Node, Any], *, host: bool) -> None:
    """Changes a graph so that an eager run makes fewer passes over float32 tensors.

    Args:
      graph: the program; changed in place.
      values: a fake tensor for every node; those of new nodes are added.
      host: whether a 0-d tensor can be read as a number for nothing, as on a CPU.
    """
    fuser = _Fuser(graph, values, host)
    for node in list(graph.nodes):
        fuser.normalise(node)
    for node in reversed(list(graph.nodes)):  # the outer sum before its terms
        if node.target is torch.add and node.users and len(node.args) == 2 and not node.kwargs:
            fuser.sum(node)
    merge_common(graph)  # the factors of all leaves are few
    drop_dead(graph)


class _Fuser:
    def __init__(self, graph: fx.Graph, values: dict[fx.Node, Any], host: bool):
        self.graph, self.values, self.host = graph, values, host

    def is_tensor(self, x: Any) -> bool:
        value = self.values.get(x) if isinstance(x, fx.Node) else None
        return isinstance(value, Tensor) and value.ndim > 0 and value.dtype == torch.float32

    def is_scalar(self, x: Any) -> bool:
        if isinstance(x, (int, float)):
            return True
        value = self.values.get(x) if isinstance(x, fx.Node) else None
        is_single = isinstance(value, Tensor) and value.ndim == 0 and value.dtype == torch.float32
        return self.host and is_single

    def normalise(self, node: fx.Node) -> None:
        """Products with the tensor first, squares as products, zeros for what is not finite as one operation."""
        if node.target is torch.square and self.is_tensor(node.args[0]):
            node.target, node.args = torch.mul, (node.args[0], node.args[0])
        elif node.target is torch.where and self.is_tensor(node):
            condition, x, otherwise = node.args
            finite = condition.op == "call_function" and condition.target is torch.isfinite  # pyright: ignore
            if finite and condition.args[0] is x and repr(otherwise) == "0.0":  # pyright: ignore
                self.become(node, torch.nan_to_num, (x, 0.0, 0.0, 0.0))
        elif node.target in (torch.mul, torch.add) and not node.kwargs and len(node.args) == 2:
            x, y = node.args
            if self.is_tensor(y) and self.is_tensor(node) and not self.is_tensor(x):
                node.args = (y, x)

    # ---- sums --------------------------------------------------------------------------------

    def sum(self, node: fx.Node) -> None:
        x, y = node.args
        if not (self.is_tensor(x) and self.is_tensor(y) and self.alike(x, y)):
            return
        if self.decay(node, x, y) or self.decay(node, y, x):
            return
        a, b = self.scaled(x), self.scaled(y)
        if self.product(node, b, x) or self.product(node, a, y) or self.lerp(node, a, b):
            return
        if b.tensor is not y:
            self.become(node, torch.add, (x, b.tensor), alpha=self.factor(node, b))
        elif a.tensor is not x:
            self.become(node, torch.add, (y, a.tensor), alpha=self.factor(node, a))

    def decay(self, node: fx.Node, p: Any, y: Any) -> bool:
        """p + k (u + w p) = (1 + k w) p + k u."""
        step = self.scaled(y)
        inner = step.tensor
        if inner.target is not torch.add or inner.kwargs or len(inner.users) > 1:
            return False
        terms = [(self.scaled(term), term) for term in inner.args if self.is_tensor(term)]
        if len(terms) != 2 or terms[0][0].tensor is terms[1][0].tensor:
            return False
        if terms[0][0].tensor is p:
            terms.reverse()
        (part, update), (weight, _) = terms
        if weight.tensor is not p or not self.alike(p, update):
            return False
        factor = self.factor(node, step)
        both = self.factor(node, weight._replace(factors=(factor, *weight.factors)))
        kept = self.emit(node, torch.mul, p, self.arithmetic(node, torch.add, both, 1.0))
        part = part._replace(factors=(*part.factors, factor))
        if not self.product(node, part, kept):
            self.become(node, torch.add, (kept, part.tensor), alpha=self.factor(node, part))
        return True

    def product(self, node: fx.Node, part: _Scaled, other: Any) -> bool:
        """other + k a b and other + k a / b, if nobody else reads the product or the quotient."""
        tensor = part.tensor
        if tensor is other or tensor.target not in (torch.mul, torch.div) or len(tensor.users) > 1:
            return False
        if tensor.kwargs or not all(map(self.is_tensor, tensor.args)):
            return False
        a, b = tensor.args
        if not (self.alike(a, other) and self.alike(b, other)):
            return False
        first = self.scaled(a) if a is not b else _Scaled(a)  # pyright: ignore
        whole = _Scaled(
            first.tensor,
            (*part.factors, *first.factors),
            (*part.divisors, *first.divisors),
        )
        target = torch.addcmul if tensor.target is torch.mul else torch.addcdiv
        value = self.factor(node, whole)
        self.become(node, target, (other, first.tensor, b), value=value)
        return True

    def lerp(self, node: fx.Node, a: _Scaled, b: _Scaled) -> bool:
        """w a + (1 - w) b."""
        for start, end in ((a, b), (b, a)):
            if start.divisors or end.divisors or not len(start.factors) == len(end.factors) == 1:
                continue
            (kept,), (weight,) = start.factors, end.factors
            if isinstance(kept, fx.Node) or isinstance(weight, fx.Node):
                node_weight = isinstance(weight, fx.Node) and weight.target is torch.rsub
                complements = node_weight and weight.args == (kept, 1.0)  # pyright: ignore
            else:
                complements = 0 <= weight <= 0.5 and abs(kept + weight - 1) <= 1e-6
            if complements:
                self.become(node, torch.lerp, (start.tensor, end.tensor, weight))
                return True
        return False

    # ---- factors -----------------------------------------------------------------------------

    def scaled(self, x: Any) -> _Scaled:
        """A tensor and the factors that it is multiplied with, through products that nobody else reads."""
        factors: list[Scalar] = []
        divisors: list[Scalar] = []
        while isinstance(x, fx.Node) and len(x.users) == 1 and not x.kwargs:
            if x.target is torch.neg:
                factors.append(-1.0)
            elif x.target in (torch.mul, torch.div) and self.is_scalar(x.args[1]):
                (factors if x.target is torch.mul else divisors).append(x.args[1])  # pyright: ignore
            else:
                break
            if not self.is_tensor(x.args[0]):
                break
            x = x.args[0]
        return _Scaled(x, tuple(factors), tuple(divisors))

    def factor(self, node: fx.Node, part: _Scaled) -> Scalar:
        """The product of the factors over the divisors, computed before `node`."""
        number = math.prod(f for f in part.factors if not isinstance(f, fx.Node))
        result: Scalar = number
        for f in part.factors:
            if isinstance(f, fx.Node):
                result = f if result == 1 else self.arithmetic(node, torch.mul, f, result)
        for d in part.divisors:
            if isinstance(result, fx.Node) or not isinstance(d, fx.Node):
                result = self.arithmetic(node, torch.div, result, d)
            else:
                inverse = self.emit(node, torch.reciprocal, d)
                result = (
                    inverse if result == 1 else self.arithmetic(node, torch.mul, inverse, result)
                )
        return result

    def arithmetic(self, node: fx.Node, target: Any, x: Scalar, y: Scalar) -> Scalar:
        if isinstance(x, fx.Node):
            return self.emit(node, target, x, y)
        if isinstance(y, fx.Node):
            return self.emit(node, target, y, x)
        return {torch.mul: x * y, torch.add: x + y, torch.div: x / y if y else math.inf}[target]

    # ---- nodes -------------------------------------------------------------------------------

    def alike(self, x: Any, y: Any) -> bool:
        return self.values[x].shape == self.values[y].shape

    def emit(self, before: fx.Node, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(before):
            new = self.graph.call_function(target, args)
        new.meta.update({k: v for k, v in before.meta.items() if k != "aval"})
        self.values[new] = self.values[args[0]]
        return new

    @staticmethod
    def become(node: fx.Node, target: Any, args: tuple[Any, ...], **kwargs: Any) -> None:
        if kwargs.get("alpha", 0) == 1 or kwargs.get("value", 0) == 1:
            kwargs = {}
        node.target, node.args, node.kwargs = target, args, kwargs
