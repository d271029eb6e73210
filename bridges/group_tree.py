"""One parameter group as a chain sees it: a tree of parameters, one state, one program."""

import copy
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from chainrule.bridges.checks import one_device
from chainrule.bridges.engines import Engine, Program, engine_named
from chainrule.bridges.hyperparameters import Hyperparameters, fill, key_of, shortest
from chainrule.bridges.lowering import to_torch, torch_dtype
from chainrule.bridges.lowering.arrays import physical_shape
from chainrule.bridges.lowering.backends.cuda_graph import picker
from chainrule.bridges.lowering.executor import InPlace
from chainrule.bridges.lowering.program import collector_paused
from chainrule.bridges.meant import Meant
from chainrule.bridges.sharded import Layouts, as_state, local
from chainrule.bridges.step.description import describe
from chainrule.bridges.step.function import as_transformation
from chainrule.bridges.step.tiers import TIERS
from chainrule.bridges.step.trace import Struct

State = dict[Tensor, dict[str, Tensor]]
"""`optimizer.state`."""


class Options(NamedTuple):
    """What the user asked for when the bridge was made. Pickles hold it by its path."""

    chain: Any
    compile: bool | str
    engine: str
    rounding: str | None
    meant: Meant | None = None
    """None only in what earlier versions pickled."""
    given: tuple[str, ...] = ()
    """Extra arguments that the chain is given at every step: trees like the parameters, and `count`, a scalar."""


def _struct(tensor: Tensor) -> Struct:
    return Struct(tuple(tensor.shape), jnp.dtype(str(tensor.dtype).removeprefix("torch.")))


