"""The state of `torch.optim.Adam` as that of a chain."""

from typing import Any

import jax
import torch
from torch import Tensor

from chainrule.bridges.group_tree import GroupTree


def _adam_states(node: Any) -> list[Any]:
    """The states inside `node` that hold the two moments of Adam."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        fields = node._asdict()  # pyright: ignore[reportAttributeAccessIssue]
        if {"count", "mu", "nu"} <= fields.keys():
            return [node]
        return [found for child in fields.values() for found in _adam_states(child)]
    if isinstance(node, dict):
        return [found for child in node.values() for found in _adam_states(child)]
    if isinstance(node, (tuple, list)):
        return [found for child in node for found in _adam_states(child)]
    return []


def adam_moments(
    tree: GroupTree, leaves: list[Tensor], entries: list[Any]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a tensor of the chain's state and the value that Adam has for it.

    Every state with fields `mu`, `nu` and `count` takes over the moments; every `count` of the group the number of
    steps.

    Args:
      tree: the group.
      leaves: the leaves of its state.
      entries: for each parameter its state in the torch optimizer, or None before its first gradient.

    Raises:
      ValueError: see `TorchBridge.load_torch_adam`.
    """
    numbers = jax.tree.unflatten(tree.state_structure, range(len(leaves))).chain
    fields = {"mu": "exp_avg", "nu": "exp_avg_sq"}
    wanted = [
        (leaf, theirs)
        for state in _adam_states(numbers)
        for ours, theirs in fields.items()
        for leaf in jax.tree.leaves(getattr(state, ours))
        if tree.slots[leaf].owner is not None
    ]
    if not wanted:
        raise ValueError("load_torch_adam: this chain has no state with `count`, `mu` and `nu`")
    steps = {float(entry["step"]) for entry in entries if entry}
    if len(steps) > 1:
        raise ValueError(
            f"load_torch_adam: the parameters of a group have made different numbers of steps, {sorted(steps)}; a "
            "chain has one count a group, so give each its own group"
        )
    plan = []
    for leaf, theirs in wanted:
        owner = tree.slots[leaf].owner
        assert owner is not None
        entry = entries[owner]
        if not entry:
            continue
        value = entry.get(theirs)
        if value is None or value.shape != leaves[leaf].shape:
            got = "absent" if value is None else f"of shape {tuple(value.shape)}"
            raise ValueError(
                f"load_torch_adam: `{theirs}` of parameter {tree.labels[owner]} is {got}, expected shape "
                f"{tuple(leaves[leaf].shape)}"
            )
        plan.append((leaves[leaf], value))
    for leaf, slot in enumerate(tree.slots):
        counts = (
            slot.owner is None
            and slot.name.rpartition(".")[2] == "count"
            and leaves[leaf].ndim == 0
        )
        if counts and steps:
            plan.append((leaves[leaf], torch.tensor(steps.copy().pop())))
    return plan
