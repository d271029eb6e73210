"""One step of a chain for parameters of given shapes: what it takes and returns, and where its state belongs.

The flat inputs of a step are the leaves of (parameters, gradients, state, extras), its flat outputs those of
(parameters, state). Each output takes the place of an input: see `Description.targets`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from chainrule.bridges.step.function import Assigning, BridgeState, Extras, StepFunction
from chainrule.bridges.step.settled import settled
from chainrule.bridges.step.slots import Slot, live_leaves, slots
from chainrule.bridges.step.tiers import TIERS, tiered_states, tiers_of
from chainrule.bridges.step.trace import Struct, Trace, trace
from chainrule.bridges.step.vectors import unstack
from chainrule.transforms import TieredState, assign

RATES = ("learning_rate", "lr")
"""What a chain may call its learning rate: one key of a parameter group."""


@dataclasses.dataclass(frozen=True)
class Description:
    """A step of a chain, before any framework computes it.

    Attributes:
      params: the parameters, a tree of structs.
      init: gives parameters -> the chain's state at the start, traced once, when it is first asked for.
      function: the step function with a loss.
      state: the state, a tree of structs in the dtypes that the step keeps.
      slots: the home of every leaf of the state.
      live: name -> the position in the state of every hyperparameter that may be set between steps.
      tiers: the tier of every parameter, or None if the chain has no tiers.
      tiered: the chain's state with tiers, with the positions of its leaves in their place; or None.
      given: extra arguments of the chain by name, trees of structs.
    """

    params: Any
    init: Callable[[], Trace]
    function: StepFunction
    state: BridgeState
    slots: list[Slot]
    live: dict[str, int]
    tiers: tuple[int, ...] | None
    tiered: TieredState | None
    given: dict[str, Any]
    _traces: dict[bool, Trace]
    _read: dict[bool, set[str]] = dataclasses.field(default_factory=dict[bool, set[str]])

    @property
    def targets(self) -> list[int]:
        """For every flat output of a step the flat input in whose place it goes."""
        count = len(jax.tree.leaves(self.params))
        return [*range(count), *range(2 * count, 2 * count + len(self.slots))]

    def given_like(self) -> list[int | None]:
        """For every input of `given`, the last of a step, the position of the parameter that it is like, or None."""
        places = range(len(jax.tree.leaves(self.params)))
        return [i for name in self.given for i in ([None] if name == "count" else places)]

    @functools.cached_property
    def reads_value(self) -> bool:
        """Whether the chain reads the loss if it is given one."""
        return self.trace(True).used()[-1 - len(jax.tree.leaves(self.given))]

    def reads(self) -> set[str]:
        """The names of `given` that the steps read which were traced so far, with the loss or without."""
        names = [n for n, tree in self.given.items() for _ in jax.tree.leaves(tree)]
        for value, step in self._traces.items():
            if value not in self._read:
                used = step.used()
                pairs = zip(names, used[len(used) - len(names) :], strict=True)
                self._read[value] = {name for name, is_used in pairs if is_used}
        return set[str]().union(*self._read.values())

    def takes_value(self, has_loss: bool) -> bool:
        """Whether a step with or without a loss is the one that is traced with it; one does for both if it can."""
        return has_loss or (True in self._traces and not self.reads_value)

    def trace(self, value: bool) -> Trace:
        """The step function, with the loss or without; traced once.

        Raises:
          ValueError: the chain cannot do without.
        """
        if value not in self._traces:
            scalar = Struct((), jnp.float32)
            extras = Extras(scalar, scalar, self.given)
            inputs = self.params, self.params, self.state, extras
            self._traces[value] = _stepped(self.function._replace(value=value), *inputs)
        return self._traces[value]


def _stepped(function: StepFunction, *inputs: Any) -> Trace:
    """The trace of a step; of one without the loss what is raised says that it is missing: with it the same works."""
    try:
        return trace(function, *inputs)
    except (TypeError, ValueError) as error:
        if function.value:
            raise
        raise ValueError(
            "TorchBridge: this chain reads the loss (`value`); call `step(closure)` with a closure that evaluates the "
            "model, calls backward and returns the loss"
        ) from error


def describe(
    chain: optax.GradientTransformation,
    params: Any,
    given: Sequence[str] = (),
    *,
    rounding: bool = False,
    tiers: tuple[int, ...] | None = None,
    state: Any = None,
    value: bool = True,
) -> Description:
    """Traces a chain for parameters of given shapes.

    Args:
      chain: the gradient transformation.
      params: a tree of structs: a dict by name or a list.
      given: extra arguments that the chain is given at every step: trees like the parameters, and `count`, a scalar.
      rounding: whether bfloat16 parameters are rounded stochastically.
      tiers: of every parameter, for a chain with tiers; None: those that `init` gives.
      state: the chain's state, `unstack`ed, in structs, if it is known; else `init` is traced.
      value: whether to trace the step with the loss first.

    Raises:
      NeedsLossFunction: the chain asks for a function that evaluates the loss.
      StateChanges: structure or shapes of state or parameters do not stay what they are.

    >>> step = describe(optax.sgd(0.1, momentum=0.9), {"w": Struct((3,), jnp.float32)})
    >>> [slot[:2] for slot in step.slots], step.targets
    ([(0, 'trace')], [0, 2])
    """

    def initial(params: Any) -> Any:
        made = chain.init(params)
        return unstack(made if tiers is None else assign(made, tiers, params))

    init = functools.cache(lambda: trace(initial, params))
    first = init().outputs if state is None else state
    seed = Struct((2,), jnp.int32) if rounding else None
    live = live_leaves(jax.tree.structure(first))
    start = 2 * len(jax.tree.leaves(params))
    check_one_rate(live)
    assigns = isinstance(chain, Assigning)  # what becomes of the parameters is not multiplied
    function = StepFunction(chain, not assigns and live.keys().isdisjoint(RATES), rounding, value)
    count = Struct((), jnp.int32)
    extra = {name: count if name == "count" else params for name in sorted(given)}
    step, state = _traced(function, params, BridgeState(first, seed), extra)
    # A hyperparameter that the step does not read is a schedule's last value: not for the user to set.
    used = step.used()
    live = {name: leaf for name, leaf in live.items() if used[start + leaf]}
    if not assigns and not function.multiplier and live.keys().isdisjoint(RATES):
        function = function._replace(multiplier=True)
        step, state = _traced(function, params, state, extra)
    leaves, structure = jax.tree.flatten(state)
    own = ["rounding"] if rounding else []
    places = slots(state.chain, params, chain.init, reserved=(*own, TIERS))
    places += [Slot(None, name) for name in own]
    numbered = jax.tree.unflatten(structure, range(len(leaves))).chain
    tiered = next(iter(tiered_states(numbered)), None)
    return Description(
        *(params, init, function._replace(value=True), state, places, live),
        *(tiers_of(first), tiered, extra, {value: step}),
    )


def check_one_rate(live: Iterable[str]) -> None:
    """Raises `ValueError` if a chain has several hyperparameters that a framework knows by one name."""
    if set(RATES) <= set(live):
        raise ValueError(
            "the chain has the hyperparameters `learning_rate` and `lr`, which are one key of a parameter group; "
            "rename one of them"
        )


def _traced(
    function: StepFunction, params: Any, state: BridgeState, given: dict[str, Any]
) -> tuple[Trace, BridgeState]:
    """The trace of a step, and the structs of a state that keeps its dtypes in it."""
    scalar = Struct((), jnp.float32)

    def traced(state: BridgeState) -> tuple[Trace, Any]:
        found = _stepped(function, params, params, state, Extras(scalar, scalar, given))
        return found, found.outputs

    return settled(traced, params, state)
