"""TorchBridge: any gradient transformation, ours or optax's, as a native torch optimizer."""

import contextlib
import copy
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import torch
from torch import Tensor

from chainrule.bridges.checks import (
    autocast_off,
    check_flags,
    check_gradients,
    check_not_meta,
    check_order,
    check_params,
    is_flag,
    outside_inference_mode,
)
from chainrule.bridges.explain import explain_group
from chainrule.bridges.following import (
    Known,
    check_groups,
    origins,
    places,
    same,
    taken_over,
    unchanged,
)
from chainrule.bridges.group_tree import GroupTree, Options, pair
from chainrule.bridges.loading import (
    Plan,
    carry_out,
    check_layout,
    from_jax,
    from_state_dict,
    from_torch_adam,
    tiers_in,
)
from chainrule.bridges.lowering.runtime import Step
from chainrule.bridges.matching import as_saved, is_by_name, saved_ids
from chainrule.bridges.meant import Meant
from chainrule.bridges.scalars import apart
from chainrule.bridges.tiers import gates_logged, retiered, tiers_of
from chainrule.transforms import metrics
from chainrule.transforms._checks import check_choice

_NO_DYNAMO = "the step of a TorchBridge is a traced program already; TorchBridge(..., compile=True) compiles it"
_TIERS = "tiers"  # the entry of a tiered state's assignment

# Keys that torch and its schedulers keep in a group; other numbers must be hyperparameters of the chain.
_TORCH_KEYS = {
    "params", "param_names", "betas", "differentiable", "initial_lr", "max_lr", "min_lr", "swa_lr",
    "base_momentum", "max_momentum", "initial_momentum",
}  # fmt: skip


