"""States from elsewhere (a state dict, a run in JAX) as copies into the state of a group.

Each function checks everything and returns pairs of a tensor of the state and its new value; nothing has been
written when it raises.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import torch
from torch import Tensor

from chainrule.bridges.checks import check_flags
from chainrule.bridges.following import Known
from chainrule.bridges.group_tree import GroupTree
from chainrule.bridges.hyperparameters import check_number, shortest
from chainrule.bridges.lowering import to_torch
from chainrule.bridges.matching import as_saved, is_by_name, saved_ids
from chainrule.bridges.param_group import Change, Group
from chainrule.bridges.sharded import laid_out, local
from chainrule.bridges.step.tiers import TIERS
from chainrule.bridges.step.vectors import unstack

Copies: TypeAlias = list[tuple[Tensor, Tensor]]


def carry_out(copies: Copies) -> None:
    """Copies every value into its tensor."""
    for target, value in copies:
        local(target).copy_(local(laid_out(value, target)))


def check_layout(state_dict: Any, owner: str) -> None:
    """Raises `TypeError` or `ValueError` for what is no state dict of an optimizer, or only a part of one."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{owner} must be a dict, as `state_dict()` returns, got {type(state_dict).__name__}"
        )
    for key, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if key not in state_dict:
            raise ValueError(f"{owner} has no `{key}`; its keys are {sorted(map(str, state_dict))}")
        if not isinstance(state_dict[key], kind):
            found = type(state_dict[key]).__name__
            raise ValueError(f"{owner}: `{key}` is a {found}, as no `state_dict()` returns it")
    for i, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"{owner}: its param group {i} has no list `params`")
    for key, entry in state_dict["state"].items():
        if not isinstance(entry, (Mapping, type(None))):
            found = type(entry).__name__
            raise ValueError(f"{owner}: the state of parameter {key} is a {found}, expected a dict")


def tiers_in(entries: Iterable[dict[str, Any]], key: str, where: str) -> tuple[int, ...] | None:
    """The tiers that a saved group has under `key`, taken out of its entries; None if it has none."""
    found = [entry.pop(key) for entry in entries if key in entry]
    if not found:
        return None
    if not isinstance(found[0], Tensor) or found[0].ndim != 1 or found[0].is_floating_point():
        raise ValueError(
            f"{where}: state entry `{key}` is {_described(found[0])}, expected a vector of integers"
        )
    return tuple(found[0].tolist())


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def from_state_dict(
    tree: GroupTree,
    leaves: Sequence[Tensor],
    saved: dict[str, Any],
    entries: dict[Tensor, dict[str, Any]],
    where: str,
) -> Copies:
    """One group of a torch state dict.

    Args:
      tree: the group.
      leaves: the leaves of its state.
      saved: the group in the state dict.
      entries: for every parameter of the group its saved state, empty if it has none.
      where: how messages begin.

    Raises:
      TypeError: a hyperparameter is no number.
      ValueError: the state dict is another chain's or has other shapes, or a hyperparameter is out of bounds.
    """
    for key in tree.hyperparameters.tensors:
        if key not in saved:
            raise ValueError(
                f"{where} has no `{key}`, a hyperparameter of this chain; is it of another chain?"
            )
    tree.hyperparameters.check(saved, where)
    label = dict(zip(tree.params, tree.labels, strict=True))
    shared = {slot.name for slot in tree.described.slots if slot.owner is None}
    homes = {home for home in tree.homes if home}
    entries = _renamed(tree, entries)
    for p, entry in entries.items():
        for name in entry:
            if name not in shared and (p, name) not in homes:
                known = ", ".join(sorted({name for _, name in homes}))
                raise ValueError(
                    f"{where}: state entry `{name}` of parameter {label[p]} is none of this chain's: {known}"
                )
    copies: Copies = []
    for slot, home, target in zip(tree.described.slots, tree.homes, leaves, strict=True):
        if home is None:
            continue
        p, name = home
        if slot.owner is None:  # it was kept with the first parameter, maybe another one than here
            p = next((q for q, entry in entries.items() if name in entry), p)
        # torch.distributed.checkpoint writes an empty dict for what a flattened checkpoint has not.
        if isinstance(entries[p].get(name, {}), dict):
            raise ValueError(
                f"{where}: parameter {label[p]} has no state entry `{name}`; is it of another chain?"
            )
        entry = f"{where}: state entry `{name}` of parameter {label[p]}"
        copies.append((target, _fitting(entries[p][name], target, entry)))
    return copies


