"""What becomes of an operation that reads tensors of which this rank has parts.

A rule puts what it becomes into the new graph, or returns False where it does not apply: the operation then reads whole
tensors.
"""

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx

from chainrule.bridges.lowering import layouts, ops
from chainrule.bridges.lowering.layouts import Axes, dims_of, is_cut, whole
from chainrule.bridges.lowering.nodes import (
    args_of,
    first_arg,
    function_of,
    shape_of,
    value_of,
)
from chainrule.native import forms
from chainrule.native.primitives import step_of

if TYPE_CHECKING:
    from chainrule.bridges.lowering.passes.shard import Sharder

Rule: TypeAlias = "Callable[[Sharder, fx.Node], bool]"


def elementwise(s: "Sharder", old: fx.Node) -> bool:
    """Entry by entry: cut as the operands are, or whole where one is and of the others the whole is there already."""
    shape = shape_of(value_of(old))
    if any(s.is_whole(n) and shape_of(value_of(n)) == shape for n in old.all_input_nodes) and all(
        map(s.has_whole, old.all_input_nodes)
    ):
        return False
    operands = [layouts.broadcast(s.axes[n], value_of(n).shape, shape) for n in old.all_input_nodes]
    axes = layouts.merged(operands)
    s.copy(old, axes, lambda n: s.operand(n, axes, shape))
    return True


def _getitem(s: "Sharder", old: fx.Node) -> bool:
    s.copy(old, s.axes[first_arg(old)], s.new.__getitem__)
    return True


def _permute(s: "Sharder", old: fx.Node) -> bool:
    source = first_arg(old)
    order = args_of(old)[1] if old.target is torch.permute else (1, 0)
    s.copy(old, layouts.permuted(s.axes[source], order), s.new.__getitem__)
    return True


def _shaped(s: "Sharder", old: fx.Node) -> bool:
    """Reshapes and broadcasts, which name the shape of their result."""
    source = first_arg(old)
    shape, before = value_of(old).shape, value_of(source).shape
    if old.target is torch.broadcast_to:
        axes = layouts.broadcast(s.axes[source], before, shape)
        operand = s.operand(source, axes, shape)
    else:
        axes, operand = layouts.reshaped(s.axes[source], before, shape), s.new[source]
    if axes is None:
        return False
    own = layouts.local_shape(shape, axes, s.mesh)
    s.keep(old, s.emit(old, function_of(old), operand, own), axes)
    return True


def _along(s: "Sharder", old: fx.Node) -> bool:
    """`narrow` and `select` along an axis that is whole."""
    source, axis, *_ = args_of(old)
    axes = s.axes[source]
    if axes[axis]:
        return False
    kept = axes if old.target is torch.narrow else axes[:axis] + axes[axis + 1 :]
    s.copy(old, kept, s.new.__getitem__)
    return True


def _joined(s: "Sharder", old: fx.Node) -> bool:
    """`cat` and `stack` of tensors that are cut alike, along an axis that is whole."""
    nodes, axis = args_of(old)
    axes = layouts.merged([s.axes[n] for n in nodes])
    if old.target is torch.stack:
        s.copy(old, (*axes[:axis], None, *axes[axis:]), lambda n: s.part(n, axes))
        return True
    if axes[axis]:
        return False
    s.copy(old, axes, lambda n: s.part(n, axes))
    return True


def _reduce(s: "Sharder", old: fx.Node) -> bool:
    """Over whole axes each rank by itself; over one that is cut of the parts, then of all ranks."""
    source, over, *_ = args_of(old)
    axes = s.axes[source]
    over = {axis % len(axes) for axis in ([over] if isinstance(over, int) else over)}
    left = tuple(cut for i, cut in enumerate(axes) if i not in over)
    among = dims_of(tuple(cut for i, cut in enumerate(axes) if i in over))
    if not among:
        s.copy(old, left, s.new.__getitem__)
        return True
    kind = _REDUCTIONS[old.target]
    here = value_of(source)
    local = layouts.local_shape(here.shape, axes, s.mesh)
    shape = layouts.local_shape(value_of(old).shape, left, s.mesh)
    if any(local[i] == 0 for i in over):
        value = {"sum": 0, "max": _least(here.dtype), "min": _most(here.dtype)}[kind]
        made = _constant(s, old, shape, value, s.new[source])
    else:
        made = s.emit(old, function_of(old), s.new[source], *args_of(old)[1:], **old.kwargs)
    return _reduced(s, old, made, kind, axes, left, among)


def _reduced(
    s: "Sharder",
    old: fx.Node,
    made: fx.Node,
    kind: str,
    axes: Axes,
    left: Axes,
    among: frozenset[int],
) -> bool:
    """Puts the parts `made` of a reduction together: over everyone, or one dimension of the mesh."""
    if is_cut(left):
        if len(among) > 1:
            return False
        group = s.mesh.groups[min(among)]
    else:
        group = s.mesh.everyone
        if kind == "sum" and layouts.is_repeated(axes, s.mesh):
            made = _held(s, old, made, layouts.is_first_holder(axes, s.mesh))
    s.axes[old] = left
    s.new[old] = s.collective(old, ops.all_reduce, ([made], kind, group), left)
    return True


def _constant(
    s: "Sharder", old: fx.Node, shape: Sequence[int], value: Any, instead_of: fx.Node
) -> fx.Node:
    """A constant where other ranks compute; made of the same node, because all must agree which collectives there are
    and in which order."""
    new_full: Any = torch.Tensor.new_full
    return s.emit(old, new_full, instead_of, tuple(shape), value, dtype=value_of(old).dtype)


