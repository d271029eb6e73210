"""A program of whole tensors as one of the parts that this rank has of them."""

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import torch
from jax.core import ShapedArray
from torch import fx

from chainrule.bridges.lowering import layouts, ops
from chainrule.bridges.lowering.layouts import Axes, Mesh, is_cut, whole
from chainrule.bridges.lowering.nodes import args_of, first_arg, function_of, shape_of, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.passes.shard_rules import RULES, elementwise
from chainrule.bridges.lowering.step_program import StepProgram


class Sharding(NamedTuple):
    """How the inputs of a program lie on a mesh; what it writes into an input lies as that does."""

    mesh: Mesh
    axes: tuple[Axes, ...]
    """Of every input."""
    results: tuple[Axes, ...] | None = None
    """Of every result; None: as the inputs lie that they are written into."""


def shard(program: StepProgram) -> StepProgram:
    """Before: every node stands for a whole tensor. After: for what this rank has of it, and collectives are nodes.

    Because shapes were whole when the chain was traced, divisors of means and counters of random bits are right. Entry
    by entry a result is cut as its operands are; what is generated is made in part; a reduction over a cut axis is one
    of parts, then a collective; the kernel's sums are sums of parts. Whatever else reads a tensor that is cut gets all
    of it.
    """
    if program.sharding is None:
        return program
    return Sharder(program, program.sharding).run()