def _renamed(
    tree: GroupTree, entries: dict[Tensor, dict[str, Any]]
) -> dict[Tensor, dict[str, Any]]:
    """Saved state under the names of today: version 0.2 called what two parameters have by its path."""
    pairs = zip(tree.described.slots, tree.homes, strict=True)
    names = {(home[0], slot.path): home[1] for slot, home in pairs if home}
    return {
        p: {names.get((p, name), name): value for name, value in entry.items()}
        for p, entry in entries.items()
    }


def _fitting(value: Any, target: Tensor, entry: str) -> Tensor:
    """A saved value as a tensor; raises `ValueError` if it is none like the target."""
    if isinstance(value, (bool, int, float, np.ndarray, np.generic)):
        value = torch.as_tensor(value, device=target.device)
    if (
        not isinstance(value, Tensor)
        or value.shape != target.shape
        or value.is_floating_point() != target.is_floating_point()
    ):
        raise ValueError(f"{entry} is {_described(value)}, expected {_described(target)}")
    return value


def from_group(
    group: Group,
    leaves: list[Tensor],
    saved: dict[str, Any],
    saved_state: Mapping[Any, Any],
    where: str,
) -> tuple[Change, Copies]:
    """One group of a torch state dict, in the tree that it asks for.

    Args:
      group: the group.
      leaves: the leaves of its state.
      saved: the group in the state dict.
      saved_state: the state in the state dict.
      where: how messages begin.

    Returns:
      The group and the leaves of its state, and what to copy into them.

    Raises:
      ValueError: the state dict is of other parameters, another chain's, or has other shapes.
    """
    check_flags(saved, where)
    now = group.known.group
    ids = saved_ids(now, saved, where)
    new = group._replace(known=Known.of(as_saved(now, saved)))
    entries = {p: dict(saved_state.get(k) or {}) for k, p in zip(ids, now["params"], strict=True)}
    tiers = tiers_in(entries.values(), TIERS, where)
    inside = set(group.members)
    members = [p for p, entry in entries.items() if entry or p in inside]
    tree, named = group.tree, is_by_name(new.known.group)
    fits = tree and len(members) == len(inside) and (tree.tiers, tree.named) == (tiers, named)
    if members and not fits:
        tree = new.tree_of(members, tiers)
        leaves, _ = tree.initial_state()
    if tree is None:
        return (new, []), []
    if tiers is not None and tree.tiers is None:
        raise ValueError(f"{where} has tiers, this chain has none; is it of another chain?")
    return (new.with_tree(tree), leaves), from_state_dict(tree, leaves, saved, entries, where)


def from_jax(
    tree: GroupTree, leaves: Sequence[Tensor], state: Any, where: str
) -> tuple[Copies, dict[str, float | int]]:
    """The state of a run in JAX.

    Args:
      tree: the group.
      leaves: the leaves of its state.
      state: the chain's state in JAX.
      where: how messages begin.

    Returns:
      The copies, and the values of the group's hyperparameters.

    Raises:
      ValueError: structure or shapes differ.
    """
    state, expected = unstack(state), tree.state(tree.state_avals)
    got, wanted = jax.tree.structure(state), jax.tree.structure(expected)
    if got != wanted:
        raise ValueError(f"{where}: expected a state of structure {wanted}, got {got}")
    key_of = {leaf: key for key, leaf in tree.live.items()}
    copies: Copies = []
    values: dict[str, float | int] = {}
    for i, (path, value) in enumerate(jax.tree_util.tree_leaves_with_path(state)):
        tensor, aval = to_torch(value, tree.device), tree.state_avals[i]
        if (
            tensor.shape != leaves[i].shape
            or tensor.is_floating_point() != leaves[i].is_floating_point()
        ):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"{where}: state entry `{name}` is {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected {aval.dtype} {aval.shape}"
            )
        if i in key_of:
            values[key_of[i]] = shortest(tensor)
            check_number(where, key_of[i], values[key_of[i]])
        else:
            copies.append((leaves[i], tensor))
    return copies, values
