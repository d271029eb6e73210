"""TorchBridge: any gradient transformation, ours or optax's, as a native torch optimizer."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch

from chainrule.bridges import loading
from chainrule.bridges.checks import autocast_off, check_order, outside_inference_mode
from chainrule.bridges.engines import COMPILE
from chainrule.bridges.explain import explain_group
from chainrule.bridges.following import Known
from chainrule.bridges.group_tree import Options
from chainrule.bridges.grouped_optimizer import GroupedOptimizer
from chainrule.bridges.in_jax import jax_state
from chainrule.bridges.matching import loaded, marked
from chainrule.bridges.meant import Meant
from chainrule.bridges.param_group import Change
from chainrule.bridges.ready_step import Ready
from chainrule.bridges.step.tiers import gates_logged
from chainrule.bridges.tier_moves import in_tiers_of
from chainrule.bridges.torch_adam import from_torch_adam
from chainrule.transforms import metrics
from chainrule.transforms._checks import check_choice

Steps: TypeAlias = list[tuple[int, Ready]]
"""Groups that take part in a step, and the step of each."""


class TorchBridge(GroupedOptimizer):
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

    *Sharding.* Parameters may be DTensors (`fully_shard`, tensor parallelism, both): every rank works on its part, and
    the result is that of one process. See docs/scaling.md.

    *CUDA graphs.* With `compile="reduce-overhead"` the step is captured and replayed; rates, gradients, state and
    parameters may change as ever. `explain()` counts steps replayed and launched; see docs/guide/gpu.md.

    *Pickling* needs a chain that can be pickled, which closures cannot: give a function that makes it, such as
    `functools.partial(optax.adamw, 1e-3)`. `copy.deepcopy` and `state_dict` take any chain.

    Args:
      chain: a gradient transformation, or a function without arguments that returns one.
      params: parameters, parameter groups, or `named_parameters()`.
      compile: run the step through Inductor instead of op by op. `"reduce-overhead"`: on CUDA also as a CUDA graph,
        which the host launches at once; elsewhere as True.
      engine: `"torch"`, or `"xla"`: JAX computes the step on tensors exchanged over DLPack, for chains that hold a
        primitive without a lowering.
      rounding: None, round to nearest, or `"stochastic"`.
      **group_defaults: hyperparameters by the names of the group's keys, for groups that do not set them.

    Raises:
      ValueError: a key that is no hyperparameter, a value out of bounds, no or repeated parameters, several devices.
      TypeError: complex or FSDP1 parameters, a chain whose state changes shape or that evaluates the loss itself.
      NotImplementedError: DTensors with `engine="xla"`, on CUDA with `compile="reduce-overhead"`, or on meshes that
        are no parts of one.
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

    def __init__(
        self,
        chain: Any,
        params: Iterable[Any],
        *,
        compile: bool | str = False,
        engine: str = "torch",
        rounding: str | None = None,
        **group_defaults: Any,
    ):
        check_order(chain, params)
        check_choice("TorchBridge", "compile", compile, COMPILE)
        check_choice("TorchBridge", "engine", engine, ("torch", "xla"))
        check_choice("TorchBridge", "rounding", rounding, (None, "stochastic"))
        if compile and engine == "xla":
            raise ValueError('TorchBridge: `compile` is for engine="torch"; XLA always compiles')
        meant = Meant()
        options = Options(chain, compile, engine, rounding, meant)
        super().__init__(options, params, dict(group_defaults))
        meant.check(p for group in self.param_groups for p in group["params"])

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
          RuntimeError: with `compile="reduce-overhead"`, a step that no graph can hold, since it waits for the device.
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
        with autocast_off(own.members[0] for own in self._groups if own.members):
            self._run(loss)
        return loss

    def _run(self, loss: Any) -> None:
        self._finish(self._ready(loss))

    @outside_inference_mode
    def _ready(self, loss: Any) -> Steps:
        """A step of which all is checked, joined, moved between tiers and compiled; no parameter has been written."""
        for index, group in enumerate(self._groups):
            tree = group.tree
            if tree and (group.is_initial or tree.device.type == "meta") and tree.is_stale():
                self._leaves(index)
                self._write({index: self._groups[index].cast(self.state)})
        found = self._taking_part(loss is not None)
        return [(index, self._prepared(index, loss)) for index in found]

    @outside_inference_mode
    def _finish(self, ready: Steps) -> None:
        with gates_logged(lambda: [tree.state(leaves) for _, leaves, tree in self._synced()]):
            self._torn = True
            for index, run in ready:
                if run():
                    self._groups[index] = self._groups[index].stepped(self.state)
            self._torn = False

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`: tensors and numbers only, for any way of saving."""
        self._follow()
        for index in range(len(self._groups)):
            self._leaves(index)
        self._sync_betas()
        state_dict = super().state_dict()
        state_dict["param_groups"] = [marked(group) for group in state_dict["param_groups"]]
        return state_dict

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
        loading.check_layout(state_dict, "TorchBridge: the loaded state dict")
        saved_groups = copy.deepcopy(state_dict["param_groups"])
        if len(saved_groups) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        found = []
        for index, saved in enumerate(saved_groups):
            where = f"TorchBridge: param group {index} of the loaded state dict"
            leaves, state = self._leaves(index), state_dict["state"]
            found.append(loading.from_group(self._groups[index], leaves, saved, state, where))
        with self._writing():
            self._write({index: change for index, (change, _) in enumerate(found)})
            for index, (_, copies) in enumerate(found):
                loading.carry_out(copies)
                group = loaded(self.param_groups[index], saved_groups[index])
                self.param_groups[index] = group
                self._groups[index] = self._groups[index]._replace(known=Known.of(group))
        self._is_loaded()
        self._torn = False
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def jax_state(self) -> Any:
        """The chain's state as JAX arrays, with which the same chain goes on in JAX.

        Returns:
          The state of the only group, or a list with the state of each.
        """
        states = [jax_state(tree, leaves) for _, leaves, tree in self._synced()]
        return states[0] if states and len(self.param_groups) == 1 else states

    def load_jax_state(self, state: Any) -> None:
        """Takes over the state of a run in JAX whose parameters are this group's tree, with the tiers that it has.

        Args:
          state: as `jax_state` returns it. Parameters are not part of it.

        Raises:
          ValueError: structure or shapes differ; the message names the entry, and the optimizer is unchanged.
        """
        self._follow()
        states = [state] if len(self.param_groups) == 1 else list(state)
        copies: loading.Copies = []
        values: list[tuple[dict[str, Any], dict[str, float | int]]] = []
        moved: dict[int, Change] = {}
        for (index, leaves, tree), new in zip(self._synced(), states, strict=True):
            group, leaves = change = in_tiers_of(self._groups[index], leaves, new)
            if group.tree and group.tree is not tree:
                tree, moved[index] = group.tree, change
            own, hyperparams = loading.from_jax(
                tree, leaves, new, f"load_jax_state: param group {index}"
            )
            copies += own
            values.append((self.param_groups[index], hyperparams))
        with self._writing():
            self._write(moved)
            loading.carry_out(copies)
            for group, hyperparams in values:
                group.update(hyperparams)
        self._is_loaded()
        self._sync_betas()

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
        copies = from_torch_adam(state_dict, self.param_groups, self._synced())
        with self._writing():
            loading.carry_out(copies)
        self._is_loaded()

    def metrics(self) -> Any:
        """What the chain knows of the run: `chainrule.metrics` of its state, as torch tensors.

        Returns:
          The dict of the only group, or a list with the dict of each.
        """
        found = [metrics(tree.state(leaves)) for _, leaves, tree in self._synced()]
        return found[0] if found and len(self.param_groups) == 1 else found

    def explain(self, passes: bool = False) -> str:
        """What the chain became: operations by link, bytes of the state by field, how it runs.

        Args:
          passes: whether to say too what each pass of the lowering did to the program.
        """
        groups = self._synced()
        return "\n\n".join(explain_group(*group, passes=passes) for group in groups)