def _first(s: "Sharder", old: fx.Node) -> bool:
    """The first entry is a sum: of it where it is, and of zeros elsewhere."""
    source = first_arg(old)
    axes, ndim = s.axes[source], len(value_of(old).shape)
    spans = layouts.spans(value_of(source).shape, axes, s.mesh.coordinate)
    has_it = all(start == 0 and stop > 0 for start, stop in spans)
    made = (
        s.emit(old, ops.first, s.new[source])
        if has_it
        else _constant(s, old, value_of(old).shape, 0, s.new[source])
    )
    return _reduced(s, old, made, "sum", axes, whole(ndim), dims_of(axes))


def _dot(s: "Sharder", old: fx.Node) -> bool:
    """A sum over the only axis of two vectors."""
    nodes = old.all_input_nodes
    axes = layouts.merged([s.axes[n] for n in nodes])
    args = [s.part(n, axes) for n in args_of(old)]
    made = s.emit(old, torch.dot, *args)
    return _reduced(s, old, made, "sum", axes, (), dims_of(axes))


def _kernel_call(s: "Sharder", old: fx.Node) -> bool:
    """The kernel's sums are additive, and a step of tier 2 is entry by entry; other calls want whole tensors."""
    name, params, operands = args_of(old)
    if name == "chainrule_tier2":
        return _tier2(s, old)
    given = dict(params)
    if name != "chainrule_sums" or given["batch"]:
        return False
    c, *tensors = operands
    count = len(tensors) if given["kind"] in forms.OF_ONE else len(tensors) // 2
    own, holds, repeated = [], [], False
    for x, *y in zip(*(tensors[i : i + count] for i in range(0, len(tensors), count)), strict=True):
        shape = value_of(x).shape
        axes = layouts.merged([s.axes[n] for n in (x, *y) if value_of(n).shape == shape])
        own.append([s.operand(n, axes, shape) for n in (x, *y)])
        holds.append(layouts.is_first_holder(axes, s.mesh))
        repeated |= layouts.is_repeated(axes, s.mesh)
    flat = [x for row in zip(*own, strict=True) for x in row]
    c = s.all_of(c) if isinstance(c, fx.Node) else c
    made = s.emit(old, ops.kernel_call, name, params, [c, *flat])
    s.new[old], s.axes[old] = made, (None,)
    for user in sorted(old.users, key=lambda user: args_of(user)[1]):
        part = s.emit(user, operator.getitem, made, args_of(user)[1])
        part.meta["aval"] = s.like(value_of(user), (None,))
        if repeated:
            part = _held(s, user, part, holds)
        s.axes[user] = (None,)
        s.new[user] = s.collective(user, ops.all_reduce, ([part], "sum", s.mesh.everyone), (None,))
    return True


def _tier2(s: "Sharder", old: fx.Node) -> bool:
    name, params, operands = args_of(old)
    step = step_of(dict(params)["roles"], operands)
    axes, own = [], []
    for tensors in zip(*step.roles.values(), strict=True):  # of one parameter
        axes.append(layouts.merged([s.axes[n] for n in tensors]))
        own.append([s.part(n, axes[-1]) for n in tensors])
    flat = [x for role in zip(*own, strict=True) for x in role]
    numbers = [s.all_of(x) if isinstance(x, fx.Node) else x for x in step.numbers.values()]
    made = s.emit(old, ops.kernel_call, name, params, [*numbers, *flat])
    s.new[old], s.axes[old] = made, ()
    for user in old.users:
        k = args_of(user)[1]
        s.keep(user, s.emit(user, operator.getitem, made, k), axes[k % len(axes)])
    return True


def _held(s: "Sharder", old: fx.Node, sums: fx.Node, holds: Any) -> fx.Node:
    """What this rank is to add, and zeros where another one does.

    A constant says which, so that ranks that have the same run the same operations: a compiler rounds others
    differently.
    """
    mask = torch.tensor(holds, device=s.program.device)
    name = "held_" + "".join("01"[h] for h in mask.reshape(-1).tolist()) + f"_{mask.ndim}"
    s.program.attributes[name] = mask
    given = s.graph.create_node("get_attr", name)
    given.meta.update(link="", source="", level=0)
    return s.emit(old, torch.where, given, sums, 0)


_REDUCTIONS: dict[Any, str] = {
    torch.sum: "sum",
    torch.amax: "max",
    torch.any: "max",
    torch.amin: "min",
    torch.all: "min",
}
RULES: dict[Any, Rule] = {
    **dict.fromkeys(_REDUCTIONS, _reduce),
    operator.getitem: _getitem,
    torch.permute: _permute,
    torch.t: _permute,
    torch.reshape: _shaped,
    torch.broadcast_to: _shaped,
    torch.narrow: _along,
    torch.select: _along,
    torch.cat: _joined,
    torch.stack: _joined,
    torch.dot: _dot,
    ops.first: _first,
    ops.kernel_call: _kernel_call,
}


def _least(dtype: torch.dtype) -> Any:
    if dtype is torch.bool:
        return False
    return -float("inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def _most(dtype: torch.dtype) -> Any:
    if dtype is torch.bool:
        return True
    return float("inf") if dtype.is_floating_point else torch.iinfo(dtype).max
