"""A step of a group with everything that it reads and writes, before anything is written."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chainrule.bridges.checks import quick_reads
from chainrule.bridges.group_tree import GroupTree
from chainrule.bridges.lowering.backends.cuda_graph import CapturedStep
from chainrule.bridges.lowering.executor import InPlace, write
from chainrule.bridges.sharded import local_step


class Ready(NamedTuple):
    """A step of a group."""

    run: InPlace
    inputs: list[Tensor]
    present: Tensor | None
    """On how many ranks each parameter has a gradient, once it ran; None if ranks do not tell each other."""
    may_stay: list[tuple[int | None, Tensor]]
    """What stays as it is, unless another rank has a gradient, with the position of the parameter that it belongs to;
    None: it belongs to the group."""

    def __call__(self) -> bool:
        """Runs it; returns whether any rank has a gradient."""
        before = [x.detach().clone() for _, x in self.may_stay]
        self.run(self.inputs)
        if not self.may_stay:
            return True
        counts = None if self.present is None else self.present.tolist()
        there = counts is None or any(counts)

        def moves(owner: int | None) -> bool:
            return counts is not None and (there if owner is None else counts[owner] > 0)

        kept = zip(self.may_stay, before, strict=True)
        stay = [(x, old) for (owner, x), old in kept if not moves(owner)]
        write([x for x, _ in stay], [old for _, old in stay])
        return there


def ready_step(tree: GroupTree, leaves: Sequence[Tensor], loss: Any) -> Ready:
    """The step of a group. What may fail has been done: the program is compiled, and captured if it is to be.

    Args:
      tree: of the group; some of its parameters may have no gradient.
      leaves: of the state.
      loss: what the closure returned, or None.
    """
    run, extras = tree.ready(loss)
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
    may_stay: list[tuple[int | None, Tensor]] = []
    if missing:  # it runs on zeros, and what shall stay is put back
        stays: set[int | None] = {*missing, *([None] if len(missing) == len(grads) else [])}
        owners = [*range(len(params)), *(slot.owner for slot in tree.described.slots)]
        owned = zip(owners, [*params, *leaves], strict=True)
        may_stay = [(i, x) for i, x in owned if i in stays]
        pairs = zip(params, grads, strict=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in pairs]
    inputs: list[Any] = [*params, *grads, *leaves, *extras]
    at = run.at(inputs) if isinstance(run, CapturedStep) else run
    return Ready(at, inputs, present, may_stay)
