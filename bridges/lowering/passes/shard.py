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
    params: int = 0
    """How many parameters come first among the inputs; ranks agree on which of them have a gradient."""


def shard(program: StepProgram) -> StepProgram:
    """Before: every node stands for a whole tensor. After: for what this rank has of it, and collectives are nodes.

    Because shapes were whole when the chain was traced, divisors of means and counters of random bits are right. Entry
    by entry a result is cut as its operands are; what is generated is made in part; a reduction over a cut axis is one
    of parts, then a collective; the kernel's sums are sums of parts. What has an owner gets all of its operands there,
    and so has what is made of it and of what all ranks have. Whatever else reads a tensor that is cut gets all of it on
    every rank.

    The graph and its collectives are the same on all ranks up to constants: the work of the other owners is in it too,
    until `leave_to_owners`.
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
        self.owners: dict[fx.Node, int] = {}
        """The rank that alone has what an old node stands for."""
        self.parts: dict[tuple[fx.Node, Axes], fx.Node] = {}
        """Of whole tensors the parts."""
        self.wholes: dict[tuple[fx.Node, int | None], fx.Node] = {}
        """Of parts the whole tensors, on one rank or on all."""
        self._lacks_whole: dict[tuple[fx.Node, int | None], int] = {}
        """Nodes without a whole, when `wholes` had so many entries."""
        self.divisors: dict[Any, fx.Node] = {}
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

    def again(self, old: fx.Node, operand: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """The same call of other operands."""
        args, kwargs = (fx.map_arg(x, operand) for x in (old.args, old.kwargs))
        return self.emit(old, function_of(old), *args, **kwargs)  # pyright: ignore[reportCallIssue]

    def copy(self, old: fx.Node, axes: Axes, operand: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """The same call of other operands, in the place of the old one."""
        return self.keep(old, self.again(old, operand), axes)

    def is_whole(self, old: fx.Node, owner: int | None = None) -> bool:
        """Whether all ranks, or an owner, have all of it."""
        return not is_cut(self.axes[old]) and self.owners.get(old) in (None, owner)

    def has_whole(self, old: fx.Node, owner: int | None = None) -> bool:
        """Whether the whole is there without another collective, or can be computed entry by entry of what is."""
        key = old, owner
        if self.is_whole(old, owner) or key in self.wholes or (old, None) in self.wholes:
            return True
        known = self._lacks_whole.get(key)
        if known != len(self.wholes) and info(old).elementwise:
            if all(self.has_whole(n, owner) for n in old.all_input_nodes):
                return True
            self._lacks_whole[key] = len(self.wholes)
        return False

    def all_of(self, old: fx.Node, owner: int | None = None) -> fx.Node:
        """The whole of what an old node stands for: on one rank, or on all."""
        if self.is_whole(old, owner):
            return self.new[old]
        if (old, None) in self.wholes:
            return self.wholes[old, None]
        if (old, owner) not in self.wholes:
            self.wholes[old, owner] = self._whole(old, owner)
        return self.wholes[old, owner]

    def _whole(self, old: fx.Node, owner: int | None) -> fx.Node:
        axes, shape = self.axes[old], shape_of(value_of(old))
        if self.has_whole(old, owner):
            return self.again(old, lambda n: self.all_of(n, owner))
        if old in self.owners:
            parcels = layouts.from_owner(shape, axes, self.mesh, self.owners[old])
            if owner is not None:
                parcels = [parcel for parcel in parcels if parcel.target == owner]
            return self.exchange(old, parcels, axes)
        if owner is not None:
            parcels = layouts.to_owner(shape, axes, self.mesh, owner)
            return self.exchange(old, parcels, whole(len(axes)))
        spans = tuple(layouts.spans(shape, axes, place) for place in self.mesh.order)
        args = ([self.new[old]], (tuple(shape),), (spans,), self.mesh.everyone)
        return self.collective(old, ops.all_gather, args, whole(len(axes)))

    def exchange(self, old: fx.Node, parcels: Sequence[layouts.Parcel], axes: Axes) -> fx.Node:
        """What an old node stands for, cut as `axes` say, where parcels arrive.

        Whoever sends its part sends all of it; from an owner every rank gets what it is to have.
        """
        me, shape = self.mesh.rank, shape_of(value_of(old))
        has = layouts.spans(shape, self.axes[old], self.mesh.coordinate)
        gets = layouts.spans(shape, axes, self.mesh.coordinate)
        sent = tuple((p.target, p.within(has)) for p in parcels if p.source == me and p.size)
        received = tuple((p.source, p.within(gets)) for p in parcels if p.target == me and p.size)
        arrives = any(p.target == me for p in parcels)
        size = tuple(b - a for a, b in gets) if arrives else (0,)
        route = sent, received, size, value_of(old).dtype
        args = ([self.new[old]], (route,), self.program.device, self.mesh.everyone)
        return self.collective(old, ops.exchange, args, axes)

    def collective(self, old: fx.Node, target: Any, args: tuple[Any, ...], axes: Axes) -> fx.Node:
        item = self.emit(old, operator.getitem, self.emit(old, target, *args), 0)
        item.meta["level"] += 1
        item.meta["aval"] = self.like(value_of(old), axes)
        return item

    def part(self, old: fx.Node, axes: Axes) -> fx.Node:
        """What a rank has that an old node stands for, if it is cut as `axes` say."""
        if not is_cut(axes):
            return self.all_of(old)
        if self.axes[old] == axes:
            return self.new[old]
        if (old, axes) not in self.parts:
            if old in self.owners and (old, None) not in self.wholes:
                shape = shape_of(value_of(old))
                parcels = layouts.from_owner(shape, axes, self.mesh, self.owners[old])
                made = self.exchange(old, parcels, axes)
            else:
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
        if old.op != "call_function" or not self.is_whole(old):
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
            return self.again(old, lambda n: self.operand(n, axes, shape_of(value)))
        return None

    def operand(self, old: fx.Node, axes: Axes, shape: Sequence[int]) -> fx.Node:
        """What an operation, entry by entry, reads whose result has a shape and is cut as `axes` say."""
        return self.part(old, layouts.behind(axes, shape, value_of(old).shape))

    def _translate(self, old: fx.Node) -> None:
        if old in self.new:  # with the call that it unpacks
            return
        axes = whole(len(shape_of(value_of(old))))
        owner = self._owner(old)
        if owner is not None:
            self.copy(old, axes, lambda n: self.all_of(n, owner))
            self.owners[old] = owner
            return
        if all(map(self.is_whole, old.all_input_nodes)):
            self.copy(old, axes, self.new.__getitem__)
            self._share_divisor(old)
            return
        rule = RULES.get(old.target)
        if rule is None and info(old).elementwise:
            rule = elementwise
        if rule is None or not rule(self, old):
            if not info(old).elementwise:
                self.gathered[
                    f"{function_of(old).__name__} in {old.meta['link'] or 'the step'}"
                ] += 1
            self.copy(old, axes, self.all_of)

    def _share_divisor(self, old: fx.Node) -> None:
        """Gives a mean's divisor as a scalar: as a number, the whole size, it would set leaves of other sizes apart."""
        new, value = self.new[old], value_of(old)
        if old.target is not torch.div or value.ndim or not new.meta["level"]:
            return
        x, y = args_of(new)
        if not isinstance(y, fx.Node) and value_of(first_arg(old)).dtype == value.dtype:
            if (y, value.dtype) not in self.divisors:
                with self.graph.inserting_before(new):
                    made = self.emit(old, torch.full, (), y, dtype=value.dtype, device=value.device)
                self.divisors[y, value.dtype] = made
            new.args = (x, self.divisors[y, value.dtype])

    def _owner(self, old: fx.Node) -> int | None:
        """The rank that alone makes what an old node stands for, or None."""
        if "owner" in old.meta:
            return old.meta["owner"]
        owners = {self.owners.get(n) for n in old.all_input_nodes if not self.is_whole(n)}
        return owners.pop() if len(owners) == 1 else None


def _origin(node: fx.Node) -> dict[str, Any]:
    own = "val", "aval", "broadcast_of", "level", "owner"
    return {k: v for k, v in node.meta.items() if k not in own}
