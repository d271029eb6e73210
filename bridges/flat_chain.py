"""A chain on a flat list of named parameters, for frameworks that keep a variable for each leaf of its state.

    (parameters, gradients, stored leaves, rate) -> (new parameters, new stored leaves)

is a pure JAX function of flat lists. The chain sees a dict by name. The leaf of its live learning rate is not stored:
the caller gives the rate at every step. A `PerParameter` stays one vector.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax

from chainrule.bridges.probing import RATE, settable
from chainrule.bridges.step.settled import NeedsLossFunction, settled
from chainrule.bridges.step.slots import Slot, live_leaves, slots
from chainrule.bridges.step.trace import Struct
from chainrule.native.dtypes import is_key
from chainrule.native.dtypes import x64_if_wide as wide
from chainrule.transforms import PerParameter


class NeedsLoss(TypeError):
    """A chain asks for the loss, which Keras does not give to optimizers."""


class Stored(NamedTuple):
    """One leaf of the state that the framework keeps in a variable."""

    leaf: int
    """Position among the leaves of the state."""
    slot: Slot
    """Whose it is, and its name."""
    shape: tuple[int, ...]
    dtype: str
    """A random key is stored as its words, in uint32."""


class FlatChain:
    """A chain that was traced for parameters of some names, shapes and dtypes.

    Attributes:
      names: of the parameters, in the order of the flat lists.
      stored: the leaves of the state that are kept.
      live: name of every live hyperparameter that can be set -> its position in `stored`.
      feeds_rate: whether the chain has a live learning rate; else its updates are multiplied by the rate.
    """

    def __init__(
        self,
        chain: optax.GradientTransformation,
        names: Sequence[str],
        structs: Sequence[Struct],
        scaled: bool = True,
    ):
        """Traces the chain.

        Args:
          chain: a gradient transformation.
          names: of the parameters.
          structs: their shapes and dtypes.
          scaled: whether the rate multiplies the updates of a chain without a live learning rate.

        Raises:
          NeedsLoss: the chain reads the loss.
          StateChanges: its update changes the structure or the shapes of the state or the parameters.
          ValueError: a pattern among its arguments matches no parameter.
        """
        self.chain = optax.with_extra_args_support(chain)
        self.names, self.structs, self.scaled = list(names), list(structs), scaled
        self._order = sorted(
            range(len(names)), key=self.names.__getitem__
        )  # as JAX flattens a dict
        params = self._tree(structs)
        with wide(structs):
            state = _strong(jax.eval_shape(self.chain.init, params))
            try:
                _, state = settled(functools.partial(self._traced, params), params, state)
            except NeedsLossFunction as error:
                raise NeedsLoss(
                    "this chain evaluates the loss by itself, in JAX, which Keras cannot do for it; use a variant "
                    "that works from gradients alone, or train in plain JAX"
                ) from error
            live = settable(self.chain, params, state, live_leaves(jax.tree.structure(state)))
        self.avals, self.structure = jax.tree.flatten(state)
        self._rate = live.pop(RATE, None)
        self.feeds_rate = self._rate is not None
        self.stored = self._layout(state, params)
        position = {kept.leaf: i for i, kept in enumerate(self.stored)}
        self.live = {name: position[leaf] for name, leaf in live.items()}

    def _tree(self, values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.names, values, strict=True))

    def _traced(self, params: Any, state: Any) -> tuple[None, tuple[Any, Any]]:
        """The structs of an update's results, as `settled` wants them."""

        def update(extra: dict[str, Any]) -> Any:
            def step(params: Any, state: Any, extra: Any) -> Any:
                updates, new = self.chain.update(params, state, params, grad=params, **extra)
                return optax.apply_updates(params, updates), new

            return _strong(jax.eval_shape(step, params, state, extra))

        try:
            return None, update({})
        except (TypeError, ValueError) as error:
            try:
                update({"value": Struct((), jnp.float32)})
            except (TypeError, ValueError):
                raise error from None
            raise NeedsLoss(
                "this chain reads the loss (`value`), which Keras does not give to its optimizers; use a chain that "
                "works from gradients alone, or train in plain JAX"
            ) from error

    def _layout(self, state: Any, params: Any) -> list[Stored]:
        found = slots(_vectors_as_arrays(state), params)
        owners = dict(enumerate(self._order))
        kept = []
        for leaf, (slot, aval) in enumerate(zip(found, self.avals, strict=True)):
            if leaf == self._rate:
                continue
            owner = None if slot.owner is None else owners[slot.owner]
            shape, dtype = tuple(aval.shape), str(aval.dtype)
            if is_key(aval.dtype):
                shape, dtype = (*shape, *aval.dtype._impl.key_shape), "uint32"
            kept.append(Stored(leaf, Slot(owner, slot.name), shape, dtype))
        return kept

    # ---- values ----------------------------------------------------------------------------

    @functools.cached_property
    def init_reads_values(self) -> bool:
        """Whether the initial state depends on what the parameters are, not only on their shapes."""
        with wide(self.structs):
            jaxpr = jax.make_jaxpr(self.chain.init)(self._tree(self.structs)).jaxpr
        used = {
            v
            for eqn in jaxpr.eqns
            if eqn.primitive.name
            != "chainrule_alike"  # a moment lies as its parameter, whatever that is
            for v in eqn.invars
            if not isinstance(v, jax.extend.core.Literal)
        }
        return any(v in used or v in jaxpr.outvars for v in jaxpr.invars)

    def initial(self, values: Sequence[Any] | None) -> list[np.ndarray]:
        """The stored leaves as `init` makes them.

        Args:
          values: the parameters; may be None unless `init_reads_values`.
        """
        if values is None:
            values = [np.zeros(s.shape, s.dtype) for s in self.structs]
        with wide(self.structs):
            arrays = [jnp.asarray(v, s.dtype) for v, s in zip(values, self.structs, strict=True)]
            return self.values_of(self.chain.init(self._tree(arrays)))

    def values_of(self, state: Any) -> list[np.ndarray]:
        """The stored leaves of a state."""
        leaves = [jnp.asarray(x) for x in jax.tree.leaves(state)]
        words = [jax.random.key_data(x) if is_key(x.dtype) else x for x in leaves]
        return [np.asarray(words[k.leaf]).astype(jnp.dtype(k.dtype)) for k in self.stored]

    def state(self, stored: Sequence[Any], rate: Any = 1.0) -> Any:
        """The chain's state from its stored leaves."""
        leaves: list[Any] = [None] * len(self.avals)
        for kept, value in zip(self.stored, stored, strict=True):
            aval = self.avals[kept.leaf]
            leaves[kept.leaf] = (
                jax.random.wrap_key_data(value, impl=aval.dtype._impl.name)
                if is_key(aval.dtype)
                else value
            )
        if self._rate is not None:
            leaves[self._rate] = jnp.asarray(rate).astype(self.avals[self._rate].dtype)
        return jax.tree.unflatten(self.structure, leaves)

    # ---- the step --------------------------------------------------------------------------

    def direction(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        stored: Sequence[Any],
        rate: Any,
        moved: Sequence[Any] | None = None,
        *,
        missing: tuple[int, ...] = (),
    ) -> tuple[list[Any], list[Any]]:
        """The updates of the parameters that have a gradient, and the new stored leaves; a pure JAX function.

        Args:
          params: all parameters.
          grads: their gradients, without those of `missing`.
          stored: the stored leaves.
          rate: float32 scalar.
          moved: what the chain is given for updates, default the gradients.
          missing: positions of parameters without a gradient. The chain sees zeros for these, and their part of the
            state stays as it is.
        """
        by_name = self._tree(params)
        grad = self._with_zeros(params, grads, missing)
        given = grad if moved is None else self._with_zeros(params, moved, missing)
        moves, new = self.chain.update(given, self.state(stored, rate), by_name, grad=grad)
        updates: Any = moves
        if self.scaled and not self.feeds_rate:
            updates = jax.tree.map(lambda u: u * rate.astype(u.dtype), updates)
        leaves = jax.tree.leaves(new)
        words = [jax.random.key_data(x) if is_key(x.dtype) else x for x in leaves]
        kept = [words[k.leaf].astype(k.dtype) for k in self.stored]
        if missing:
            kept = self._kept(stored, kept, missing)
        return [updates[name] for i, name in enumerate(self.names) if i not in missing], kept

    def _with_zeros(
        self, params: Sequence[Any], values: Sequence[Any], missing: tuple[int, ...]
    ) -> Any:
        rest = iter(values)
        return self._tree(
            [jnp.zeros_like(p) if i in missing else next(rest) for i, p in enumerate(params)]
        )

    def step(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        stored: Sequence[Any],
        rate: Any,
        *,
        missing: tuple[int, ...] = (),
    ) -> tuple[list[Any], list[Any]]:
        """All new parameters and new stored leaves, of the arguments of `direction`; a pure JAX function."""
        updates, new = self.direction(params, grads, stored, rate, missing=missing)
        rest = iter(updates)
        return [
            p if i in missing else (p + next(rest)).astype(p.dtype) for i, p in enumerate(params)
        ], new

    def _kept(self, old: Sequence[Any], new: Sequence[Any], missing: tuple[int, ...]) -> list[Any]:
        """`new` with what belongs to the missing parameters as it was."""
        without = np.array([i in missing for i in self._order])
        vectors = self._vectors
        return [
            a
            if kept.slot.owner in missing
            else jnp.where(without, a, b)
            if kept.leaf in vectors
            else b
            for kept, a, b in zip(self.stored, old, new, strict=True)
        ]

    @functools.cached_property
    def _vectors(self) -> set[int]:
        """The leaves of the state that hold a number for each parameter."""
        numbered = jax.tree.unflatten(self.structure, range(len(self.avals)))
        nodes = jax.tree.leaves(numbered, is_leaf=_is_vector)
        return {
            n.values for n in nodes if _is_vector(n) and n.structure.num_leaves == len(self.names)
        }

    @property
    def state_bytes(self) -> int:
        """Bytes of the stored leaves."""
        return sum(math.prod(k.shape) * jnp.dtype(k.dtype).itemsize for k in self.stored)


def _is_vector(node: Any) -> bool:
    return isinstance(node, PerParameter)


def _vectors_as_arrays(state: Any) -> Any:
    return jax.tree.map(lambda x: x.values if _is_vector(x) else x, state, is_leaf=_is_vector)


def _strong(structs: Any) -> Any:
    return jax.tree.map(lambda s: Struct(s.shape, s.dtype), structs)
