"""What a bridge keeps between steps: a `Group` for each parameter group, whatever others do to the groups by hand."""

import contextlib
import copy
import itertools
import pickle
from collections.abc import Generator, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from chainrule.bridges.checks import one_device, outside_inference_mode
from chainrule.bridges.following import Known, check_groups, matches, origins, unchanged
from chainrule.bridges.group_tree import GroupTree, Options
from chainrule.bridges.meant import Meant
from chainrule.bridges.param_group import Change, Group, adopted
from chainrule.bridges.ready_step import Ready
from chainrule.bridges.step.tiers import TIERS
from chainrule.bridges.tier_moves import between_tiers

_NO_DYNAMO = "the step of a TorchBridge is a traced program already; TorchBridge(..., compile=True) compiles it"


class GroupedOptimizer(torch.optim.Optimizer):
    """An optimizer whose groups each have a tree of their own, which can be copied and pickled.

    State is written in `_write` and in a step only, after everything that may fail; an interruption in between leaves
    the optimizer torn.
    """

    _torn = False  # whether a write began and did not end

    def __init__(self, options: Options, params: Iterable[Any], defaults: dict[str, Any]):
        self._options = options
        self._groups: list[Group] = []
        super().__init__(params, defaults)

    def _patch_step_function(self) -> None:
        """Wraps `step` in torch's hooks, and in what keeps Dynamo out of it, once a class."""
        super()._patch_step_function()
        cls = type(self)
        if not hasattr(cls.step, "_torchdynamo_disable"):
            cls.step = torch.compiler.disable(cls.step, reason=_NO_DYNAMO)  # pyright: ignore[reportAttributeAccessIssue] -- typed as the method

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, with a tree and a state of its own.

        Args:
          param_group: `{"params": ..., **hyperparameters}`.

        Raises:
          ValueError: see the class; the optimizer is unchanged.
        """
        self._follow()
        params = param_group.get("params") if isinstance(param_group, dict) else None
        if isinstance(params, Iterable) and not isinstance(params, (Tensor, set)):
            param_group["params"] = params = list(params)
            if len({id(p[1] if isinstance(p, tuple) else p) for p in params}) < len(params):
                raise ValueError("TorchBridge: a parameter appears twice in one parameter group")
        given = set(param_group)
        super().add_param_group(param_group)
        added = False
        try:
            change = self._adopted(len(self._groups), self.param_groups[-1], given)
            added = True
        finally:
            if not added:
                self.param_groups.pop()
        self._groups.append(change[0]._replace(tree=None))
        self._write({len(self._groups) - 1: change})

    @outside_inference_mode
    def _adopted(self, index: int, group: dict[str, Any], given: set[str]) -> Change:
        where = f"TorchBridge: param group {index}"
        return adopted(self._options, group, given, self.defaults, where)

    # ---- writing ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _writing(self) -> Generator[None]:
        """Marks the state as torn unless all inside is done."""
        before, self._torn = self._torn, True
        yield
        self._torn = before

    def _write(self, changes: Mapping[int, Change]) -> None:
        """Makes changed groups those of the optimizer, and writes their state."""
        with self._writing():
            for index, (group, leaves) in changes.items():
                if old := self._groups[index].tree:
                    old.clear(self.state)
                if group.tree:
                    group.tree.store(self.state, leaves)
                self._groups[index] = group

    def _leaves(self, index: int) -> list[Tensor]:
        """The leaves of a group's state; what was removed from `optimizer.state` is made again, as in torch."""
        group = self._groups[index]
        try:
            return group.tree.leaves(self.state) if group.tree else []
        except KeyError:
            where = f"TorchBridge: param group {index}"
            self._write({index: group.mended(self.state, where)})
            return self._tree(index).leaves(self.state)

    def _synced(self) -> list[tuple[int, list[Tensor], GroupTree]]:
        """Index, state and tree of every group that has parameters, with the group's values filled in."""
        self._follow()
        found = []
        for index, group in enumerate(self.param_groups):
            leaves = self._leaves(index)
            if tree := self._groups[index].tree:
                tree.hyperparameters.sync(group, f"TorchBridge: param group {index}")
                found.append((index, leaves, tree))
        return found

    def _is_loaded(self) -> None:
        self._groups = [group._replace(is_initial=False) for group in self._groups]

    def _sync_betas(self) -> None:
        for own, group in zip(self._groups, self.param_groups, strict=True):
            if own.tree:
                own.tree.hyperparameters.sync_betas(group)

    # ---- groups that others changed --------------------------------------------------------

    def _follow(self) -> None:
        """Takes over what was done to the groups by hand since the last call; see `bridges.following`."""
        if self._torn:
            raise RuntimeError(
                "TorchBridge: an earlier step was interrupted while it wrote, so some parameters and entries of the "
                "state are updated and others not; load a checkpoint, of the model and with `load_state_dict`"
            )
        self._take_over_groups()

    @outside_inference_mode
    def _take_over_groups(self) -> None:
        self._restore_trees()
        known = [group.known for group in self._groups]
        if unchanged(self.param_groups, known):
            return
        groups = list(self.param_groups)
        check_groups(groups)
        before = matches(groups, known)
        origin: dict[Tensor, Tensor] = {}
        found: list[Any] = [None] * len(groups)
        # Nothing is written until all groups are found to be right.
        for i, (group, index) in enumerate(zip(groups, before, strict=True)):
            if index is not None:
                where = f"TorchBridge: param group {i}, which was changed by hand"
                own = origins(group, known[index], where)
                found[i] = self._groups[index].followed(group, own, self.state, where)
                origin |= own
        added = [i for i, index in enumerate(before) if index is None]
        self.param_groups[:] = [groups[i] for i in range(len(groups)) if i not in added]
        try:
            for i in added:
                given = set(groups[i])
                super().add_param_group(groups[i])
                found[i] = self._adopted(i, groups[i], given)
        finally:
            self.param_groups[:] = groups
        with self._writing():
            kept = {id(new.tree) for new, _ in found}
            for old in self._groups:
                if old.tree and id(old.tree) not in kept:
                    old.tree.clear(self.state)
            self._move_entries(origin)
            self._groups = [new._replace(tree=None) for new, _ in found]
            self._write(dict(enumerate(found)))

    def _move_entries(self, origin: Mapping[Tensor, Tensor]) -> None:
        """What is kept beside the chain's state goes on with the parameter, or goes with it."""
        for p, q in origin.items():
            if p is not q and (rest := self.state.pop(q, None)):
                self.state[p] = {**rest, **self.state[p]}
        inside = {id(p) for group in self.param_groups for p in group["params"]}
        for key in [k for k in self.state if isinstance(k, Tensor) and id(k) not in inside]:
            del self.state[key]

    # ---- before a step ---------------------------------------------------------------------

    def _taking_part(self, has_loss: bool) -> list[int]:
        """The groups that have a gradient here or elsewhere, after parameters joined them and moved between tiers.

        All gradients and hyperparameters are checked before anything is written.
        """
        found, changes = [], {}
        for index, group in enumerate(self._groups):
            where = f"TorchBridge: param group {index}"
            if joined := group.joined(self.state, where):
                changes[index], group = joined, joined[0]
            if group.tree and group.takes_part(has_loss, where):
                group.tree.hyperparameters.sync(self.param_groups[index], where)
                found.append(index)
        if changes:
            self._write(changes)
        tiered = [index for index in found if self._tree(index).tiers is not None]
        if any(self._is_due(index) for index in tiered):
            leaves = {index: self._leaves(index) for index in tiered}
            groups = {index: self._groups[index] for index in tiered}
            self._write(between_tiers(groups, leaves, has_loss))
        return found

    def _is_due(self, index: int) -> bool:
        try:
            return self._tree(index).is_due(self.state)
        except KeyError:
            self._leaves(index)
            return self._tree(index).is_due(self.state)

    def _prepared(self, index: int, loss: Any) -> Ready:
        """The step of a group that takes part."""
        leaves, group, tree = self._leaves(index), self._groups[index], self._tree(index)
        if one_device(tree.params) != tree.device:
            tree = tree.moved()
            leaves = [leaf.to(tree.device) for leaf in leaves]
            self._write({index: (group._replace(tree=tree), leaves)})
            leaves = self._leaves(index)  # hyperparameters have moved already
        where = f"TorchBridge: param group {index}"
        return self._groups[index].prepared(leaves, loss, where)

    def _tree(self, index: int) -> GroupTree:
        """The tree of a group that has one."""
        tree = self._groups[index].tree
        assert tree is not None
        return tree

    # ---- copies and pickles ----------------------------------------------------------------

    def _restore_trees(self) -> None:
        """Makes the trees that no copy or pickle holds."""
        for index, group in enumerate(self._groups):
            if group.tree is None and group.members:
                tiers = self.state[group.members[0]].get(TIERS)
                tiers = None if tiers is None else tuple(tiers.tolist())
                tree = group.tree_of(group.members, tiers)
                self._groups[index] = group = group._replace(tree=tree)
                if group.is_initial and tree.misfit(self._leaves(index)):  # cast since
                    self._write({index: group.cast(self.state)})

    def _without_trees(self) -> dict[str, Any]:
        self._follow()
        kept = {"defaults", "state", "param_groups", "_options"}
        members = [group.members for group in self._groups]
        initial = [group.is_initial for group in self._groups]
        own = {"_members": members, "_initial": initial}
        return {name: self.__dict__[name] for name in kept} | own

    def __getstate__(self) -> dict[str, Any]:
        try:
            pickle.dumps(self._options.chain)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise pickle.PicklingError(
                f"TorchBridge: its chain cannot be pickled ({error}); make the bridge with a function that returns the "
                "chain, such as functools.partial(optax.adamw, 1e-3), or save its state_dict()"
            ) from error
        # No class of ours but the bridge: its pickles outlive how the files are cut.
        return {**self._without_trees(), "_options": tuple(self._options._replace(meant=None))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        options, members = Options(*state.pop("_options")), state.pop("_members")
        state.pop("_known", None)
        initial = state.pop("_initial", [False] * len(members))  # earlier versions have none
        super().__setstate__(state)
        self._options = options if options.meant else options._replace(meant=Meant())
        self._groups = [
            Group(self._options, Known.of(group), list(own), None, fresh)
            for group, own, fresh in zip(self.param_groups, members, initial, strict=True)
        ]

    def __copy__(self) -> Self:
        new = type(self).__new__(type(self))
        new.__setstate__(self._without_trees())
        new._is_loaded()  # a step of either is one of both
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self._without_trees(), memo))
        groups = zip(new.param_groups, self.param_groups, strict=True)
        pairs = [zip(a["params"], b["params"], strict=True) for a, b in groups]
        assert new._options.meant is not None
        new._options.meant.replaced(dict(itertools.chain.from_iterable(pairs)))
        return new
