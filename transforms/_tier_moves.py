"""Moving tensors between the tiers of a `TieredState`, on the host, between steps."""

import dataclasses
import logging
import operator
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from chainrule.transforms._metrics import state_bytes
from chainrule.transforms._trees import is_placeholder, path_name, where_updated
from chainrule.transforms.quantized_state import decode
from chainrule.transforms.tier_policy import TierMemory, tier_signals
from chainrule.transforms.tiered_state import Assignment, TieredState

_logger = logging.getLogger("chainrule.tiers")


def _map_tiered(state: Any, f: Callable[[TieredState], Any]) -> Any:
    """`state` with `f` applied to every `TieredState` in it; the same object where nothing changes."""
    if isinstance(state, TieredState):
        return f(state)
    if isinstance(state, tuple):
        children = [_map_tiered(child, f) for child in state]
        if all(new is old for new, old in zip(children, state, strict=True)):
            return state
        return type(state)(*children) if hasattr(state, "_fields") else tuple(children)
    if isinstance(state, dict):
        children = {k: _map_tiered(v, f) for k, v in state.items()}
        return state if all(children[k] is state[k] for k in state) else type(state)(children)
    if isinstance(state, list):
        return [_map_tiered(child, f) for child in state]
    return state


def _find(state: Any) -> list[TieredState]:
    found: list[TieredState] = []

    def note(node: TieredState) -> TieredState:
        found.append(node)
        return node

    _map_tiered(state, note)
    return found


def adopt(state: Any, tx: optax.GradientTransformation, params: optax.Params) -> Any:
    """Gives every `TieredState` in a state that was pickled the transforms of `tx` back.

    Args:
      state: a state of `tx` that was pickled or otherwise rebuilt.
      tx: the chain.
      params: the parameters.

    Returns:
      The state, ready for `retier`.
    """
    fresh = iter(_find(tx.init(params)))

    def give(node: TieredState) -> TieredState:
        transforms = next(fresh).assignment.transforms
        return node._replace(assignment=dataclasses.replace(node.assignment, transforms=transforms))

    return _map_tiered(state, give)


def assign(state: Any, tiers: Any, params: optax.Params) -> Any:
    """`state` with its tensors moved to the given tiers, whatever the policy says: how a
    checkpoint's shapes are made.

    Args:
      state: the state of a chain with one `TieredState`.
      tiers: one tier a tensor, in the order of `jax.tree.leaves`.
      params: the parameters.

    Returns:
      The state; tensors that moved have a fresh inner state.

    Raises:
      TypeError: `tiers` is no sequence of integers.
      ValueError: another number of tiers than parameters, or a tier that the chain has not.
    """
    if is_placeholder(params):
        return state
    leaves = jax.tree.leaves(params)
    try:
        if isinstance(tiers, (str, Set, Mapping)):  # whose order or letters are not meant
            raise TypeError
        tiers = tuple(map(operator.index, tiers))
    except TypeError:
        raise TypeError(
            f"assign: `tiers` must be an integer for each of {len(leaves)} tensors, in the order of "
            f"`jax.tree.leaves(params)`, got {tiers!r}; write them as a list, and a tree like the parameters as "
            "`jax.tree.leaves(tiers)`"
        ) from None

    def moved(node: TieredState) -> TieredState:
        known = sorted(node.assignment.transforms or ())
        if len(tiers) != len(leaves) or not set(tiers) <= set(known):
            raise ValueError(
                f"assign: `tiers` must be one of {known} for each of {len(leaves)} tensors, got {list(tiers)}"
            )
        return _moved(node, tiers, node.memory, leaves)

    return _map_tiered(state, moved)


