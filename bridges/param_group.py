"""One parameter group of a bridge over time: who is in it, the tree that its chain sees, and how both change.

Nothing here writes into `optimizer.state`. What makes or changes a group returns it with the leaves of its state, a
`Change`, and the optimizer writes all of them when nothing can fail any more.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from chainrule.bridges.checks import (
    check_flags,
    check_gradients,
    check_not_meta,
    check_params,
    is_flag,
    quick_reads,
)
from chainrule.bridges.following import Known, same, taken_over
from chainrule.bridges.group_tree import GroupTree, Options, State
from chainrule.bridges.hyperparameters import pair
from chainrule.bridges.matching import is_by_name
from chainrule.bridges.ready_step import Ready, ready_step
from chainrule.bridges.sharded import Layouts, is_distributed

# Keys that torch and its schedulers keep in a group; other numbers must be hyperparameters of the chain.
_TORCH_KEYS = {
    "params", "param_names", "betas", "differentiable", "initial_lr", "max_lr", "min_lr", "swa_lr",
    "base_momentum", "max_momentum", "initial_momentum", "lr_scale",
}  # fmt: skip


class Group(NamedTuple):
    """A parameter group.

    Attributes:
      options: of the bridge.
      known: the group as the bridge last saw it.
      members: those of its parameters that have a place in the tree; the others are frozen.
      tree: the tree of the members; None if there are none.
      is_initial: whether the state is known to be as `init` made it, no step since.
    """

    options: Options
    known: Known
    members: list[Tensor]
    tree: GroupTree | None
    is_initial: bool = True

    def with_tree(self, tree: GroupTree) -> "Group":
        inside = set(tree.params)
        return self._replace(tree=tree, members=[p for p in self.known.params if p in inside])

    def tree_of(
        self,
        members: Sequence[Tensor],
        tiers: tuple[int, ...] | None = None,
        state: Any = None,
        has_loss: bool = True,
    ) -> GroupTree:
        """A new tree of some of the parameters."""
        group = self.known.restored()
        label = dict(zip(group["params"], _labels(group), strict=True))
        labels = [label[p] for p in members]
        return GroupTree(self.options, members, labels, is_by_name(group), tiers, state, has_loss)

    def started(self, tree: GroupTree) -> "Change":
        """The group with a state as at the start."""
        return self.with_tree(tree)._replace(is_initial=True), tree.initial_state()[0]

    def cast(self, state: State) -> "Change":
        """A group that has made no step, for parameters that were cast or left `meta`."""
        tree = self.tree_of(self.members)
        check_params(tree.params, tree.labels)
        new, leaves = self.started(tree)
        assert self.tree is not None
        old = self.tree.leaves(state)
        if self.options.rounding and not old[-1].is_meta:
            leaves[-1] = old[-1].to(tree.device)  # the seed is of when the bridge was made
        return new, leaves

    def mended(self, state: State, where: str) -> "Change":
        """The group after all or a part of its state was removed from `optimizer.state`: made again, as in torch.

        Raises:
          RuntimeError: less or more than all of a parameter's state was removed.
        """
        tree = self.tree
        assert tree is not None
        gone = {p for p in tree.keepers if not state.get(p)}
        if len(gone) == len(tree.keepers):
            return self.started(tree if tree.tiers is None else self.tree_of(self.members))
        label = dict(zip(tree.params, tree.labels, strict=True))
        leaves = []
        for slot, home, leaf in zip(
            tree.described.slots, tree.homes, tree.initial_state()[0], strict=True
        ):
            kept = home is None or home[1] in state.get(home[0], {})
            if home and not kept and (home[0] not in gone or slot.owner is None):
                raise RuntimeError(
                    f"{where}: `optimizer.state` has no `{home[1]}` of parameter {label[home[0]]} any more; clear all "
                    "of the group's to start afresh, or load a state dict"
                )
            leaves.append(state[home[0]][home[1]] if home and kept else leaf)
        return self, leaves

    def with_members(
        self, members: Sequence[Tensor], state: State, origin: Mapping[Tensor, Tensor], where: str
    ) -> "Change":
        """The group with other members; they go on with the state of their origins, others with a fresh one.

        Args:
          members: of its parameters.
          state: `optimizer.state`.
          origin: see `following.origins`.
          where: how messages begin.
        """
        old, new = self.tree, self.tree_of(members)
        if old and old.tiers is not None and new.tiers is not None:
            tier_of = dict(zip(old.params, old.tiers, strict=True))
            pairs = zip(new.params, new.tiers, strict=True)
            tiers = tuple(tier_of.get(origin.get(p, p), tier) for p, tier in pairs)
            if tiers != new.tiers:
                new = self.tree_of(members, tiers)
        leaves, values = new.initial_state()
        if old:
            before = old.leaves(_entries(old, state, origin))
            leaves = taken_over(old, before, new, leaves, origin, where)
        for key, value in values.items():
            self.known.group.setdefault(key, value)
        return self.with_tree(new), leaves

    def joined(self, state: State, where: str) -> "Change | None":
        """The group with those frozen parameters that have a gradient now; None if there are none."""
        if len(self.members) == len(self.known.params):
            return None
        inside = set(self.members)
        # Another rank may have a gradient for its part of a DTensor.
        joining = [
            p
            for p in self.known.params
            if p not in inside and (p.grad is not None or (is_distributed(p) and p.requires_grad))
        ]
        if not joining:
            return None
        labels = [f"of shape {tuple(p.shape)}" for p in joining]
        dtypes, shapes = [p.dtype for p in joining], [p.shape for p in joining]
        check_gradients(joining, [p.grad for p in joining], dtypes, shapes, labels)
        inside.update(joining)
        members = [p for p in self.known.params if p in inside]
        return self.with_members(members, state, {}, where)

    def followed(
        self, group: dict[str, Any], origin: Mapping[Tensor, Tensor], state: State, where: str
    ) -> "Change":
        """The group after others changed it by hand.

        Args:
          group: the group now.
          origin: see `following.origins`.
          state: `optimizer.state`, before anything is written.
          where: how messages begin.
        """
        assert self.options.meant is not None
        self.options.meant.replaced(origin)
        for key, value in self.known.group.items():  # where the dict is another one
            if key != "param_names":
                group.setdefault(key, value)
        labels = _labels(group)
        check_params(group["params"], labels)
        inside, old = set(self.members), self.tree
        members = [p for p in group["params"] if origin.get(p) in inside]
        new = self._replace(known=Known.of(group), members=members)
        if old is None or not members:
            return new._replace(members=[], tree=None), []
        order = {q: p for p, q in origin.items()}
        params = [order[q] for q in old.params if q in order]
        label = dict(zip(group["params"], labels, strict=True))
        own = [label[p] for p in params]
        if old.keepers and not any(_entries(old, state, origin).values()):  # it was cleared too
            return new.started(new.tree_of(members))
        in_order = own == old.labels if old.named else same(params, members)
        alike = [p.dtype for p in params] == old.dtypes and old.layouts == Layouts.of(params, own)
        if in_order and alike and old.named == is_by_name(group):
            tree = old.bound_to(params, members[0], own)
            return new._replace(tree=tree), old.leaves(_entries(old, state, origin))
        return new.with_members(members, state, origin, where)

    def stepped(self, state: State) -> "Group":
        """The group after a step that was made."""
        tree = self.tree
        assert tree is not None
        # What writes outside torch's operators (the kernel, compiled code) leaves autograd no trace.
        torch.autograd.graph.increment_version(tree.params)
        tree.stepped(state)
        return self._replace(is_initial=False) if self.is_initial else self

    def prepared(self, leaves: list[Tensor], loss: Any, owner: str) -> Ready:
        """A step, of which nothing is written yet.

        Args:
          leaves: of the state.
          loss: what the closure returned, or None.
          owner: how messages begin.
        """
        tree = self.tree
        assert tree is not None
        tree.check(leaves, owner)
        tree.hyperparameters.sync(self.known.group, owner)
        return ready_step(tree, leaves, loss)

    def takes_part(self, has_loss: bool, owner: str) -> bool:
        """Whether a member has a gradient, or may have one on another rank; all that are there are checked."""
        tree = self.tree
        if tree is None:
            return False
        with quick_reads():
            grads = [p.grad for p in tree.params]
            if any(g is not None for g in grads):
                check_gradients(tree.params, grads, tree.dtypes, tree.shapes, tree.labels)
                return True
        check_not_meta(tree.params, owner)
        return tree.agrees(has_loss)


Change: TypeAlias = tuple[Group, list[Tensor]]
"""A group and the leaves of its state, which are still to be written."""


def _labels(group: dict[str, Any]) -> list[str]:
    names = group.get("param_names")
    return list(names) if names is not None else [str(i) for i in range(len(group["params"]))]


def _entries(tree: GroupTree, state: State, origin: Mapping[Tensor, Tensor]) -> State:
    """The state by the parameters of a tree, of which others may have moved some to those that took their place."""
    heir = {q: p for p, q in origin.items()}
    return {q: state.get(q) or state.get(heir.get(q, q), {}) for q in tree.params}


def adopted(
    options: Options, group: dict[str, Any], given: set[str], defaults: dict[str, Any], owner: str
) -> Change:
    """A new group, whose dict gets the hyperparameters that it lacks.

    Args:
      options: of the bridge.
      group: the group, with the values of `defaults` filled in.
      given: the keys that it came with.
      defaults: of the optimizer; what it lacks is filled in.
      owner: how messages begin.
    """
    check_flags(group, owner)
    check_params(group["params"], _labels(group))
    members = [p for p in group["params"] if p.requires_grad] or list(group["params"])
    new = Group(options, Known.of(group), members, None)
    leaves: list[Tensor] = []
    values: dict[str, Any] = defaults
    if members:
        tree = new.tree_of(members)
        new = new._replace(tree=tree)
        leaves, values = tree.initial_state()
    if new.tree and new.tree.hyperparameters.has_betas:
        if "betas" in group and not given & {"b1", "b2"}:
            group["b1"], group["b2"] = pair(group["betas"], owner)
        values["betas"] = tuple(defaults.get(key, values[key]) for key in ("b1", "b2"))
        group["betas"] = tuple(group.get(key, values[key]) for key in ("b1", "b2"))
    for key, value in group.items():
        if (
            key not in values
            and key not in _TORCH_KEYS
            and not is_flag(key, value)
            and isinstance(value, (int, float, Tensor))
        ):
            raise ValueError(
                f"{owner}: `{key}` is no live hyperparameter of this chain; they are {sorted(values)}. A chain of "
                "chainrule.chains or optax.inject_hyperparams(...) exposes its own"
            )
    for key, value in values.items():
        group.setdefault(key, value)
        defaults.setdefault(key, value)
    if new.tree:
        new.tree.hyperparameters.check(group, owner)
        new.tree.hyperparameters.sync(group, owner)
    return new, leaves
