"""One parameter group as a chain sees it: a tree of parameters, one state, one program."""

import copy
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from chainrule.bridges.checks import autocast_off, check_flags
from chainrule.bridges.layout import Slot, live_leaves, slots
from chainrule.bridges.lowering import Lowered, lower, to_jax, to_torch, torch_dtype
from chainrule.bridges.lowering.convert import physical_shape
from chainrule.bridges.lowering.release import dissolve_with
from chainrule.bridges.lowering.runtime import InPlace, make_step
from chainrule.bridges.meant import Meant
from chainrule.bridges.program import (
    BridgeState,
    Extras,
    Struct,
    Update,
    as_transformation,
    settled,
)
from chainrule.bridges.scalars import apart, together
from chainrule.bridges.tiers import tiered_states, tiers_of
from chainrule.bridges.xla_engine import make_xla_step, used_inputs, x64_if_wide
from chainrule.transforms import assign
from chainrule.transforms._checks import check_bounds

_HALF = (torch.bfloat16, torch.float16)
_MULTIPLIER = "lr"  # the key of the learning rate, or of the multiplier that stands in for it


class Options(NamedTuple):
    """What the user asked for when the bridge was made."""

    chain: Any
    compile: bool
    engine: str
    rounding: str | None
    meant: Meant


def _struct(tensor: Tensor) -> Struct:
    return Struct(tuple(tensor.shape), jnp.dtype(str(tensor.dtype).removeprefix("torch.")))


def _key(name: str) -> str:
    return _MULTIPLIER if name == "learning_rate" else name


def shortest(value: Tensor) -> float | int:
    """The Python number of a scalar tensor with as few digits as its dtype needs: 0.001, not 0.0010000000474974513."""
    number = value.item()
    if value.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return float(str(np.float32(number)))
    return number


def number_of(owner: str, key: str, value: Any, wait: bool) -> Any:
    """The number in a tensor, if it can be had without waiting for a device, or `wait`; anything else as it is.

    Raises:
      ValueError: a tensor of several elements or none.
    """
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(
            f"{owner}: `{key}` must be a number or a tensor of one element, got shape {tuple(value.shape)}"
        )
    return value.item() if wait or value.device.type == "cpu" else value


def check_number(owner: str, key: str, value: Any, dtype: torch.dtype = torch.float32) -> None:
    """Raises `TypeError` or `ValueError` for what is no number, or out of the bounds of the group's key, as it is or in
    the half-precision dtype that holds it."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{owner}: `{key}` must be a number or a tensor, got {value!r}")
    name = key.rpartition(".")[2]
    name = "learning_rate" if name == _MULTIPLIER else name
    held: Any = value
    if dtype in _HALF:
        held = torch.tensor(float(value), dtype=dtype, device="cpu").item()
    try:
        check_bounds(owner, **{name: value})
        check_bounds(owner, **{name: held})
    except ValueError as error:
        if dtype not in _HALF or held != 1:
            raise
        raise ValueError(
            f"{error}. Its chain keeps hyperparameters in {dtype}, where 0.999 is 1: optax.inject_hyperparams takes "
            "the dtype of the parameters; give it `hyperparam_dtype=jnp.float32`"
        ) from error


def pair(betas: Any, owner: str = "TorchBridge") -> tuple[Any, Any]:
    """`betas` of a group as (b1, b2).

    Raises:
      ValueError: it is no pair.
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{owner}: `betas` must be a pair (b1, b2), got {betas!r}")
    return betas[0], betas[1]