def retier(state: Any, grads: optax.Updates, params: optax.Params) -> Any:
    """Moves tensors between tiers where a reassignment is due; call it before each `update`, outside `jit`.

    Args:
      state: any state; every `TieredState` inside it is served. Several states in a tuple, with a
        tuple of gradients and one of parameters, share one budget.
      grads: this step's gradients, like the parameters.
      params: the parameters.

    Returns:
      The state; the same object if nothing was due.

    Raises:
      ValueError: the gradients have another number of tensors than a `TieredState`, or forced
      tensors exceed the budget.
      TypeError: called under `jit` or another transformation of JAX.

    >>> import chainrule
    >>> tx = optax.adam(0.1)
    >>> state = tx.init(jnp.ones(2))
    >>> chainrule.retier(state, jnp.ones(2), jnp.ones(2)) is state
    True
    """
    nodes = _find(state)
    if nodes and any(
        isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((nodes, grads, params))
    ):
        raise TypeError(
            "retier: moves tensors between tiers, which changes the shapes of the state, so it cannot be traced; call "
            "`state = chainrule.retier(state, grads, params)` outside `jit`, before the compiled update"
        )
    due = [  # without a tensor there is nothing to move
        node.assignment.tiers != () and node.assignment.policy.due(int(node.count) + 1)
        for node in nodes
    ]
    if not any(due):
        return state
    parts = [(grads, params)] if len(nodes) == 1 else _parts(state, grads, params, nodes)
    others = sum(state_bytes(node) for node in nodes)
    new = []
    for node, is_due, (g, p) in zip(nodes, due, parts, strict=True):
        before = state_bytes(node)
        moved = _reassigned(node, g, p, others - before) if is_due else node
        others += state_bytes(moved) - before
        new.append(moved)
    replacements = iter(new)
    return _map_tiered(state, lambda _: next(replacements))


def _parts(state: Any, grads: Any, params: Any, nodes: list[TieredState]) -> list[tuple[Any, Any]]:
    """The gradients and parameters of each node: entry by entry for a tuple of states, else the whole trees."""
    if type(state) is tuple and isinstance(grads, tuple) and len(grads) == len(state):
        return [(g, p) for s, g, p in zip(state, grads, params, strict=True) for _ in _find(s)]
    return [(grads, params)] * len(nodes)


def _reassigned(node: TieredState, grads: Any, params: Any, other_bytes: int) -> TieredState:
    assignment, policy, step = node.assignment, node.assignment.policy, int(node.count) + 1
    paths, leaves = zip(
        *jax.tree_util.tree_leaves_with_path(where_updated(grads, params)), strict=True
    )
    gradients = jax.tree.leaves(grads)
    if len(gradients) != len(assignment.tiers) or len(leaves) != len(assignment.tiers):
        raise ValueError(
            f"retier: a tiered state has {len(assignment.tiers)} tensors, the gradients "
            f"{len(gradients)} and the parameters {len(leaves)}; inside `optax.masked` pass the masked trees"
        )
    if assignment.transforms is None:
        raise ValueError(
            "retier: this state was pickled; call `chainrule.transforms.adopt(state, tx, params)` first"
        )
    current = assignment.tiers
    forced = [any(part in path_name(path) for part in policy.forced) for path in paths]
    memory = TierMemory(*(np.asarray(a) for a in node.memory))
    smooth = policy.smooth(memory, tier_signals(gradients))
    if policy.signal_ema_decay is not None:
        memory = memory._replace(signal=smooth.astype(np.float32))
    signals = smooth + [
        policy.mismatch_weight * _mismatch(s) if policy.mismatch_weight else 0.0 for s in node.inner
    ]

    sizes = _sizes(assignment, leaves)
    bound = policy.budget(leaves)
    of_state = policy.budget_counts == "state"
    lowest = min(assignment.transforms)
    fixed = state_bytes(node) - sum(sizes[i][tier] for i, tier in enumerate(current))
    used = other_bytes + fixed + sum(size[lowest] for size in sizes) if of_state else 0

    def cost(i: int, tier: int) -> int:
        return sizes[i][tier] - sizes[i][lowest] if of_state else leaves[i].nbytes

    def fits(i: int, tier: int) -> bool:
        nonlocal used
        if bound is not None and not forced[i] and used + cost(i, tier) > bound:
            return False
        used += cost(i, tier)
        return True

    candidates = policy.candidates(step, signals, forced, fits)
    tiers, memory = policy.move(step, memory, current, signals, candidates, forced)
    if bound is not None and of_state:
        tiers = _within(bound - other_bytes - fixed, sizes, tiers, current, signals, forced, lowest)
    new_node = _moved(node, tuple(tiers), jax.tree.map(jnp.asarray, memory), list(leaves))
    moves = [(new, old) for new, old in zip(tiers, current, strict=True) if new != old]
    if moves:
        promotions = sum(new > old for new, old in moves)
        event = {
            "step": step,
            "promotions": promotions,
            "demotions": len(moves) - promotions,
            **{f"tier{tier}": tiers.count(tier) for tier in sorted(assignment.transforms)},
            "state_bytes_before": state_bytes(node),
            "state_bytes": state_bytes(new_node),
        }
        _logger.info("tier_transition", extra={"event": event})
    return new_node


