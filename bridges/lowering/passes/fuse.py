"""Multiply-add patterns of an eager program as `lerp`, `addcmul`, `addcdiv` and `add(alpha=)`.

Memory passes are what an eager step costs. Factors of tensors are gathered (``-lr * ((mu / c) / d)`` is ``mu / d`` with
one factor) and handed to the operation that reads the tensor anyway. Results change by float32 rounding.
"""

import math
from typing import Any

import torch
from torch import Tensor, fx

from chainrule.bridges.lowering.linear import Reader, Scalar, Scaled
from chainrule.bridges.lowering.nodes import args_of, first_arg, is_scalar, mark_like, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.passes.simplify import drop_dead, merge_common
from chainrule.bridges.lowering.step_program import StepProgram


def fuse(program: StepProgram) -> StepProgram:
    """Before: sums, products and quotients one by one. After: fewer passes over float32 tensors; a factor that is a 0-d
    tensor is an operand only where the device gives its number for nothing.
    """
    graph, fuser = program.graph, _Fuser(program)
    for node in list(graph.nodes):
        fuser.normalise(node)
    for node in reversed(list(graph.nodes)):  # the outer sum before its terms
        if node.target is torch.add and node.users and len(node.args) == 2 and not node.kwargs:
            fuser.sum(node)
    merge_common(graph)  # the factors of all leaves are few
    drop_dead(graph)
    return program


def _is_tensor(x: Any) -> bool:
    value = value_of(x) if isinstance(x, fx.Node) and "val" in x.meta else None
    return isinstance(value, Tensor) and value.ndim > 0 and value.dtype == torch.float32


def _is_heavy(x: Any) -> bool:
    return isinstance(x, fx.Node) and x.op == "call_function" and info(x).heavy


def _alike(x: fx.Node, y: fx.Node) -> bool:
    return value_of(x).shape == value_of(y).shape


class _Fuser:
    def __init__(self, program: StepProgram):
        self.graph, self.host = program.graph, program.on_cpu
        # Through products that nobody else reads.
        self.reader = Reader(self.opens, self.is_factor)

    def opens(self, x: fx.Node) -> bool:
        """A sum with a product of matrices, such as a step of Newton-Schulz, stays one tensor."""
        casts = x.target is torch.Tensor.to
        if not _is_tensor(x) or len(x.users) > 1 or casts or not any(map(_is_tensor, x.args)):
            return False
        return x.target is not torch.add or not any(map(_is_heavy, x.args))

    def is_factor(self, x: Any) -> bool:
        if isinstance(x, (int, float)):
            return True
        single = isinstance(x, fx.Node) and is_scalar(value_of(x))
        return self.host and single and value_of(x).dtype == torch.float32

    def normalise(self, node: fx.Node) -> None:
        """Products with the tensor first, squares as products, zeros for what is not finite as one operation."""
        if node.target is torch.square and _is_tensor(first_arg(node)):
            node.target, node.args = torch.mul, (node.args[0], node.args[0])
        elif node.target is torch.where and _is_tensor(node):
            condition, x, otherwise = args_of(node)
            finite = condition.target is torch.isfinite and first_arg(condition) is x
            if finite and repr(otherwise) == "0.0":
                self.become(node, torch.nan_to_num, (x, 0.0, 0.0, 0.0))
        elif node.target in (torch.mul, torch.add) and not node.kwargs and len(node.args) == 2:
            x, y = node.args
            if _is_tensor(y) and _is_tensor(node) and not _is_tensor(x):
                node.args = (y, x)

    # ---- sums --------------------------------------------------------------------------------

    def sum(self, node: fx.Node) -> None:
        x, y = args_of(node)
        if not (_is_tensor(x) and _is_tensor(y) and _alike(x, y)):
            return
        if self.decay(node, x, y) or self.decay(node, y, x):
            return
        a, b = self.reader.scaled(x), self.reader.scaled(y)
        if self.product(node, b, x) or self.product(node, a, y) or self.lerp(node, a, b):
            return
        if b.tensor is not y:
            self.become(node, torch.add, (x, b.tensor), alpha=self.factor(node, b))
        elif a.tensor is not x:
            self.become(node, torch.add, (y, a.tensor), alpha=self.factor(node, a))

    def decay(self, node: fx.Node, p: fx.Node, y: fx.Node) -> bool:
        """p + k (u + w p) = (1 + k w) p + k u."""
        terms = self.reader.terms(y) or {}
        weight = terms.pop(p, None)
        if weight is None or len(terms) != 1:
            return False
        (part,) = terms.values()
        if not _alike(p, part.tensor):
            return False
        both = self.factor(node, weight)
        kept = self.emit(node, torch.mul, p, self.arithmetic(node, torch.add, both, 1.0))
        if not self.product(node, part, kept):
            self.become(node, torch.add, (kept, part.tensor), alpha=self.factor(node, part))
        return True

    def product(self, node: fx.Node, part: Scaled, other: fx.Node) -> bool:
        """other + k a b and other + k a / b, if nobody else reads the product or the quotient."""
        tensor = part.tensor
        if tensor is other or tensor.target not in (torch.mul, torch.div) or len(tensor.users) > 1:
            return False
        if tensor.kwargs or not all(map(_is_tensor, tensor.args)):
            return False
        a, b = args_of(tensor)
        if not (_alike(a, other) and _alike(b, other)):
            return False
        first = self.reader.scaled(a) if a is not b else Scaled(a)
        whole = first.times(part)
        target = torch.addcmul if tensor.target is torch.mul else torch.addcdiv
        value = self.factor(node, whole)
        self.become(node, target, (other, first.tensor, b), value=value)
        return True

    def lerp(self, node: fx.Node, a: Scaled, b: Scaled) -> bool:
        """w a + (1 - w) b."""
        for start, end in ((a, b), (b, a)):
            if start.divisors or end.divisors or not len(start.factors) == len(end.factors) == 1:
                continue
            (kept,), (weight,) = start.factors, end.factors
            if isinstance(kept, fx.Node) or isinstance(weight, fx.Node):
                complements = (
                    isinstance(weight, fx.Node)
                    and weight.target is torch.rsub
                    and args_of(weight) == (kept, 1.0)
                )
            else:
                complements = 0 <= weight <= 0.5 and abs(kept + weight - 1) <= 2**-24
            if complements:
                self.become(node, torch.lerp, (start.tensor, end.tensor, weight))
                return True
        return False

    # ---- factors -----------------------------------------------------------------------------

    def factor(self, node: fx.Node, part: Scaled) -> Scalar:
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

    def emit(self, before: fx.Node, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(before):
            new = self.graph.call_function(target, args)
        return mark_like(new, before, value_of(args[0]))

    @staticmethod
    def become(node: fx.Node, target: Any, args: tuple[Any, ...], **kwargs: Any) -> None:
        if kwargs.get("alpha", 0) == 1 or kwargs.get("value", 0) == 1:
            kwargs = {}
        node.target, node.args, node.kwargs = target, args, kwargs
