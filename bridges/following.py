"""What others did to the parameter groups of a bridge, which torch lets anybody do.

Accelerate, Fabric and FSDP put other tensors into `group["params"]`; people shorten lists, pop groups and append some.
A bridge holds a tree for each group, so it looks at every step whether its groups still hold the tensors that it knows,
and if not, finds out which is which.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chainrule.bridges.group_tree import GroupTree
from chainrule.bridges.matching import POSITIONS, TREE
from chainrule.bridges.sharded import laid_out
from chainrule.native.dtypes import is_key


class Known(NamedTuple):
    """A group as the bridge last saw it."""

    group: dict[str, Any]
    params: tuple[Tensor, ...]
    names: list[str] | None

    @classmethod
    def of(cls, group: dict[str, Any]) -> "Known":
        names = group.get("param_names")
        return cls(group, tuple(group["params"]), None if names is None else list(names))

    def restored(self) -> dict[str, Any]:
        """The group with the parameters and names that it had."""
        names = {} if self.names is None else {"param_names": self.names}
        return {**self.group, "params": list(self.params), **names}


def unchanged(groups: Sequence[dict[str, Any]], known: Sequence[Known]) -> bool:
    """Whether the groups hold the tensors and names that they held; takes microseconds for hundreds of tensors."""
    if len(groups) != len(known):
        return False
    for group, (_, before, names) in zip(groups, known, strict=True):
        params = group.get("params")
        if type(params) is not list or len(params) != len(before):
            return False
        # `==` of lists of tensors would compare their elements' values.
        if not all(map(operator.is_, params, before)) or group.get("param_names") != names:
            return False
    return True


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two lists hold the same tensors."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def check_groups(groups: Sequence[Any]) -> None:
    """Makes a list of every group's parameters.

    Raises:
      TypeError: a group is no dict, or holds no list of tensors.
      ValueError: a parameter is there twice, or is no leaf.
    """
    for i, group in enumerate(groups):
        given = group.get("params") if isinstance(group, dict) else None
        if not isinstance(given, (list, tuple)):
            raise TypeError(
                f"TorchBridge: param group {i} must be a dict whose `params` are a list of tensors, got "
                f"{type(given if isinstance(group, dict) else group).__name__}"
            )
        group["params"] = given if type(given) is list else list(given)
    tensors = [p[1] if isinstance(p, tuple) else p for group in groups for p in group["params"]]
    for p in tensors:
        if not isinstance(p, Tensor):
            raise TypeError(f"optimizer can only optimize Tensors, but got {torch.typename(p)}")
        if not (p.is_leaf or p.retains_grad):
            raise ValueError("can't optimize a non-leaf Tensor")
    if len(set(map(id, tensors))) < len(tensors):
        raise ValueError(
            "TorchBridge: a parameter appears twice in the parameter groups, which were changed by hand"
        )


def matches(groups: Sequence[dict[str, Any]], known: Sequence[Known]) -> list[int | None]:
    """Which of the known groups each group is: the same dict, one that shares a parameter, or, if there are as many
    groups as before, the one at its position. None: a new one."""
    left = dict(enumerate(known))
    found: list[int | None] = [None] * len(groups)

    def find(is_it: Any) -> None:
        for i, group in enumerate(groups):
            if found[i] is None:
                match = next((j for j, seen in left.items() if is_it(i, group, j, seen)), None)
                if match is not None:
                    found[i] = match
                    del left[match]

    find(lambda i, group, j, seen: group is seen.group)
    find(lambda i, group, j, seen: not set(seen.params).isdisjoint(_tensors(group)))
    if len(groups) == len(known):
        find(lambda i, group, j, seen: i == j)
    return found


def _tensors(group: dict[str, Any]) -> list[Tensor]:
    return [p[1] if isinstance(p, tuple) else p for p in group["params"]]


def origins(group: dict[str, Any], seen: Known, where: str) -> dict[Tensor, Tensor]:
    """For every parameter of a group the one whose state it goes on with: itself, or the one that had its name or,
    without names, its position. Newcomers have none.

    Names that are missing for a list that was only shortened are mended in the group.

    Raises:
      ValueError: it cannot be told who is who, or a shape changed.
    """
    params = group["params"]
    if any(isinstance(p, tuple) for p in params):
        raise ValueError(
            f"{where}: `params` now holds pairs of name and parameter; put the names in `param_names`"
        )
    before = set(seen.params)
    origin = {p: p for p in params if p in before}
    new = [p for p in params if p not in origin]
    _mend_names(group, seen, bool(new), where)
    if seen.names is not None:
        at = dict(zip(seen.names, seen.params, strict=True))
        pairs = [(p, at.get(name)) for p, name in zip(params, group["param_names"], strict=True)]
    elif new and len(params) != len(seen.params) and len(origin) < len(seen.params):
        raise ValueError(
            f"{where}: of its {len(seen.params)} parameters {len(origin)} are still there, with {len(new)} others, and "
            "without names it cannot be told which took whose place; replace them one for one, or make the bridge "
            "with `named_parameters()`"
        )
    else:
        pairs = list(zip(params, seen.params, strict=False))
    origin |= {p: q for p, q in pairs if p not in origin and q is not None and q not in origin}
    labels = group.get("param_names") or range(len(params))
    for p, label in zip(params, labels, strict=True):
        q = origin.get(p)
        if q is not None and p.shape != q.shape:
            raise ValueError(
                f"{where}: parameter {label} was replaced by one of shape {tuple(p.shape)}, and its state is for "
                f"{tuple(q.shape)}; make a new bridge for it"
            )
    return origin


def _mend_names(group: dict[str, Any], seen: Known, has_new: bool, where: str) -> None:
    params, names = group["params"], group.get("param_names")
    if seen.names is None and names is None:
        return
    if names is not None and len(names) == len(params):
        if seen.names is None:  # given by hand: the chain goes on in the tree that it was made in
            group[TREE] = POSITIONS
        return
    if has_new or seen.names is None:
        raise ValueError(
            f"{where}: it holds new parameters, {len(params)} in all, but {len(names or ())} names in `param_names`; "
            "change both"
        )
    name_of = dict(zip(seen.params, seen.names, strict=True))
    group["param_names"] = [name_of[p] for p in params]


def taken_over(
    old: GroupTree,
    before: Sequence[Tensor],
    new: GroupTree,
    leaves: Sequence[Tensor],
    origin: Mapping[Tensor, Tensor],
    where: str,
) -> list[Tensor]:
    """The leaves of the state of `new`: what `old` has for the parameter's origin and for the group, else as given.

    Args:
      old: the tree so far.
      before: the leaves of its state.
      new: another tree of the same chain.
      leaves: the leaves of its state at the start.
      origin: for parameters of `new` those of `old` that they go on with; others go on with themselves.
      where: how messages begin.

    Raises:
      ValueError: a leaf spans all parameters, and they are not the same any more.
    """
    known = dict(zip(old.homes, before, strict=True))
    position = {p: i for i, p in enumerate(old.params)}
    found = [position.get(origin.get(p, p)) for p in new.params]
    survivors = [i for i in found if i is not None]
    taken = list(leaves)
    for i, (home, slot) in enumerate(zip(new.homes, new.described.slots, strict=True)):
        if home is None:
            continue
        shared = slot.owner is None
        source = old.head if shared else origin.get(home[0], home[0])
        value = known.get((source, slot.name))
        if value is None:
            continue
        aval = new.state_avals[i]
        spans = value.shape != taken[i].shape
        # The shape of an array may be the same for the same parameters in another order.
        spans |= shared and _is_array(aval, slot.name) and survivors != sorted(survivors)
        if spans:
            raise ValueError(
                f"{where}: state entry `{slot.name}` spans all parameters of the group, so none can join, leave or "
                "move later; give those that are frozen at first a group of their own"
            )
        taken[i] = laid_out(value, taken[i]).to(taken[i])
    return taken


def _is_array(aval: Any, name: str) -> bool:
    return bool(aval.shape) and not is_key(aval.dtype) and name != "rounding"
