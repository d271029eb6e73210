"""Torch's Adam as copies into the state of a bridge; nothing has been written when a function here raises."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import torch
from torch import Tensor

from chainrule.bridges.group_tree import GroupTree
from chainrule.bridges.loading import Copies, check_layout
from chainrule.transforms._protocols import is_state


def from_torch_adam(
    state_dict: Any,
    groups: Sequence[Mapping[str, Any]],
    synced: Iterable[tuple[int, list[Tensor], GroupTree]],
) -> Copies:
    """Pairs of a tensor of the chain's state and the value that Adam has for it.

    Args:
      state_dict: of a `torch.optim.Adam` or `AdamW`.
      groups: of the bridge.
      synced: index, leaves of the state and tree of those groups that have parameters.

    Raises:
      TypeError, ValueError: see `TorchBridge.load_torch_adam`.
    """
    check_layout(state_dict, "load_torch_adam: the state dict")
    saved_groups = state_dict["param_groups"]
    theirs, own = ([len(g["params"]) for g in gs] for gs in (saved_groups, groups))
    if theirs != own:
        raise ValueError(
            "load_torch_adam: the state dict has other parameter groups than this optimizer"
        )
    copies: Copies = []
    for index, leaves, tree in synced:
        saved = dict(zip(groups[index]["params"], saved_groups[index]["params"], strict=True))
        copies += _of_group(tree, leaves, [state_dict["state"].get(saved[p]) for p in tree.params])
    return copies


def _adam_states(node: Any) -> list[Any]:
    """The states inside `node` that hold the two moments of Adam."""
    if is_state(node):
        fields = node._asdict()
        if {"count", "mu", "nu"} <= fields.keys():
            return [node]
        return [found for child in fields.values() for found in _adam_states(child)]
    if isinstance(node, dict):
        return [found for child in node.values() for found in _adam_states(child)]
    if isinstance(node, (tuple, list)):
        return [found for child in node for found in _adam_states(child)]
    return []


def _of_group(tree: GroupTree, leaves: list[Tensor], entries: list[Any]) -> Copies:
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
    numbers = tree.state(range(len(leaves)))
    fields = {"mu": "exp_avg", "nu": "exp_avg_sq"}
    wanted = [
        (leaf, theirs)
        for state in _adam_states(numbers)
        for ours, theirs in fields.items()
        for leaf in jax.tree.leaves(getattr(state, ours))
        if tree.described.slots[leaf].owner is not None
    ]
    if not wanted:
        raise ValueError("load_torch_adam: this chain has no state with `count`, `mu` and `nu`")
    for entry, label in zip(entries, tree.labels, strict=True):
        if entry and "step" not in entry:
            raise ValueError(f"load_torch_adam: the state of parameter {label} has no `step`")
    steps = {float(entry["step"]) for entry in entries if entry}
    if len(steps) > 1:
        raise ValueError(
            f"load_torch_adam: the parameters of a group have made different numbers of steps, {sorted(steps)}; a "
            "chain has one count a group, so give each its own group"
        )
    copies = []
    for leaf, theirs in wanted:
        owner = tree.described.slots[leaf].owner
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
        copies.append((leaves[leaf], value))
    for leaf, slot in enumerate(tree.described.slots):
        counts = (
            slot.owner is None
            and slot.name.rpartition(".")[2] == "count"
            and leaves[leaf].ndim == 0
        )
        if counts and steps:
            copies.append((leaves[leaf], torch.tensor(steps.copy().pop(), device="cpu")))
    return copies