class GroupTree:
    """The tree, state layout and program of one parameter group.

    Attributes:
      params: the parameters in the order in which JAX flattens the tree.
      labels: what messages call them.
      dtypes, shapes: what they were when the chain was traced.
      keepers: the parameters under which the state is kept.
      is_initial: whether the state is known to be as `init` made it, no step since.
      head: the parameter that keeps what belongs to the whole group.
      device: the device of all of them.
      slots: the home of every leaf of the state.
      homes: for every leaf of the state the parameter and name it is kept under; None: a live hyperparameter.
      named: whether the tree is a dict by label, else it is a list.
      live: group key -> position of the hyperparameter's leaf in the state.
      reads_value: whether the chain reads the loss if it is given one.
      tiers: the tier of every parameter, or None if the chain has no tiers.
      lowered: the torch program, or None when XLA runs it.
    """

    def __init__(
        self,
        options: Options,
        params: Sequence[Tensor],
        labels: Sequence[str],
        named: bool,
        tiers: Sequence[int] | None = None,
    ):
        """Traces the chain; `labels` are the keys of the chain's tree if `named`."""
        self.options = options
        self.named = named
        self.tiers = tiers
        keys = labels if named else list(map(str, range(len(params))))
        self.chain = options.meant.told(
            as_transformation(options.chain), dict(zip(params, keys, strict=True))
        )
        places: Any = (
            dict(zip(labels, range(len(params)), strict=True))
            if named
            else list(range(len(params)))
        )
        order: list[int]
        order, self.params_structure = jax.tree.flatten(places)
        self.head = params[0]
        self.params = [params[i] for i in order]
        self.labels = [labels[i] for i in order]
        self.dtypes = [p.dtype for p in self.params]
        self.shapes = [p.shape for p in self.params]
        self.is_initial = False
        self.device = self._one_device()
        self._trace()
        state = jax.tree.unflatten(self.state_structure, self.state_avals)
        tree = (
            jax.tree.unflatten(self.params_structure, [None] * len(params))
            if named
            else self.params
        )
        self.slots = slots(state.chain, tree)
        if state.rounding is not None:
            self.slots.append(Slot(None, "rounding"))
        self._bind(self.params, self.head)
        numbered = self.state(range(len(self.slots)))
        self._tiered = next(iter(tiered_states(numbered)), None)  # positions in the place of leaves
        # The tiers' step count: its tensor, the version that was read, the number.
        self._steps: tuple[Tensor, int, int] | None = None
        self._checked: list[int] = []
        self._live_tensors: dict[str, Tensor] = {}
        self._filled: dict[str, Any] = {}
        self._place()

    def _bind(self, params: Sequence[Tensor], head: Tensor) -> None:
        self.params, self.head = list(params), head
        settable = set(self.live.values())
        self.homes = [
            None
            if i in settable
            else (self.head if slot.owner is None else self.params[slot.owner], slot.name)
            for i, slot in enumerate(self.slots)
        ]
        self.keepers = list(dict.fromkeys(home[0] for home in self.homes if home))
        index = {p: i for i, p in enumerate(self.keepers)}
        self._places = [home and (index[home[0]], home[1]) for home in self.homes]

    def bound_to(
        self, params: Sequence[Tensor], head: Tensor, labels: Sequence[str]
    ) -> "GroupTree":
        """This tree for other tensors of the same shapes and dtypes, in its order, without another trace."""
        new = copy.copy(self)
        new.labels = list(labels)
        new._bind(params, head)
        return new

    # ---- tracing ---------------------------------------------------------------------------

    def _one_device(self) -> torch.device:
        devices = {p.device for p in self.params}
        if len(devices) > 1:
            raise ValueError(
                f"TorchBridge: a parameter group lies on {' and '.join(sorted(map(str, devices)))}; a chain sees each "
                "group as one tree, so give every device a group of its own"
            )
        return devices.pop()

    def _trace(self) -> None:
        self._structs = [_struct(p) for p in self.params]
        params = jax.tree.unflatten(self.params_structure, self._structs)
        self._init: Lowered | None = None
        if self.options.engine == "torch":
            self._init = lower(self._initial, params, device=self.device)
            dissolve_with(self._init, self._init.graph)
            initial = jax.tree.unflatten(self._init.out_tree, self._init.out_avals)
        else:
            with x64_if_wide(params):
                initial = jax.eval_shape(self._initial, params)
        self.tiers = tiers_of(initial)
        rounding = Struct((2,), jnp.int32) if self.options.rounding else None
        live = live_leaves(jax.tree.structure(initial))

        multiplier = "learning_rate" not in live
        used, self.run, self.lowered, state = self._program(
            params, BridgeState(initial, rounding), multiplier
        )
        # A hyperparameter that the program does not read is a schedule's last value: not for the user to set.
        start = 2 * len(self._structs)
        settable = {name: leaf for name, leaf in live.items() if used[start + leaf]}
        if not multiplier and "learning_rate" not in settable:
            multiplier = True
            used, self.run, self.lowered, state = self._program(
                params, BridgeState(initial, rounding), multiplier
            )
        self.live = {_key(name): leaf for name, leaf in settable.items()}
        self.multiplier = multiplier
        self.reads_value = used[-1]
        self._run_without_value: InPlace | None = None
        self.state_avals, self.state_structure = jax.tree.flatten(state)

    def _initial(self, params: Any) -> Any:
        state = self.chain.init(params)
        return apart(state if self.tiers is None else assign(state, self.tiers, params))

    def _program(
        self, params: Any, state: BridgeState, multiplier: bool, value: bool = True
    ) -> tuple[list[bool], InPlace, Lowered | None, BridgeState]:
        """Which flat inputs the program reads, its in-place step, its graph, and the structs of its state."""
        update = Update(self.chain, multiplier, self.options.rounding is not None, value)
        scalar = Struct((), jnp.float32)
        extras = Extras(scalar, scalar)

        def trace_lowered(state: BridgeState):
            lowered = lower(
                *(update, params, params, state, extras),
                device=self.device,
                compiled=self.options.compile,
            )
            dissolve_with(lowered, lowered.graph)
            return lowered, jax.tree.unflatten(lowered.out_tree, lowered.out_avals)

        def trace_xla(state: BridgeState):
            used, result = used_inputs(update, params, params, state, extras)
            return used, result

        count = len(self._structs)
        if self.options.engine == "torch":
            lowered, state = settled(trace_lowered, params, state)
            targets = self._targets(count, len(jax.tree.leaves(state)))
            used = [bool(node.users) for node in lowered.graph.graph.find_nodes(op="placeholder")]
            return used, make_step(lowered, targets, compile=self.options.compile), lowered, state
        used, state = settled(trace_xla, params, state)
        targets = self._targets(count, len(jax.tree.leaves(state)))
        return used, make_xla_step(update, (params, params, state, extras), targets), None, state

    @staticmethod
    def _targets(count: int, leaves: int) -> list[int]:
        """New parameters renew the parameters, new state the state; the inputs are (params, grads, state, extras)."""
        return [*range(count), *range(2 * count, 2 * count + leaves)]

    # ---- state -----------------------------------------------------------------------------

    def _place(self) -> None:
        """Makes the scalars that are no part of `optimizer.state` on the device of the parameters."""
        for key, leaf in self.live.items():
            dtype = torch_dtype(self.state_avals[leaf].dtype)
            self._live_tensors[key] = torch.zeros((), dtype=dtype, device=self.device)
        self._multiplier = torch.ones((), dtype=torch.float32, device=self.device)
        self._value = torch.zeros((), dtype=torch.float32, device=self.device)
        self._filled.clear()

    def move(self) -> None:
        """Follows the parameters to another device."""
        self.device = self._one_device()
        self._trace()
        self._place()

    def initial_state(self) -> tuple[list[Tensor], dict[str, float | int]]:
        """The leaves of the state that `init` makes, and the hyperparameters in it by group key."""
        if self._init is not None:
            with autocast_off(self.params):
                leaves = list(self._init(*self.params))
            for i in self._init.passthrough:  # a state that starts as the parameters themselves
                leaves[i] = leaves[i].detach().clone()
        else:
            params = jax.tree.unflatten(self.params_structure, self._structs)
            with x64_if_wide(params):
                arrays = [
                    to_jax(p, aval) for p, aval in zip(self.params, self._structs, strict=True)
                ]
                state = self._initial(jax.tree.unflatten(self.params_structure, arrays))
                leaves = [to_torch(leaf, self.device) for leaf in jax.tree.leaves(state)]
        values = {key: shortest(leaf) for key, leaf in self._initial_values(leaves).items()}
        if self.multiplier:
            values[_MULTIPLIER] = 1.0
        if self.options.rounding:
            # int32 keeps the low bits of the seed that torch.manual_seed set
            seed = (torch.initial_seed() & 0x7FFF_FFFF, 0)
            leaves.append(torch.tensor(seed, dtype=torch.int32, device=self.device))
        leaves = [
            leaf.to(torch_dtype(aval.dtype))
            for leaf, aval in zip(leaves, self.state_avals, strict=True)
        ]
        return leaves, values

    def _initial_values(self, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
        if self.device.type != "meta":
            return {key: leaves[leaf] for key, leaf in self.live.items()}
        # Nothing on `meta` has a value; the hyperparameters depend on none.
        params = jax.tree.unflatten(self.params_structure, self._structs)
        only = list(self.live.values())
        values = lower(lambda p: [jax.tree.leaves(self._initial(p))[i] for i in only], params)
        return dict(zip(self.live, values(*self.params), strict=True))

    def is_stale(self) -> bool:
        """Whether a parameter has another dtype or shape, or has left `meta`, since the chain was traced."""
        left = self.device.type == "meta" and self.params[0].device != self.device
        return (
            left
            or any(p.dtype is not d for p, d in zip(self.params, self.dtypes, strict=True))
            or any(p.shape != s for p, s in zip(self.params, self.shapes, strict=True))
        )

    def leaves(self, state: dict[Tensor, dict[str, Tensor]]) -> list[Tensor]:
        """The leaves of the chain's state, from the optimizer's.

        Raises:
          KeyError: the optimizer's lacks one.
        """
        # A parameter's hash is a call: one for each, not for each leaf.
        entries = [state[p] for p in self.keepers]
        leaves = [entries[place[0]][place[1]] if place else None for place in self._places]
        for key, leaf in self.live.items():
            leaves[leaf] = self._live_tensors[key]
        return leaves  # pyright: ignore[reportReturnType]

    def check(self, leaves: Sequence[Tensor], owner: str) -> None:
        """Raises `RuntimeError` for an entry of the state that was replaced by one of another kind.

        A program relies on what it was compiled for. The entries are the same tensors in most steps.
        """
        found = list(map(id, leaves))
        if found == self._checked:
            return
        for leaf, aval, slot in zip(leaves, self.state_avals, self.slots, strict=True):
            want = torch_dtype(aval.dtype), physical_shape(aval), self.device
            got = leaf.dtype, tuple(leaf.shape), leaf.device
            if got != want:
                raise RuntimeError(
                    f"{owner}: state entry `{slot.name}` is {got[0]} {got[1]} on {got[2]}, expected "
                    f"{want[0]} {want[1]} on {want[2]}"
                )
        self._checked = found

    def is_due(self, state: dict[Tensor, dict[str, Tensor]]) -> bool:
        """Whether the policy of the chain's tiers may move parameters before the next update."""
        if self._tiered is None:
            return False
        count = self._count(state)
        known, version, steps = self._steps or (None, 0, 0)
        if known is not count or version != count._version:
            steps = int(count)
            self._steps = count, count._version, steps
        return self._tiered.assignment.policy.due(steps + 1)

    def _count(self, state: dict[Tensor, dict[str, Tensor]]) -> Tensor:
        place: Any = self.homes[self._tiered.count]  # pyright: ignore
        return state[place[0]][place[1]]

    def stepped(self, state: dict[Tensor, dict[str, Tensor]]) -> None:
        """Keeps the step count of the tiers on the host: an accelerator need not be waited for at each step."""
        if self._tiered is not None and self._steps is not None:
            count = self._count(state)
            self._steps = count, count._version, self._steps[2] + 1

    def state(self, leaves: Sequence[Any]) -> Any:
        """The chain's state with these leaves, `apart`."""
        return jax.tree.unflatten(self.state_structure, leaves).chain

    def jax_state(self, leaves: Sequence[Tensor]) -> Any:
        """The chain's state in JAX."""
        with jax.enable_x64(True):
            arrays = [to_jax(t, aval) for t, aval in zip(leaves, self.state_avals, strict=True)]
        return together(self.state(arrays))

    def jax_tree(self, tensors: Sequence[Tensor | None]) -> Any:
        """Tensors like the parameters as the chain's tree in JAX, zeros for None."""
        with jax.enable_x64(True):
            arrays = [
                jnp.zeros(aval.shape, aval.dtype) if t is None else to_jax(t, aval)
                for t, aval in zip(tensors, self._structs, strict=True)
            ]
        return jax.tree.unflatten(self.params_structure, arrays)

    def torch_leaves(self, state: Any) -> list[Tensor]:
        """The leaves of the chain's state in torch, in the dtypes of the program."""
        return [
            to_torch(leaf, self.device).to(torch_dtype(aval.dtype))
            for leaf, aval in zip(jax.tree.leaves(apart(state)), self.state_avals, strict=False)
        ]

    # ---- hyperparameters -------------------------------------------------------------------

    @property
    def keys(self) -> list[str]:
        """The keys of the group that the program reads."""
        return [*self.live, *([_MULTIPLIER] if self.multiplier else [])]

    def sync(self, group: dict[str, Any], owner: str) -> None:
        """Fills the program's scalars with the values of the group, where they changed.

        Raises:
          TypeError: a value is no number.
          ValueError: a value is out of bounds.
        """
        check_flags(group, owner)
        for key in self.keys:
            if key not in group:
                raise ValueError(f"{owner} has no `{key}` any more, a hyperparameter of its chain")
        self.sync_betas(group)
        for key in self.keys:
            value = group[key]
            if isinstance(value, Tensor):  # on another device it is not looked at: that would wait
                value = number_of(owner, key, value, wait=False)
            target = self._holder(key)
            if isinstance(value, Tensor):
                target.copy_(value.detach().reshape(()))
                self._filled.pop(key, None)
            elif value != self._filled.get(key):
                check_number(owner, key, value, target.dtype)
                target.fill_(float(value))
                self._filled[key] = value

    def check_values(self, group: dict[str, Any], owner: str) -> None:
        """Raises what `sync` raises, also for tensors on other devices; a step would not wait for these."""
        check_flags(group, owner)
        for key in self.keys:
            value = number_of(owner, key, group[key], wait=True)
            check_number(owner, key, value, self._holder(key).dtype)

    def _holder(self, key: str) -> Tensor:
        """The scalar of the program that holds a value of the group."""
        return self._live_tensors[key] if key in self.live else self._multiplier

    @property
    def has_betas(self) -> bool:
        """Whether the group has `betas`, torch's name for the pair (b1, b2), which its schedulers cycle."""
        return "b1" in self.live and "b2" in self.live

    def sync_betas(self, group: dict[str, Any]) -> None:
        """Makes `betas` and the pair (b1, b2) agree: `betas` counts if it changed since the last call."""
        if not self.has_betas:
            return
        known = self._filled.get("betas")
        if known is not None and group.setdefault("betas", known) != known:
            group["b1"], group["b2"] = pair(group["betas"])
        group["betas"] = self._filled["betas"] = (group["b1"], group["b2"])

    def program(self, loss: Any) -> tuple[InPlace, list[Tensor]]:
        """The program for a step with this loss, and the last two of its inputs.

        Raises:
          ValueError: the chain cannot do without the loss, and there is none, or it is no scalar.
        """
        if self.reads_value and loss is None:
            return self._without_value(), [self._multiplier, self._value]
        if self.reads_value and isinstance(loss, Tensor):
            if loss.numel() != 1:
                shape = tuple(loss.shape)
                raise ValueError(
                    f"TorchBridge: the closure must return a scalar loss, got shape {shape}"
                )
            self._value.copy_(loss.detach().reshape(()))
        elif self.reads_value:
            if not isinstance(loss, numbers.Real):
                raise TypeError(
                    f"TorchBridge: the closure must return a scalar loss, got {type(loss).__name__}"
                )
            self._value.fill_(float(loss))
        return self.run, [self._multiplier, self._value]

    def _without_value(self) -> InPlace:
        if self._run_without_value is None:
            params = jax.tree.unflatten(self.params_structure, self._structs)
            state = jax.tree.unflatten(self.state_structure, self.state_avals)
            try:
                _, run, _, _ = self._program(params, state, self.multiplier, value=False)
            except (TypeError, ValueError) as error:  # with a loss the same trace worked
                raise ValueError(
                    "TorchBridge: this chain reads the loss (`value`); call `step(closure)` with a closure that "
                    "evaluates the model, calls backward and returns the loss"
                ) from error
            self._run_without_value = run
        return self._run_without_value
