"""What a step of the torch bridge would move and compute, on one device of a mesh that need not exist."""

import itertools
from collections.abc import Mapping, Sequence

import torch

from chainrule.bridges.lowering import lower_jaxpr
from chainrule.bridges.lowering.layouts import Axes, Cut, Mesh
from chainrule.bridges.lowering.traffic import Traffic, traffic
from chainrule.bridges.sharded import Layouts
from chainrule.bridges.step.description import Description
from chainrule.native.dtypes import x64_if_wide


def of_step(
    described: Description, sizes: Sequence[int], cuts: Sequence[Mapping[int, Sequence[int]]]
) -> Traffic:
    """Counts a compiled step.

    Args:
      described: the step.
      sizes: of the mesh; empty: one device.
      cuts: for every parameter, axis -> the dimensions of the mesh that it is cut over.
    """
    trace = described.trace(True)
    with x64_if_wide(trace.inputs):
        lowered = lower_jaxpr(
            trace.jaxpr, device=torch.device("cpu"), compiled=True, sharded=bool(sizes)
        )
    if not sizes:
        return traffic(lowered, described.targets)
    shapes = [aval.shape for aval in trace.jaxpr.in_avals]
    axes = [_axes(shape, cut, sizes) for shape, cut in zip(shapes, cuts, strict=False)]
    layouts = Layouts(_mesh(sizes), tuple(axes))
    leaves = trace.jaxpr.in_avals[2 * len(axes) :]
    alike: list[int | None] = [
        slot.owner if slot.owner is not None and shapes[slot.owner] == leaf.shape else None
        for slot, leaf in zip(described.slots, leaves, strict=False)
    ]
    alike += [None] * (len(leaves) - len(alike))  # the scalars behind the state
    return traffic(lowered, described.targets, layouts.of_step(alike, trace.jaxpr.in_avals))


def _axes(shape: Sequence[int], cut: Mapping[int, Sequence[int]], sizes: Sequence[int]) -> Axes:
    return tuple(
        Cut(n, tuple((dim, sizes[dim]) for dim in cut[i])) if i in cut else None
        for i, n in enumerate(shape)
    )


def _mesh(sizes: Sequence[int]) -> Mesh:
    """As its first device sees it."""
    order = tuple(itertools.product(*map(range, sizes)))
    return Mesh(
        tuple(sizes), order[0], order, (*(f"dimension {i}" for i in range(len(sizes))), "all")
    )
