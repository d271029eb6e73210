"""Which saved parameter is which: the groups of a state dict beside those of a bridge.

A chain sees a group as a dict by name or as a list in order. Both the leaves' order (random draws, tiers) and what a
chain routes by depend on it, so a state goes on in the tree that it was made in: `param_names` in a group stands for
the dict, but beside `tree: "positions"`, which says that the names came after. A saved group says so by a tuple of
names as well, for a flattened distributed checkpoint keeps only the keys that every group has.
"""

from collections.abc import Iterable
from typing import Any

TREE, POSITIONS = "tree", "positions"


def is_by_name(group: dict[str, Any]) -> bool:
    """Whether the tree of a group is a dict by name."""
    names = group.get("param_names")
    return names is not None and not isinstance(names, tuple) and group.get(TREE) != POSITIONS


def marked(group: dict[str, Any]) -> dict[str, Any]:
    """A group as it is saved."""
    if group.get(TREE) != POSITIONS:
        return group
    return {**group, "param_names": tuple(group["param_names"])}


def loaded(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """`group` after a saved one was loaded into it."""
    known = as_saved(group, saved)
    fixed = {key: known[key] for key in ("params", "param_names", TREE) if key in known}
    return {**known, **saved, **fixed}


def as_saved(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """`group` with the names and the kind of tree with which a saved group goes on.

    Where only one of them has names, these are kept, as in torch.
    """
    names = group.get("param_names", saved.get("param_names"))
    named = {key: value for key, value in group.items() if key != "param_names"}
    if names is not None:
        named["param_names"] = list(names)
    if "param_names" in named and not is_by_name(saved):
        return {**named, TREE: POSITIONS}
    named.pop(TREE, None)
    return named


def saved_ids(group: dict[str, Any], saved: dict[str, Any], where: str) -> list[Any]:
    """The id in the state dict of every parameter of `group`: by name if both have names, else by position.

    Args:
      group: a parameter group.
      saved: the one in the state dict.
      where: how messages begin.

    Raises:
      ValueError: other names, or another number of parameters.

    >>> group = {"params": ["tensors", "here"], "param_names": ["b", "a"]}
    >>> saved_ids(group, {"params": [0, 1], "param_names": ["a", "b"]}, "group 0")
    [1, 0]
    """
    ids, names, own = saved["params"], saved.get("param_names"), group.get("param_names")
    names = names and list(names)
    if names is not None and own is not None:
        _check_names(names, own, where)
    if len(ids) != len(group["params"]) or (names is not None and len(names) != len(ids)):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        )
    if names is None or own is None:
        return ids
    if set(ids) == set(names):
        names = ids  # torch.distributed.checkpoint: names for ids, in the order of this bridge
    if names != own and not is_by_name(saved):
        raise ValueError(
            f"{where} was made without names, so its chain knows parameters by their order, {_some(names)}, and "
            f"here they come in another, {_some(own)}; give them in that order"
        )
    id_of = dict(zip(names, ids, strict=True))
    return [id_of[name] for name in own]


def _check_names(names: list[str], own: list[str], where: str) -> None:
    missing, unexpected = set(own) - set(names), set(names) - set(own)
    if missing or unexpected:
        found = f"missing {_some(sorted(missing))}; unexpected {_some(sorted(unexpected))}"
        raise ValueError(
            f"{where} is of other parameters: {found}. If they were renamed, rename them in its "
            "`param_names` too (`register_load_state_dict_pre_hook`)"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{where} has two parameters of one name among {_some(sorted(names))}")


def _some(names: Iterable[str], most: int = 8) -> str:
    """The first names of many.

    >>> _some([]), _some("abc", most=2)
    ('none', 'a, b and 1 more')
    """
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest or "none"