def _sizes(assignment: Assignment, leaves: Any) -> list[dict[int, int]]:
    """Bytes of the inner state of each tensor in each tier."""
    transforms = assignment.transforms
    assert transforms is not None
    cache: dict[Any, int] = {}

    def size(tier: int, leaf: Any) -> int:
        key = tier, leaf.shape, leaf.dtype
        if key not in cache:
            struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            state = jax.eval_shape(transforms[tier].init, struct)
            cache[key] = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(state))
        return cache[key]

    return [{tier: size(tier, leaf) for tier in transforms} for leaf in leaves]


def _within(
    bound: int,
    sizes: list[dict[int, int]],
    tiers: Sequence[int],
    current: Sequence[int],
    signals: np.ndarray,
    forced: Sequence[bool],
    lowest: int,
) -> list[int]:
    """`tiers` made to fit: refused demotions may leave no room for all promotions, so the weakest
    signals give way."""
    tiers = list(tiers)
    total = sum(sizes[i][tier] for i, tier in enumerate(tiers))
    # First the promotions of this step are taken back, the weakest first; then tensors are demoted.
    promoted = [i for i, tier in enumerate(tiers) if tier > current[i] and not forced[i]]
    held = [i for i, tier in enumerate(tiers) if tier > lowest and not forced[i]]
    steps = [(i, current[i]) for i in sorted(promoted, key=lambda i: signals[i])]
    steps += [(i, lowest) for i in sorted(held, key=lambda i: signals[i])]
    for i, tier in steps:
        if total <= bound:
            return tiers
        total += sizes[i][tier] - sizes[i][tiers[i]]
        tiers[i] = tier
    if total > bound:
        raise ValueError(
            f"retier: the budget leaves {bound} bytes for inner states, the forced tensors need {total}"
        )
    return tiers


def _mismatch(inner: Any) -> float:
    """mean|mu - mu_long| of the part of a state that has both, else 0."""

    def dual(node: Any) -> bool:
        return getattr(node, "mu", None) is not None and getattr(node, "mu_long", None) is not None

    for node in jax.tree.leaves(inner, is_leaf=dual):
        if dual(node):
            mu, mu_long = decode((node.mu, node.mu_long))
            difference = np.asarray(mu, np.float64) - np.asarray(mu_long, np.float64)
            return float(np.abs(difference).mean())
    return 0.0


def _moved(
    node: TieredState, tiers: tuple[int, ...], memory: TierMemory, leaves: list[Any]
) -> TieredState:
    """The node with each tensor in its tier: the state is kept where two tiers have the same, else
    made afresh."""
    assignment, transforms = node.assignment, node.assignment.transforms
    assert transforms is not None

    def state_of(i: int) -> Any:
        if tiers[i] == assignment.tiers[i]:
            return node.inner[i]
        fresh = transforms[tiers[i]].init(leaves[i])
        same = jax.tree.structure(fresh) == jax.tree.structure(node.inner[i])
        return node.inner[i] if same and jax.tree.leaves(fresh) else fresh

    inner = tuple(state_of(i) for i in range(len(tiers)))
    return TieredState(dataclasses.replace(assignment, tiers=tiers), node.count, inner, memory)
