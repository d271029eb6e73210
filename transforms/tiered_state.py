"""Optimizer state as a budget: each parameter is updated by the transform of its tier, and moves
between tiers as it earns it.

    u_i = tiers[tier_i](g_i),    tier_i reassigned by `retier` from the gradients' signals (see `tier_policy`)

Source: COSMIC, repository commit 96f1a8c. Departure: a tier is any gradient transformation. Each
parameter has an inner state of its own, made when it enters its tier, so bias corrections count
from the promotion.

Moving a parameter changes the shape of the state, which `jit` cannot do. So the tiers are static in
the state (one compilation an assignment), `update` never moves anything, and `retier`, a host
function, does, between steps.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from chainrule.transforms._checks import check_link, check_params
from chainrule.transforms._metrics import state_bytes
from chainrule.transforms._numerics import increment
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._trees import ANY, is_placeholder, where_updated
from chainrule.transforms._words import checked_words
from chainrule.transforms.tier_policy import TierMemory, TierPolicy


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Assignment:
    """The static part of a `TieredState`: the tier of each tensor, and how to make the state of another."""

    tiers: tuple[int, ...]
    policy: TierPolicy
    transforms: Mapping[int, optax.GradientTransformation] | None = dataclasses.field(
        compare=False, repr=False
    )

    def __getstate__(self) -> dict[str, Any]:
        # Functions do not pickle; a state that was pickled gets them back from `adopt`.
        return {**self.__dict__, "transforms": None}


class TieredState(NamedTuple):
    """State of `tiered_state`; tensors are in the order of `jax.tree.leaves`."""

    assignment: Assignment
    """Static: each tensor's tier."""
    count: jax.Array
    """int32 scalar: updates made."""
    inner: tuple[optax.OptState, ...]
    """Each tensor's own state, of its tier's transform."""
    memory: TierMemory
    """What the policy remembers of each tensor."""

    metric_fields = ("tier_occupancy",)

    @property
    def tier_occupancy(self) -> dict[int, int]:
        """How many tensors are in each tier."""
        tiers = self.assignment.tiers
        return {tier: tiers.count(tier) for tier in sorted(set(tiers))}

    def posted(self) -> dict[str, Any]:
        """For later links: each tensor's tier, the one it counts as in a full sync, and whether this step is one."""
        return {
            "tiers": self.assignment.tiers,
            "synced_tiers": _synced(self.assignment),
            "full_sync": _is_full_sync(self.assignment.policy, self.count),
        }


def _synced(assignment: Assignment) -> tuple[int, ...]:
    policy = assignment.policy
    if policy.full_sync_interval is None:
        return assignment.tiers
    return tuple(max(tier, policy.full_sync_tier) for tier in assignment.tiers)


def _is_full_sync(policy: TierPolicy, count: jax.Array) -> Any:
    if policy.full_sync_interval is None:
        return False
    return jax.lax.rem(count, jnp.asarray(policy.full_sync_interval, count.dtype)) == 0


