"""Nodes read as sums of tensors times scalars: `-lr * ((mu / c) / d) + w * p`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from chainrule.bridges.lowering.nodes import args_of

Scalar = fx.Node | float
"""A factor: a number, or a 0-d tensor of the program."""


class Scaled(NamedTuple):
    """A tensor times factors, over others."""

    tensor: fx.Node
    factors: tuple[Scalar, ...] = ()
    divisors: tuple[Scalar, ...] = ()

    def times(self, other: "Scaled") -> "Scaled":
        """With the factors and divisors of `other` too."""
        factors, divisors = other.factors + self.factors, other.divisors + self.divisors
        return Scaled(self.tensor, factors, divisors)


_PRODUCTS = (torch.neg, torch.mul, torch.div, torch.Tensor.to)


class Reader:
    """Reads nodes as linear combinations.

    Args:
      opens: whether a node may be read as what it is computed from, a conversion to another dtype as its operand.
      is_scalar: whether an argument is a factor.
    """

    def __init__(self, opens: Callable[[fx.Node], bool], is_scalar: Callable[[Any], bool]):
        self._opens, self._is_scalar = opens, is_scalar

    def scaled(self, x: fx.Node) -> Scaled:
        """`x` as a tensor times scalars."""
        factors: list[Scalar] = []
        divisors: list[Scalar] = []
        while x.target in _PRODUCTS and not x.kwargs and self._opens(x):
            y, *others = args_of(x)
            if x.target is torch.mul and self._is_scalar(y):
                y, others = others[0], [y]
            if not isinstance(y, fx.Node):
                break
            if x.target is torch.neg:
                factors.append(-1.0)
            elif x.target in (torch.mul, torch.div) and self._is_scalar(others[0]):
                (factors if x.target is torch.mul else divisors).append(others[0])
            elif x.target is not torch.Tensor.to:
                break  # a product of tensors
            x = y
        return Scaled(x, tuple(factors), tuple(divisors))

    def terms(self, x: fx.Node) -> dict[fx.Node, Scaled] | None:
        """`x` as a sum of tensors times scalars, by tensor; None if one is in it twice."""
        whole = self.scaled(x)
        inner = whole.tensor
        is_sum = inner.target in (torch.add, torch.sub) and len(inner.args) == 2
        if not (is_sum and self._opens(inner)) or inner.kwargs:
            return {inner: whole}
        if not all(isinstance(a, fx.Node) for a in inner.args):
            return {inner: whole}
        first, second = (self.terms(a) for a in args_of(inner))
        if first is None or second is None or first.keys() & second.keys():
            return None
        if inner.target is torch.sub:
            second = {t: part._replace(factors=(*part.factors, -1.0)) for t, part in second.items()}
        return {tensor: part.times(whole) for tensor, part in (first | second).items()}