class GroupTree:
    """The tree of one parameter group, the homes of its state in `optimizer.state`, and its program.

    Attributes:
      described: what a step of the chain is; see `step.description`.
      params: the parameters in the order in which JAX flattens the tree.
      labels: what messages call them.
      dtypes, shapes: what they were when the chain was traced.
      keepers: the parameters under which the state is kept.
      head: the parameter that keeps what belongs to the whole group.
      device: the device of all of them.
      homes: for every leaf of the state the parameter and name it is kept under; None: a live hyperparameter.
      named: whether the tree is a dict by label, else it is a list.
      layouts: how the parameters lie on a mesh of devices; None: they are no DTensors.
      live: group key -> position of the hyperparameter's leaf in the state.
      hyperparameters: the scalars that the group's keys set.
      program: that of the step which was traced first.
    """

    def __init__(
        self,
        options: Options,
        params: Sequence[Tensor],
        labels: Sequence[str],
        named: bool,
        tiers: tuple[int, ...] | None = None,
        state: Any = None,
        has_loss: bool = True,
    ):
        """Traces the chain: see `describe`; `has_loss`: whether the next step has a loss."""
        self.named, self._has_loss = named, has_loss
        self._engine: Engine = engine_named(options.engine, options.compile)
        keys = labels if named else list(map(str, range(len(params))))
        assert options.meant is not None
        names = dict(zip(params, keys, strict=True))
        chain = options.meant.told(as_transformation(options.chain), names)
        positions = list(range(len(params)))
        order: list[int]
        in_tree = dict(zip(labels, positions, strict=True)) if named else positions
        order, structure = jax.tree.flatten(in_tree)
        self.params = [params[i] for i in order]
        self.labels = [labels[i] for i in order]
        self.dtypes = [p.dtype for p in self.params]
        self.shapes = [p.shape for p in self.params]
        structs = jax.tree.unflatten(structure, map(_struct, self.params))
        with collector_paused():
            how: Any = {"rounding": options.rounding is not None, "tiers": tiers, "state": state}
            self.described = describe(chain, structs, options.given, value=has_loss, **how)
        self.live = {key_of(name): leaf for name, leaf in self.described.live.items()}
        self.state_avals, self._state_structure = jax.tree.flatten(self.described.state)
        self._lay_out()
        # The tiers' step count: its tensor, the version that was read, the number.
        self._steps: tuple[Tensor, int, int] | None = None
        self._checked: Sequence[Tensor] = ()
        self._bind(self.params, params[0])
        self._put_on(one_device(params))

    def _lay_out(self) -> None:
        """Finds how parameters and state lie on a mesh of devices."""
        self.layouts = Layouts.of(self.params, self.labels)
        shapes, owners = self.shapes, [slot.owner for slot in self.described.slots]
        self._alike = [
            None if i is None or shapes[i] != physical_shape(aval) else i
            for i, aval in zip(owners, self.state_avals, strict=True)
        ]

    def likes(self) -> list[Tensor | None]:
        """For every leaf of the state the parameter that it lies like, having its shape, or None."""
        return [None if i is None else self.params[i] for i in self._alike]

    def _bind(self, params: Sequence[Tensor], head: Tensor) -> None:
        self.params, self.head = list(params), head
        settable, slots = set(self.live.values()), self.described.slots
        keepers = (self.head if s.owner is None else self.params[s.owner] for s in slots)
        homes = zip(keepers, (s.name for s in slots), strict=True)
        self.homes = [None if i in settable else home for i, home in enumerate(homes)]
        own: dict[Tensor, list[str]] = {}
        for p, name in filter(None, self.homes):
            own.setdefault(p, []).append(name)
        self.keepers, self._entries = list(own), list(map(picker, own.values()))
        entries = ((p, name) for p, names in own.items() for name in names)
        position: dict[Any, int] = {x: i for i, x in enumerate((*entries, *self.live.values()))}
        self._order = [position[home or i] for i, home in enumerate(self.homes)]
        """Of the leaves among the entries of one keeper after the other, then the live scalars."""

    def bound_to(
        self, params: Sequence[Tensor], head: Tensor, labels: Sequence[str]
    ) -> "GroupTree":
        """This tree for other tensors of the same shapes and dtypes, in its order, without another trace."""
        new = copy.copy(self)
        new.labels = list(labels)
        new._bind(params, head)
        return new

    def _put_on(self, device: torch.device) -> None:
        """Makes the program for a device, and there the scalars that are no part of `optimizer.state`."""
        self.device = device
        self._programs: dict[bool, Program] = {}
        self.program = self._program(self._has_loss)
        dtypes = {key: torch_dtype(self.state_avals[leaf].dtype) for key, leaf in self.live.items()}
        self.hyperparameters = Hyperparameters(dtypes, self.described.function.multiplier, device)
        self._value = torch.zeros((), dtype=torch.float32, device=device)

    def _program(self, has_loss: bool) -> Program:
        value = self.described.takes_value(has_loss)
        if value not in self._programs:
            trace = self.described.trace(value)
            alike = [*self._alike, None, None, *self.described.given_like()]
            sharding = self.layouts and self.layouts.of_step(alike, trace.jaxpr.in_avals)
            targets = self.described.targets
            self._programs[value] = self._engine.program(trace, targets, self.device, sharding)
        return self._programs[value]

    def moved(self) -> "GroupTree":
        """This tree on the device that its parameters have moved to."""
        new = copy.copy(self)
        new._put_on(one_device(self.params))
        return new

    # ---- state -----------------------------------------------------------------------------

    @property
    def tiers(self) -> tuple[int, ...] | None:
        """The tier of every parameter, or None if the chain has no tiers."""
        return self.described.tiers

    def initial_state(self) -> tuple[list[Tensor], dict[str, float | int]]:
        """The leaves of the state that `init` makes, and the hyperparameters in it by group key."""
        init, own = self.described.init(), list(map(local, self.params))
        sharding = self.layouts and self.layouts.of_init(self._alike, init.jaxpr.out_avals)
        leaves = self._engine.initial(init, own, self.device, sharding)
        found = [leaves[leaf] for leaf in self.live.values()]
        if self.device.type == "meta":  # where nothing has a value
            found = map(to_torch, init.constants(self.live.values()))
        values = dict(zip(self.live, map(shortest, found), strict=True))
        for key in self.hyperparameters.tensors:
            values.setdefault(key, 1.0)  # the multiplier
        if self.described.function.rounding:
            # int32 keeps the low bits of the seed that torch.manual_seed set
            seed = (torch.initial_seed() & 0x7FFF_FFFF, 0)
            leaves.append(torch.tensor(seed, dtype=torch.int32, device=self.device))
        return list(map(as_state, self.in_their_dtypes(leaves), self.likes())), values

    def in_their_dtypes(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Leaves of the state in the dtypes that the step keeps."""
        return [
            leaf.to(torch_dtype(aval.dtype))
            for leaf, aval in zip(leaves, self.state_avals, strict=False)
        ]

    def is_stale(self) -> bool:
        """Whether a parameter has another dtype or shape, or has left `meta`, since the chain was traced."""
        left = self.device.type == "meta" and self.params[0].device != self.device
        kinds = zip(self.params, self.dtypes, self.shapes, strict=True)
        return left or any((p.dtype, p.shape) != (dtype, shape) for p, dtype, shape in kinds)

    def leaves(self, state: State) -> list[Tensor]:
        """The leaves of the chain's state, from the optimizer's.

        Raises:
          KeyError: the optimizer's lacks one.
        """
        # There may be a thousand, and the time of each is the host's: one call for all of a parameter.
        kept = [state.get(p, {}) for p in self.keepers]
        found = [x for entries, own in zip(self._entries, kept, strict=True) for x in entries(own)]
        found += map(self.hyperparameters.tensors.__getitem__, self.live)
        return list(map(found.__getitem__, self._order))

    def store(self, state: State, leaves: Sequence[Tensor]) -> None:
        """Writes the leaves of the chain's state into the optimizer's."""
        for home, leaf in zip(self.homes, leaves, strict=True):
            if home:
                state[home[0]][home[1]] = leaf
        if self.tiers is not None:  # static in JAX; what a saved state needs to be loaded
            state[self.head][TIERS] = torch.tensor(self.tiers, device="cpu")

    def clear(self, state: State) -> None:
        """Takes the leaves of the chain's state out of the optimizer's."""
        for home in [*self.homes, (self.head, TIERS)]:
            if home and home[0] in state:
                state[home[0]].pop(home[1], None)

    def misfit(self, leaves: Sequence[Tensor]) -> str | None:
        """Which entry of the state is not of the kind that the chain was traced for, or None."""
        for leaf, aval, slot in zip(leaves, self.state_avals, self.described.slots, strict=True):
            want = torch_dtype(aval.dtype), physical_shape(aval), self.device
            got = leaf.dtype, tuple(leaf.shape), leaf.device
            if got != want:
                found, expected = ("{} {} on {}".format(*kind) for kind in (got, want))
                return f"state entry `{slot.name}` is {found}, expected {expected}"
        return None

    def check(self, leaves: Sequence[Tensor], owner: str) -> None:
        """Raises `RuntimeError` for an entry of the state that was replaced by one of another kind.

        A program relies on what it was compiled for. The entries are the same tensors in most steps.
        """
        if len(leaves) == len(self._checked) and all(map(operator.is_, leaves, self._checked)):
            return
        if misfit := self.misfit(leaves):
            raise RuntimeError(f"{owner}: {misfit}")
        self._checked = leaves

    def is_due(self, state: State) -> bool:
        """Whether the policy of the chain's tiers may move parameters before the next update.

        Raises:
          KeyError: the optimizer's state lacks the step count.
        """
        if self.described.tiered is None:
            return False
        count = self._count(state)
        known, version, steps = self._steps or (None, 0, 0)
        if known is not count or version != count._version:
            steps = int(count)
            self._steps = count, count._version, steps
        return self.described.tiered.assignment.policy.due(steps + 1)

    def _count(self, state: State) -> Tensor:
        tiered = self.described.tiered
        assert tiered is not None
        home = self.homes[int(tiered.count)]  # positions stand in the place of leaves
        assert home is not None
        return state.get(home[0], {})[home[1]]

    def stepped(self, state: State) -> None:
        """Keeps the step count of the tiers on the host: an accelerator need not be waited for at each step."""
        if self._steps is not None:
            count = self._count(state)
            self._steps = count, count._version, self._steps[2] + 1

    def state(self, leaves: Sequence[Any]) -> Any:
        """The chain's state with these leaves, `unstack`ed."""
        return jax.tree.unflatten(self._state_structure, leaves).chain

    def agrees(self, has_loss: bool) -> bool:
        """Whether ranks tell each other in a step which gradients they have: all that communicate anyway do."""
        return self.layouts is not None and self._program(has_loss).agrees()

    def ready(self, loss: Any) -> tuple[InPlace, list[Tensor]]:
        """The program for a step with this loss, and the two scalars among its inputs.

        Raises:
          TypeError: the loss is no number and no tensor.
          ValueError: the chain cannot do without the loss, and there is none, or it is no scalar.
        """
        program = self._program(loss is not None)
        if loss is not None and self.described.reads_value:
            fill(self._value, loss)
        return program.ready(), [self.hyperparameters.multiplier, self._value]
