"""A step of a group with everything that it reads and writes, before anything is written."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chainrule.bridges.checks import quick_reads
from chainrule.bridges.group_tree import GroupTree
from chainrule.bridges.lowering.executor import InPlace
from chainrule.bridges.sharded import local_step


class Copied(NamedTuple):
    """A tensor that may have to stay as it is, and the copy that a step runs on."""

    owner: int | None
    """The position of the parameter that it belongs to; None: it belongs to the group."""
    kept: Tensor
    copy: Tensor


class Ready(NamedTuple):
    """A step of a group."""

    run: InPlace
    inputs: list[Tensor]
    present: Tensor | None
    """On how many ranks each parameter has a gradient, once it ran; None if ranks do not tell each other."""
    copies: list[Copied]

    def __call__(self) -> bool:
        """Runs it; returns whether any rank has a gradient."""
        self.run(self.inputs)
        if self.present is None or not self.copies:
            return True
        counts = self.present.tolist()
        for owner, kept, copy in self.copies:
            if any(counts) if owner is None else counts[owner]:
                kept.copy_(copy)
        return any(counts)


def ready_step(tree: GroupTree, leaves: Sequence[Tensor], loss: Any) -> Ready:
    """The step of a group.

    Args:
      tree: of the group; some of its parameters may have no gradient.
      leaves: of the state.
      loss: what the closure returned, or None.
    """
    run, extras = tree.ready(loss)  # compiled before anything is written
    params = tree.params
    with quick_reads():
        grads = [p.grad for p in params]
    missing = {i for i, g in enumerate(grads) if g is None}
    present = None
    if tree.agrees(loss is not None):
        there = [float(i not in missing) for i in range(len(grads))]
        present = torch.tensor(there, dtype=torch.float32, device=tree.device)
        extras = [*extras, present]
    if tree.layouts is not None:
        params, grads, leaves = local_step(params, grads, leaves)
    if not missing:
        return Ready(run, [*params, *grads, *leaves, *extras], present, [])  # pyright: ignore[reportArgumentType]
    # It runs on copies of what shall stay, which are forgotten unless another rank has a gradient.
    stays: set[int | None] = {*missing, *([None] if len(missing) == len(grads) else [])}
    copies: list[Copied] = []

    def kept(owner: int | None, x: Tensor) -> Tensor:
        if owner not in stays:
            return x
        copies.append(Copied(owner, x, x.detach().clone()))
        return copies[-1].copy

    given = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
    owners = [slot.owner for slot in tree.described.slots]
    params = [kept(i, p) for i, p in enumerate(params)]
    leaves = [kept(i, leaf) for i, leaf in zip(owners, leaves, strict=True)]
    return Ready(run, [*params, *given, *leaves, *extras], present, copies)