@checked_words
def tiered_state(
    tiers: Mapping[int, optax.GradientTransformation], policy: TierPolicy | None = None
) -> optax.GradientTransformationExtraArgs:
    """Updates each tensor by the transform of its tier.

    All tensors start in the lowest tier; `chainrule.retier` moves them. A tier's transform sees one
    tensor at a time, so it must not couple tensors (no global norm). It is given, beside the
    chain's extra arguments, `step`, the number of this update, `tier`, the tensor's tier, and
    `synced_tier`, the one it counts as in this step.

    Args:
      tiers: from tier number, 0 or greater, to its transform; a greater number is worth more state.
      policy: when and how tensors move; default `TierPolicy()`.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: no tiers, a negative tier, a fraction for a tier that is not there, or a budget
      too small for the lowest tier.
      TypeError: a parameter that is not floating point.

    >>> import chainrule
    >>> tx = tiered_state({1: optax.scale_by_adam(), 0: optax.scale_by_sign()}, TierPolicy(fractions={1: 0.5}))
    >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    >>> grads = {"a": jnp.ones(2), "b": 9 * jnp.ones(3)}
    >>> state = chainrule.retier(tx.init(params), grads, params)
    >>> state.assignment.tiers
    (0, 1)

    References:
      COSMIC, https://github.com/Kranium2002/COSMIC
    """
    policy = TierPolicy() if policy is None else policy
    for tier, tx in tiers.items():
        check_link("tiered_state", f"tiers[{tier}]", tx)
    if not tiers or min(tiers) < 0:
        raise ValueError(
            f"tiered_state: `tiers` must have keys of 0 or greater, got {sorted(tiers)}"
        )
    unknown = set(dict(policy.fractions)) - set(tiers)
    if unknown:
        raise ValueError(
            f"tiered_state: `policy` has fractions for tiers {sorted(unknown)}, `tiers` has "
            f"{sorted(tiers)}; give each of them a transform"
        )
    transforms = {tier: optax.with_extra_args_support(tx) for tier, tx in tiers.items()}
    lowest = min(tiers)

    def init(params: Tree) -> TieredState:
        check_params("tiered_state", params)
        leaves = jax.tree.leaves(params)
        assignment = Assignment((lowest,) * len(leaves), policy, transforms)
        count = jnp.zeros((), jnp.int32)
        memory = jax.tree.map(jnp.asarray, policy.memory(len(leaves)))
        if is_placeholder(params):  # the states of single tensors are no trees like the parameters
            anything: Any = np.zeros(())
            return TieredState(Assignment(ANY, ANY, None), count, anything, memory)
        inner = tuple(transforms[lowest].init(leaf) for leaf in leaves)
        state = TieredState(assignment, count, inner, memory)
        bound = policy.budget(leaves)
        if bound is not None and policy.budget_counts == "state" and state_bytes(state) > bound:
            raise ValueError(
                f"tiered_state: the budget must hold the lowest tier, {state_bytes(state)} bytes, got {bound}"
            )
        return state

    def update(
        updates: Tree, state: TieredState, params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, TieredState]:
        leaves, treedef = jax.tree.flatten(updates)
        assignment = state.assignment
        if len(leaves) != len(assignment.tiers):
            raise ValueError(
                f"tiered_state: the state has {len(assignment.tiers)} tensors, the gradients "
                f"have {len(leaves)}; pass the tree that `init` was given"
            )
        count = increment(state.count)
        full_sync = _is_full_sync(assignment.policy, count)
        counts_as = {
            tier: jnp.where(full_sync, synced, tier) if synced != tier else tier
            for tier, synced in zip(assignment.tiers, _synced(assignment), strict=True)
        }
        param_leaves = [None] * len(leaves)
        if params is not None:
            param_leaves = jax.tree.leaves(where_updated(updates, params))
        # Extra arguments in the shape of the gradients are handed out tensor by tensor.
        split = {
            k: treedef.flatten_up_to(v)
            for k, v in extra_args.items()
            if jax.tree.structure(v) == treedef
        }
        shared = {k: v for k, v in extra_args.items() if k not in split} | {"step": count}

        @functools.cache
        def updated(tier: int) -> Any:
            given = {**shared, "tier": tier, "synced_tier": counts_as[tier]}

            def one(leaf: jax.Array, state: Any, param: Any, own: dict[str, Any]) -> Any:
                return transforms[tier].update(leaf, state, param, **given, **own)

            # In a trace, tensors of one tier that are alike share what is traced for the first.
            return jax.jit(one) if isinstance(count, jax.core.Tracer) else one

        new, inner = [], []
        for i, (leaf, param) in enumerate(zip(leaves, param_leaves, strict=True)):
            own = {k: v[i] for k, v in split.items()}
            u, s = updated(assignment.tiers[i])(leaf, state.inner[i], param, own)
            new.append(u)
            inner.append(s)
        return jax.tree.unflatten(treedef, new), state._replace(count=count, inner=tuple(inner))

    return optax.GradientTransformationExtraArgs(*typed(init, update))