class Sharder:
    """A graph of parts under construction, beside that of whole tensors."""

    def __init__(self, program: StepProgram, sharding: Sharding):
        self.program, self.mesh = program, sharding.mesh
        self.given, self.wanted = sharding.axes, sharding.results
        program.attributes = dict(program.attributes)
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.axes: dict[fx.Node, Axes] = {}
        """How what an old node stands for is cut in `new`; several results of one node alike."""
        self.parts: dict[tuple[fx.Node, Axes], fx.Node] = {}
        """Of whole tensors the parts, and of parts the whole ones."""
        self._lacks_whole: dict[fx.Node, int] = {}
        """Nodes without a whole, when `parts` had so many entries."""
        self.gathered: Counter[str] = Counter()
        """What reads whole tensors, of which ranks have parts."""

    def run(self) -> StepProgram:
        placeholders = iter(self.given)
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.keep(node, self.graph.node_copy(node), next(placeholders))
            elif node.op == "get_attr":
                copied = self.graph.node_copy(node)
                self.keep(node, copied, whole(getattr(value_of(node), "ndim", 0)))
            elif node.op == "call_function":
                self._translate(node)
        wanted = self.wanted
        if wanted is None:
            wanted = [self.axes[old] for _, old in self.program.updates]
        results = zip(self.program.results, wanted, strict=True)
        self.graph.output(tuple(self.part(node, axes) for node, axes in results))
        self.graph.eliminate_dead_code()
        self.program.graph = self.graph
        self.program.log += [
            f"    whole tensors for {n} {what}" for what, n in self.gathered.items()
        ]
        return self.program

    # ---- nodes -----------------------------------------------------------------------------

    def emit(self, like: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node of the origin of an old one."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(_origin(like))
        node.meta["level"] = max((n.meta["level"] for n in node.all_input_nodes), default=0)
        return node

    def keep(self, old: fx.Node, new: fx.Node, axes: Axes) -> fx.Node:
        self.new[old], self.axes[old] = new, axes
        value = value_of(old)
        new.meta = {"level": 0, **_origin(old), **new.meta}
        new.meta.pop("val", None)
        if isinstance(value, torch.Tensor):
            new.meta["aval"] = self.like(value, axes)
        return new

    def like(self, value: torch.Tensor, axes: Axes) -> ShapedArray:
        """What `infer_values` makes a fake tensor of."""
        shape = layouts.local_shape(value.shape, axes, self.mesh)
        return ShapedArray(shape, jnp.dtype(str(value.dtype).removeprefix("torch.")))

    def copy(self, old: fx.Node, axes: Axes, operand: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """The same call of other operands."""
        args, kwargs = (fx.map_arg(x, operand) for x in (old.args, old.kwargs))
        return self.keep(old, self.emit(old, function_of(old), *args, **kwargs), axes)  # pyright: ignore[reportCallIssue]

    def is_whole(self, old: fx.Node) -> bool:
        return not is_cut(self.axes[old])

    def has_whole(self, old: fx.Node) -> bool:
        """Whether the whole is there without another collective, or can be computed entry by entry of what is."""
        if self.is_whole(old) or (old, whole(len(self.axes[old]))) in self.parts:
            return True
        known = self._lacks_whole.get(old)
        if known != len(self.parts) and info(old).elementwise:
            if all(map(self.has_whole, old.all_input_nodes)):
                return True
            self._lacks_whole[old] = len(self.parts)
        return False

    def all_of(self, old: fx.Node) -> fx.Node:
        """The whole of what an old node stands for."""
        axes = self.axes[old]
        if not is_cut(axes):
            return self.new[old]
        key = old, whole(len(axes))
        if key not in self.parts and self.has_whole(old):
            args, kwargs = (fx.map_arg(x, self.all_of) for x in (old.args, old.kwargs))
            self.parts[key] = self.emit(old, function_of(old), *args, **kwargs)  # pyright: ignore[reportCallIssue]
        elif key not in self.parts:
            value = value_of(old)
            spans = tuple(
                layouts.spans(value.shape, axes, coordinate) for coordinate in self.mesh.order
            )
            args = ([self.new[old]], (tuple(value.shape),), (spans,), self.mesh.everyone)
            self.parts[key] = self.collective(old, ops.all_gather, args, whole(len(axes)))
        return self.parts[key]

    def collective(self, old: fx.Node, target: Any, args: tuple[Any, ...], axes: Axes) -> fx.Node:
        item = self.emit(old, operator.getitem, self.emit(old, target, *args), 0)
        item.meta["level"] += 1
        item.meta["aval"] = self.like(value_of(old), axes)
        return item

    def part(self, old: fx.Node, axes: Axes) -> fx.Node:
        """What a rank has that an old node stands for, if it is cut as `axes` say."""
        if self.axes[old] == axes:
            return self.new[old]
        if not is_cut(axes):
            return self.all_of(old)
        if (old, axes) not in self.parts:
            made = self._generated(old, axes) or self._narrowed(old, axes)
            self.parts[old, axes] = made
        return self.parts[old, axes]

    def _narrowed(self, old: fx.Node, axes: Axes) -> fx.Node:
        node, shape = self.all_of(old), value_of(old).shape
        for axis, (start, stop) in enumerate(layouts.spans(shape, axes, self.mesh.coordinate)):
            if axes[axis]:
                node = self.emit(old, torch.narrow, node, axis, start, stop - start)
        return node

    def _generated(self, old: fx.Node, axes: Axes) -> fx.Node | None:
        """The part of something whole that can be made without the whole, or None."""
        if old.op != "call_function" or is_cut(self.axes[old]):
            return None
        value, target = value_of(old), old.target
        if target is operator.getitem:
            source = first_arg(old)
            if (source, axes) not in self.parts:
                made = self._generated(source, axes)
                if made is None:
                    return None
                self.parts[source, axes] = made
            return self.emit(old, operator.getitem, self.parts[source, axes], args_of(old)[1])
        shape = layouts.local_shape(shape_of(value), axes, self.mesh)
        ((start, stop), *_) = spans = layouts.spans(shape_of(value), axes, self.mesh.coordinate)
        if target in (torch.full, torch.zeros):
            return self.emit(old, function_of(old), shape, *args_of(old)[1:], **old.kwargs)
        if target is torch.arange:
            return self.emit(old, torch.arange, start, stop, **old.kwargs)
        if target is ops.iota_2x32:
            return self.emit(old, ops.iota_2x32, *args_of(old), spans)
        if target is torch.broadcast_to:
            source = first_arg(old)
            own = layouts.behind(axes, value.shape, value_of(source).shape)
            return self.emit(old, torch.broadcast_to, self.part(source, own), shape)
        if target is torch.reshape:
            source = first_arg(old)
            own = layouts.reshaped(axes, value.shape, value_of(source).shape)
            if own is None:
                return None
            return self.emit(old, torch.reshape, self.part(source, own), shape)
        if info(old).elementwise:
            args, kwargs = (
                fx.map_arg(x, lambda n: self.operand(n, axes, shape_of(value)))
                for x in (old.args, old.kwargs)
            )
            return self.emit(old, function_of(old), *args, **kwargs)  # pyright: ignore[reportCallIssue]
        return None

    def operand(self, old: fx.Node, axes: Axes, shape: Sequence[int]) -> fx.Node:
        """What an operation, entry by entry, reads whose result has a shape and is cut as `axes` say."""
        return self.part(old, layouts.behind(axes, shape, value_of(old).shape))

    def _translate(self, old: fx.Node) -> None:
        if old in self.new:  # with the call that it unpacks
            return
        if not any(is_cut(self.axes[source]) for source in old.all_input_nodes):
            self.copy(old, whole(len(shape_of(value_of(old)))), self.new.__getitem__)
            return
        rule = RULES.get(old.target)
        if rule is None and info(old).elementwise:
            rule = elementwise
        if rule is None or not rule(self, old):
            if not info(old).elementwise:
                self.gathered[
                    f"{function_of(old).__name__} in {old.meta['link'] or 'the step'}"
                ] += 1
            self.copy(old, whole(len(shape_of(value_of(old)))), self.all_of)


def _origin(node: fx.Node) -> dict[str, Any]:
    return {k: v for k, v in node.meta.items() if k not in ("val", "aval", "broadcast_of", "level")}