class TorchBridge(torch.optim.Optimizer):
    r"""Runs a gradient transformation as a `torch.optim.Optimizer`, without JAX at step time.

    The chain is traced once for each parameter group and lowered to torch. Each group is one tree with its own state: a
    dict by name if `params` are `named_parameters()`, so that chains route by name, else a list in order.

    *Groups.* The keys of a group are the chain's live hyperparameters (`chainrule.hyperparams`; those of
    `optax.inject_hyperparams` too), `learning_rate` under torch's name `lr`, and `betas` beside `b1` and `b2` where the
    chain has both. They may be set at any time, by hand or by a scheduler, and take effect at the next step without a
    retrace. A chain whose learning rate is fixed or a schedule gets `lr` as a factor on its updates, 1 at first.
    What others do to the groups by hand is followed at the next call: tensors that took the place of others (by name,
    else by position) go on with their state, those taken out of a list or popped with their group lose it, new ones
    join. What cannot be told apart is refused.

    *Missing gradients.* A parameter whose gradient is None in a step keeps its value and its state. Whatever belongs to
    the group goes on: its step count, and in a chain that couples parameters (a global norm) the missing gradient
    counts as zero. If all gradients of a group are None, the group is left alone. A parameter that is frozen when the
    bridge is made has no state until its first gradient; then it joins its group, under the group's step count.

    *State.* `optimizer.state[p]` holds the tensors that belong to `p` under the names of the chain's fields (`mu`,
    `nu`); what belongs to the whole group (`count`) is kept with its first parameter. A group whose state is cleared
    starts afresh at its next step, and so does a parameter whose state is removed, under the group's count. Until the
    first step, dtype and shape of a parameter may change (`model.to(torch.bfloat16)`), and it may leave the device
    `meta`.

    *Flags* of torch's optimizers (`foreach`, `fused`, `capturable`, `maximize`, `amsgrad`) may be False or None.

    *Rounding.* `rounding="stochastic"` hands the chain the gradients of bfloat16 parameters as float32, adds its
    updates in float32 and rounds up or down at random, so that the expectation is exact. The bits are a hash of the
    seed that `torch.manual_seed` set when the bridge was made and of the step; both are part of the state.

    *Pickling* needs a chain that can be pickled, which closures cannot: give a function that makes it, such as
    `functools.partial(optax.adamw, 1e-3)`. `copy.deepcopy` and `state_dict` take any chain.

    Args:
      chain: a gradient transformation, or a function without arguments that returns one.
      params: parameters, parameter groups, or `named_parameters()`.
      compile: run the step through Inductor instead of op by op.
      engine: `"torch"`, or `"xla"`: JAX computes the step on tensors exchanged over DLPack, for chains that hold a
        primitive without a lowering.
      rounding: None, round to nearest, or `"stochastic"`.
      **group_defaults: hyperparameters by the names of the group's keys, for groups that do not set them.

    Raises:
      ValueError: a key that is no hyperparameter, a value out of bounds, no or repeated parameters, several devices in
        one group.
      TypeError: complex parameters, DTensors, a chain whose state changes shape or that evaluates the loss itself.
      UnsupportedPrimitive: the chain needs `engine="xla"`.

    >>> import optax
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = TorchBridge(optax.inject_hyperparams(optax.sgd)(0.5, momentum=0.9), [weight])
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0., 0.])
    >>> optimizer.param_groups[0]["lr"], optimizer.state[weight]["trace"]
    (0.5, tensor([ 2., -4.]))
    """

    _torn = False  # whether a write began and did not end

    def __init__(
        self,
        chain: Any,
        params: Iterable[Any],
        *,
        compile: bool = False,
        engine: str = "torch",
        rounding: str | None = None,
        **group_defaults: Any,
    ):
        check_order(chain, params)
        check_choice("TorchBridge", "engine", engine, ("torch", "xla"))
        check_choice("TorchBridge", "rounding", rounding, (None, "stochastic"))
        if compile and engine == "xla":
            raise ValueError('TorchBridge: `compile` is for engine="torch"; XLA always compiles')
        self._options = Options(chain, compile, engine, rounding, Meant())
        self._trees: list[GroupTree | None] = []
        self._members: list[list[Tensor]] = []
        self._known: list[Known] = []
        super().__init__(params, dict(group_defaults))
        self._options.meant.check(p for group in self.param_groups for p in group["params"])

    # ---- groups ----------------------------------------------------------------------------

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
        group = self.param_groups[-1]
        added = False
        try:
            tree, leaves, members = self._adopt(len(self._trees), group, given)
            added = True
        finally:
            if not added:
                self.param_groups.pop()
        if tree:
            self._store(tree, leaves)
        self._trees.append(tree)
        self._members.append(members)
        self._known.append(Known.of(group))

    @outside_inference_mode
    def _adopt(
        self, index: int, group: dict[str, Any], given: set[str]
    ) -> tuple[GroupTree | None, list[Tensor], list[Tensor]]:
        """The tree of a new group, the leaves of its state, and its members; fills in the group's hyperparameters."""
        owner = f"TorchBridge: param group {index}"
        check_flags(group, owner)
        params, labels = group["params"], self._labels(group)
        check_params(params, labels)
        members = [p for p in params if p.requires_grad] or list(params)
        tree = self._make_tree(group, members) if members else None
        leaves: list[Tensor] = []
        values: dict[str, Any] = self.defaults
        if tree:
            leaves, values = tree.initial_state()
        if tree and tree.has_betas:
            if "betas" in group and not given & {"b1", "b2"}:
                group["b1"], group["b2"] = pair(group["betas"], owner)
            values["betas"] = group["betas"] = (
                group.get("b1", values["b1"]),
                group.get("b2", values["b2"]),
            )
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
            self.defaults.setdefault(key, value)
        if tree:
            tree.check_values(group, owner)
            tree.sync(group, owner)
            tree.is_initial = True
        return tree, leaves, members

    def _labels(self, group: dict[str, Any]) -> list[str]:
        names = group.get("param_names")
        return list(names) if names is not None else [str(i) for i in range(len(group["params"]))]

    def _make_tree(
        self, group: dict[str, Any], members: Sequence[Tensor], tiers: Any = None
    ) -> GroupTree:
        label = dict(zip(group["params"], self._labels(group), strict=True))
        labels = [label[p] for p in members]
        return GroupTree(self._options, members, labels, is_by_name(group), tiers)

    def _tree(self, index: int) -> GroupTree | None:
        """The tree of a group; made again after unpickling."""
        members = self._members[index]
        if self._trees[index] is None and members:
            tiers = self.state[members[0]].get(_TIERS)
            tiers = None if tiers is None else tuple(tiers.tolist())
            self._trees[index] = self._make_tree(self._known[index].restored(), members, tiers)
        return self._trees[index]

    def _replace(self, index: int, tree: GroupTree, leaves: Sequence[Tensor]) -> None:
        """Makes `tree` the tree of a group, and `leaves` its state."""
        inside = set(tree.params)
        with self._writing():
            if old := self._trees[index]:
                self._clear(old)
            self._store(tree, leaves)
            self._trees[index] = tree
            self._members[index] = [p for p in self.param_groups[index]["params"] if p in inside]

    def _clear(self, tree: GroupTree) -> None:
        for home in tree.homes:
            if home:
                self.state[home[0]].pop(home[1], None)
        self.state[tree.head].pop(_TIERS, None)

    def _store(self, tree: GroupTree, leaves: Sequence[Tensor]) -> None:
        for home, leaf in zip(tree.homes, leaves, strict=True):
            if home:
                self.state[home[0]][home[1]] = leaf
        if tree.tiers is not None:  # static in JAX; what a saved state needs to be loaded
            self.state[tree.head][_TIERS] = torch.tensor(tree.tiers, device="cpu")

    def _leaves(self, index: int) -> list[Tensor]:
        """The leaves of a group's state; what was removed from `optimizer.state` is made again, as in torch."""
        tree: Any = self._tree(index)
        try:
            return tree.leaves(self.state)
        except KeyError:
            self._restart(index, tree)
            return self._trees[index].leaves(self.state)  # pyright: ignore

    def _restart(self, index: int, tree: GroupTree) -> None:
        """Makes the state of a group again where all of it, or all of a parameter's, was removed."""
        gone = {p for p in tree.keepers if not self.state.get(p)}
        if len(gone) == len(tree.keepers):
            if tree.tiers is not None:
                tree = self._make_tree(self.param_groups[index], self._members[index])
            self._replace(index, tree, tree.initial_state()[0])
            for p in gone:  # where there is nothing, there is no entry
                if not self.state[p]:
                    del self.state[p]
            tree.is_initial = True
            return
        label = dict(zip(tree.params, tree.labels, strict=True))
        made = list(zip(tree.slots, tree.homes, tree.initial_state()[0], strict=True))
        missing = [
            (s, *home, leaf)
            for s, home, leaf in made
            if home and home[1] not in self.state[home[0]]
        ]
        for slot, p, name, _ in missing:
            if p not in gone or slot.owner is None:
                raise RuntimeError(
                    f"TorchBridge: param group {index}: `optimizer.state` has no `{name}` of parameter {label[p]} any "
                    "more; clear all of the group's to start afresh, or load a state dict"
                )
        for _, p, name, leaf in missing:
            self.state[p][name] = leaf

    def _renew(self, index: int) -> None:
        """Makes tree and state of a group again that has made no step, for parameters that were cast or left `meta`."""
        old = self._leaves(index)
        new = self._make_tree(self.param_groups[index], self._members[index])
        check_params(new.params, new.labels)
        leaves, _ = new.initial_state()
        if self._options.rounding and not old[-1].is_meta:
            leaves[-1] = old[-1].to(new.device)  # the seed is of when the bridge was made
        self._replace(index, new, leaves)
        new.is_initial = True

    def _with_state(
        self,
        old: GroupTree | None,
        group: dict[str, Any],
        members: Sequence[Tensor],
        origin: Mapping[Tensor, Tensor],
        where: str,
    ) -> tuple[GroupTree, list[Tensor]]:
        """A tree of `members` and the leaves of its state: those that `old` has for their origins, others fresh."""
        new = self._make_tree(group, members)
        if old and old.tiers is not None and new.tiers is not None:
            tier_of = dict(zip(old.params, old.tiers, strict=True))
            pairs = zip(new.params, new.tiers, strict=True)
            tiers = tuple(tier_of.get(origin.get(p, p), tier) for p, tier in pairs)
            if tiers != new.tiers:
                new = self._make_tree(group, members, tiers)
        leaves, values = new.initial_state()
        if old:
            before = old.leaves(self._entries(old, origin))
            leaves = taken_over(old, before, new, leaves, origin, where)
            new.is_initial = old.is_initial
        for key, value in values.items():
            group.setdefault(key, value)
        return new, leaves

    def _entries(
        self, tree: GroupTree, origin: Mapping[Tensor, Tensor]
    ) -> dict[Tensor, dict[str, Tensor]]:
        """The state by the parameters of a tree, of which others may have moved some to those that took their place."""
        heir = {q: p for p, q in origin.items()}
        return {q: self.state.get(q) or self.state.get(heir.get(q, q), {}) for q in tree.params}

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
        if unchanged(self.param_groups, self._known):
            return
        groups = list(self.param_groups)
        check_groups(groups)
        before = places(groups, self._known)
        origin: dict[Tensor, Tensor] = {}
        found: list[Any] = [None] * len(groups)
        # Nothing is written until all groups are found to be right.
        for i, (group, place) in enumerate(zip(groups, before, strict=True)):
            if place is not None:
                where = f"TorchBridge: param group {i}, which was changed by hand"
                own = origins(group, self._known[place], where)
                found[i] = self._followed(group, place, own, where)
                origin |= own
        added = [i for i, place in enumerate(before) if place is None]
        self.param_groups[:] = [groups[i] for i in range(len(groups)) if i not in added]
        try:
            for i in added:
                given = set(groups[i])
                super().add_param_group(groups[i])
                found[i] = self._adopt(i, groups[i], given)
        finally:
            self.param_groups[:] = groups
        kept = {id(tree) for tree, _, _ in found}
        with self._writing():
            for tree in self._trees:
                if tree and id(tree) not in kept:
                    self._clear(tree)
            self._move_entries(origin)
            for tree, leaves, _ in found:
                if tree:
                    self._store(tree, leaves)
            self._trees = [tree for tree, _, _ in found]
            self._members = [members for _, _, members in found]
            self._known = [Known.of(group) for group in groups]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Marks the state as torn unless all inside is done."""
        before, self._torn = self._torn, True
        yield
        self._torn = before

    def _followed(
        self, group: dict[str, Any], place: int, origin: Mapping[Tensor, Tensor], where: str
    ) -> tuple[GroupTree | None, list[Tensor], list[Tensor]]:
        """The tree of a group that was at `place`, the leaves of its state, and its members."""
        seen, old = self._known[place], self._tree(place)
        self._options.meant.replaced(origin)
        for key, value in seen.group.items():  # where the dict is another one
            if key != "param_names":
                group.setdefault(key, value)
        labels = self._labels(group)
        check_params(group["params"], labels)
        inside = set(self._members[place])
        members = [p for p in group["params"] if origin.get(p) in inside]
        if old is None or not members:
            return None, [], []
        order = {q: p for p, q in origin.items()}
        params = [order[q] for q in old.params if q in order]
        label = dict(zip(group["params"], labels, strict=True))
        own = [label[p] for p in params]
        if old.keepers and not any(self._entries(old, origin).values()):  # it was cleared too
            tree = self._make_tree(group, members)
            return tree, tree.initial_state()[0], members
        in_order = own == old.labels if old.named else same(params, members)
        if in_order and [p.dtype for p in params] == old.dtypes and old.named == is_by_name(group):
            tree = old.bound_to(params, members[0], own)
            return tree, old.leaves(self._entries(old, origin)), members
        return *self._with_state(old, group, members, origin, where), members

    def _move_entries(self, origin: Mapping[Tensor, Tensor]) -> None:
        """What is kept beside the chain's state goes on with the parameter, or goes with it."""
        for p, q in origin.items():
            if p is not q and (rest := self.state.pop(q, None)):
                self.state[p] = {**rest, **self.state[p]}
        inside = {id(p) for group in self.param_groups for p in group["params"]}
        for key in [k for k in self.state if isinstance(k, Tensor) and id(k) not in inside]:
            del self.state[key]

    def _is_due(self, index: int) -> bool:
        tree: Any = self._tree(index)
        try:
            return tree.is_due(self.state)
        except KeyError:
            self._leaves(index)
            return self._trees[index].is_due(self.state)  # pyright: ignore

    def _retier(self) -> None:
        """Moves parameters between tiers where a policy says so; see `chainrule.retier`."""
        trees = [(i, tree) for i, tree in enumerate(self._trees) if tree and tree.tiers is not None]
        trees = [(i, tree) for i, tree in trees if any(p.grad is not None for p in tree.params)]
        if not any(self._is_due(index) for index, _ in trees):
            return
        states, grads, params = [], [], []
        for index, tree in trees:
            given = [p.grad for p in tree.params]
            check_gradients(tree.params, given, tree.dtypes, tree.shapes, tree.labels)
            tree.sync(self.param_groups[index], f"TorchBridge: param group {index}")
            states.append(tree.jax_state(tree.leaves(self.state)))
            grads.append(tree.jax_tree(given))
            params.append(tree.jax_tree(tree.params))
        moved = retiered(states, grads, params)
        new_trees = []
        for (index, tree), old, state in zip(trees, states, moved, strict=True):
            tiers = tiers_of(state)
            new = tree
            if tiers != tree.tiers:
                new = self._make_tree(self.param_groups[index], self._members[index], tiers)
            own = tree.leaves(self.state)[len(jax.tree.leaves(apart(old))) :]
            new_trees.append((index, new, [*new.torch_leaves(state), *own]))
        with self._writing():
            for index, tree, leaves in new_trees:
                self._replace(index, tree, leaves)

    # ---- the step --------------------------------------------------------------------------

    def _patch_step_function(self) -> None:
        """Wraps `step` in torch's hooks, and in what keeps Dynamo out of it, once a class."""
        super()._patch_step_function()
        cls = type(self)
        if not hasattr(cls.step, "_torchdynamo_disable"):
            cls.step = torch.compiler.disable(cls.step, reason=_NO_DYNAMO)  # pyright: ignore

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient.

        Args:
          closure: evaluates the model, calls backward and returns the loss, which the chain receives as `value`.

        Returns:
          What the closure returned, or None.

        Raises:
          RuntimeError: a gradient that is sparse or of another dtype than its parameter; a parameter or an entry of the
            state that is not what it was; parameters on the device `meta` without gradients.
          ValueError: a hyperparameter out of bounds; no closure for a chain that reads the loss. Nothing has been
            written then. What interrupts a step later (`KeyboardInterrupt`, memory) leaves it half done: the bridge
            then refuses to go on, with a `RuntimeError`, until a state dict is loaded.
        """
        self._follow()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._follow()
        with autocast_off(own[0] for own in self._members if own):
            self._update(loss)
        return loss

    @outside_inference_mode
    def _update(self, loss: Any) -> None:
        for index, tree in enumerate(self._trees):
            if tree and (tree.is_initial or tree.device.type == "meta") and tree.is_stale():
                self._renew(index)
        self._retier()
        ready = [self._prepare(index, loss) for index in range(len(self.param_groups))]
        with gates_logged(lambda: [tree.state(leaves) for _, leaves, tree in self._synced()]):
            self._torn = True
            for tree, work in zip(self._trees, ready, strict=True):
                if work is not None:
                    run, inputs = work
                    run(inputs)
                    tree.stepped(self.state)  # pyright: ignore
            self._torn = False

    def _prepare(
        self, index: int, loss: Any
    ) -> tuple[Callable[[list[Tensor]], None], list[Tensor]] | None:
        """The program of a group and its inputs; None if no parameter has a gradient."""
        group, tree = self.param_groups[index], self._tree(index)
        if tree is None or len(tree.params) < len(group["params"]):
            inside = set(self._members[index])
            joining = [p for p in group["params"] if p not in inside and p.grad is not None]
            if joining:
                labels = [f"of shape {tuple(p.shape)}" for p in joining]
                dtypes, shapes = [p.dtype for p in joining], [p.shape for p in joining]
                check_gradients(joining, [p.grad for p in joining], dtypes, shapes, labels)
                inside.update(joining)
                members = [p for p in group["params"] if p in inside]
                where = f"TorchBridge: param group {index}"
                tree, leaves = self._with_state(tree, group, members, {}, where)
                self._replace(index, tree, leaves)
            if tree is None:
                return None
        grads: list[Any] = [p.grad for p in tree.params]
        absent = [i for i, g in enumerate(grads) if g is None]
        owner = f"TorchBridge: param group {index}"
        if len(absent) == len(grads):
            check_not_meta(tree.params, owner)
            return None
        check_gradients(tree.params, grads, tree.dtypes, tree.shapes, tree.labels)
        leaves, tree = self._leaves(index), self._trees[index]
        assert tree is not None
        if tree.params[0].device != tree.device:
            with self._writing():
                tree.move()
                leaves = [leaf.to(tree.device) for leaf in leaves]
                self._store(tree, leaves)
            leaves = tree.leaves(self.state)  # hyperparameters have moved already
        tree.check(leaves, owner)
        tree.sync(group, owner)
        run, extras = tree.program(loss)
        if isinstance(run, Step):  # compiled before anything is written
            run = run.ready(tree.device)
        params = tree.params
        tree.is_initial = False
        if absent:
            # The program runs on copies of what shall stay, which are then forgotten.
            kept = set(absent)
            params = [p.detach().clone() if i in kept else p for i, p in enumerate(params)]
            grads = [
                torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)
            ]
            leaves = [
                leaf.clone() if slot.owner in kept else leaf
                for leaf, slot in zip(leaves, tree.slots, strict=True)
            ]
        return run, [*params, *grads, *leaves, *extras]

    # ---- saving and loading ----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`: tensors and numbers only, for any way of saving."""
        self._follow()
        for index, (tree, group) in enumerate(zip(self._trees, self.param_groups, strict=True)):
            if tree:
                self._leaves(index)
                tree.sync_betas(group)
        return super().state_dict()

    @outside_inference_mode
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies a state dict of the same chain and shapes into this optimizer; going on equals not having stopped.

        Parameters are matched by name if both sides have names, else by position, and the chain goes on in the tree in
        which the state was made: a bridge without names takes those of the state; one with names, given a state
        without, keeps them beside `tree: "positions"` in its groups, and its chain knows the parameters by position.

        Args:
          state_dict: what `state_dict` returned.

        Raises:
          TypeError: it is no dict.
          ValueError: the state dict is incomplete, another chain's, of other names or in other shapes; the message
            names the entry, and the optimizer is unchanged.
        """
        self._take_over_groups()
        state_dict = copy.copy(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        check_layout(state_dict, "TorchBridge: the loaded state dict")
        saved_groups = copy.deepcopy(state_dict["param_groups"])
        if len(saved_groups) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        readings = [
            self._read(index, saved, state_dict["state"])
            for index, saved in enumerate(saved_groups)
        ]
        with self._writing():
            for index, (tree, leaves, plan) in enumerate(readings):
                if tree and tree is not self._tree(index):
                    self._replace(index, tree, leaves)
                carry_out(plan)
            for index, (group, saved) in enumerate(
                zip(self.param_groups, saved_groups, strict=True)
            ):
                known = as_saved(group, saved)
                fixed = {key: known[key] for key in ("params", "param_names") if key in known}
                self.param_groups[index] = {**known, **saved, **fixed}
            self._known = [Known.of(group) for group in self.param_groups]
        self._is_loaded()
        self._torn = False
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _read(
        self, index: int, saved: dict[str, Any], saved_state: dict[Any, Any]
    ) -> tuple[GroupTree | None, list[Tensor], Plan]:
        """The tree that the saved state of a group asks for, the leaves of its state, and what to copy into them."""
        where = f"TorchBridge: param group {index} of the loaded state dict"
        check_flags(saved, where)
        leaves = self._leaves(index) if self._tree(index) else []
        group, tree = self.param_groups[index], self._trees[index]
        ids = saved_ids(group, saved, where)
        group = as_saved(group, saved)
        entries = {
            p: dict(saved_state.get(k) or {}) for k, p in zip(ids, group["params"], strict=True)
        }
        tiers = tiers_in(entries.values(), _TIERS, where)
        inside = set(self._members[index])
        members = [p for p, entry in entries.items() if entry or p in inside]
        fits = (
            tree is not None
            and len(members) == len(inside)
            and (tree.tiers, tree.named) == (tiers, is_by_name(group))
        )
        if members and not fits:
            tree = self._make_tree(group, members, tiers)
            leaves, _ = tree.initial_state()
        if tree is None:
            return None, [], []
        if tiers is not None and tree.tiers is None:
            raise ValueError(f"{where} has tiers, this chain has none; is it of another chain?")
        return tree, leaves, from_state_dict(tree, leaves, saved, entries, where)

    def __getstate__(self) -> dict[str, Any]:
        try:
            pickle.dumps(self._options.chain)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise pickle.PicklingError(
                f"TorchBridge: its chain cannot be pickled ({error}); make the bridge with a function that returns the "
                "chain, such as functools.partial(optax.adamw, 1e-3), or save its state_dict()"
            ) from error
        return self._without_programs()

    def _without_programs(self) -> dict[str, Any]:
        self._follow()
        kept = {"defaults", "state", "param_groups", "_options", "_members", "_known"}
        return {name: value for name, value in self.__dict__.items() if name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_known", [Known.of(group) for group in self.param_groups])
        self._trees = [None] * len(self._members)

    def __copy__(self) -> "TorchBridge":
        new = type(self).__new__(type(self))
        new.__setstate__(self._without_programs())
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> "TorchBridge":
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self._without_programs(), memo))
        groups = zip(new.param_groups, self.param_groups, strict=True)
        pairs = [zip(a["params"], b["params"], strict=True) for a, b in groups]
        new._options.meant.replaced(dict(itertools.chain.from_iterable(pairs)))
        return new

    # ---- one state, two runtimes -----------------------------------------------------------

    def jax_state(self) -> Any:
        """The chain's state as JAX arrays, with which the same chain goes on in JAX.

        Returns:
          The state of the only group, or a list with the state of each.
        """
        states = [tree.jax_state(leaves) for _, leaves, tree in self._synced()]
        return states[0] if len(self.param_groups) == 1 else states

    def load_jax_state(self, state: Any) -> None:
        """Takes over the state of a run in JAX whose parameters are this group's tree.

        Args:
          state: as `jax_state` returns it. Parameters are not part of it.

        Raises:
          ValueError: structure or shapes differ; the message names the entry, and the optimizer is unchanged.
        """
        self._follow()
        states = [state] if len(self.param_groups) == 1 else list(state)
        plan: Plan = []
        values: list[tuple[dict[str, Any], dict[str, float | int]]] = []
        for (index, leaves, tree), new in zip(self._synced(), states, strict=True):
            copies, hyperparams = from_jax(
                tree, leaves, new, f"load_jax_state: param group {index}"
            )
            plan += copies
            values.append((self.param_groups[index], hyperparams))
        with self._writing():
            carry_out(plan)
            for group, hyperparams in values:
                group.update(hyperparams)
        self._is_loaded()
        for index, group in enumerate(self.param_groups):
            if tree := self._tree(index):
                tree.sync_betas(group)

    def load_torch_adam(self, state_dict: dict[str, Any]) -> None:
        """Takes over the moments and step count of a `torch.optim.Adam` or `AdamW` over the same parameters.

        Hyperparameters stay this bridge's: set them in its groups.

        Args:
          state_dict: the state dict of the torch optimizer.

        Raises:
          TypeError: it is no dict.
          ValueError: it is incomplete, the chain has no state with `mu` and `nu`, the shapes differ, or the parameters
            of a group differ in their number of steps; the optimizer is unchanged.
        """
        self._follow()
        check_layout(state_dict, "load_torch_adam: the state dict")
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [
            len(g["params"]) for g in self.param_groups
        ]:
            raise ValueError(
                "load_torch_adam: the state dict has other parameter groups than this optimizer"
            )
        plan: Plan = []
        for index, leaves, tree in self._synced():
            saved = dict(
                zip(self.param_groups[index]["params"], saved_groups[index]["params"], strict=True)
            )
            entries = [state_dict["state"].get(saved[p]) for p in tree.params]
            plan += from_torch_adam(tree, leaves, entries)
        with self._writing():
            carry_out(plan)
        self._is_loaded()

    def _is_loaded(self) -> None:
        for tree in self._trees:
            if tree:
                tree.is_initial = False

    # ---- looking inside --------------------------------------------------------------------

    def metrics(self) -> Any:
        """What the chain knows of the run: `chainrule.metrics` of its state, as torch tensors.

        Returns:
          The dict of the only group, or a list with the dict of each.
        """
        found = [metrics(tree.state(leaves)) for _, leaves, tree in self._synced()]
        return found[0] if len(self.param_groups) == 1 else found

    def explain(self) -> str:
        """What the chain became: operations by link, bytes of the state by field, how it runs."""
        return "\n\n".join(
            explain_group(index, leaves, tree) for index, leaves, tree in self._synced()
        )

    def _synced(self) -> list[tuple[int, list[Tensor], GroupTree]]:
        """Index, state and tree of every group that has parameters, with the group's values filled in."""
        self._follow()
        found = []
        for index, group in enumerate(self.param_groups):
            tree = self._tree(index)
            if tree:
                leaves, tree = self._leaves(index), self._trees[index]
                assert tree is not None
                tree.sync(group, f"TorchBridge: param group {index}")
                found.append((index, leaves, tree))
        return found
