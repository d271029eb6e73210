"""Tensors in tiers: who updates them, how they move, and what they may cost."""

import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import chainrule
from chainrule.transforms import TierPolicy, adopt, assign, chain, retier, tiered_state
from harness import assert_identical, compiled_once, run, signature_of

TIERS = {2: optax.scale_by_adam(), 1: optax.trace(0.9), 0: optax.scale_by_sign()}
PARAMS = {"a": jnp.ones(4), "b": jnp.ones((2, 3)), "c": jnp.ones(2)}
GRADS = {"a": jnp.full(4, 0.1), "b": jnp.full((2, 3), 9.0), "c": jnp.full(2, -1.0)}
QUICK = TierPolicy(
    {2: 0.3, 1: 0.3},
    reassignment_interval=1,
    min_tier_steps=0,
    warmup_steps=0,
    signal_ema_decay=None,
    confirmations=1,
    full_sync_interval=None,
)


def tiers_of(state):
    return state.assignment.tiers


def test_each_tensor_is_updated_by_the_transform_of_its_tier():
    tx = tiered_state(TIERS, QUICK)
    seen, state = run(tx, PARAMS, [GRADS] * 3, assign(tx.init(PARAMS), (0, 1, 2), PARAMS))
    for name, tier in (("a", 0), ("b", 1), ("c", 2)):
        alone, inner = run(TIERS[tier], PARAMS[name], [GRADS[name]] * 3)
        assert_identical([u[name] for u in seen], alone)
        assert_identical(state.inner[tier], inner)


def test_they_start_in_the_lowest_and_move_by_their_signal():
    tx = tiered_state(TIERS, QUICK)
    state = tx.init(PARAMS)
    assert tiers_of(state) == (0, 0, 0)
    state = retier(state, GRADS, PARAMS)
    assert tiers_of(state) == (0, 2, 1)
    assert chainrule.metrics(state)["tier_occupancy"] == {0: 1, 1: 1, 2: 1}
    _, state = tx.update(GRADS, state, PARAMS)
    state = retier(
        state, {**GRADS, "a": 100 * GRADS["b"][0, 0] * jnp.ones(4), "b": GRADS["b"] / 1e3}, PARAMS
    )
    assert tiers_of(state) == (2, 0, 1)


def test_a_tensor_that_moves_starts_afresh_and_the_others_keep_their_state():
    tx = tiered_state(TIERS, QUICK)
    _, state = run(tx, PARAMS, [GRADS] * 2, assign(tx.init(PARAMS), (2, 2, 1), PARAMS))
    moved = assign(state, (2, 1, 1), PARAMS)
    assert_identical(moved.inner[0], state.inner[0])
    assert_identical(moved.inner[1], TIERS[1].init(PARAMS["b"]))
    assert_identical(moved.inner[2], state.inner[2])
    assert moved.count == state.count


def test_nothing_due_is_the_same_object():
    state = tiered_state(TIERS, TierPolicy(first_reassignment=None)).init(PARAMS)
    assert retier(state, GRADS, PARAMS) is state


def test_an_assignment_compiles_once():
    tx = tiered_state(TIERS, QUICK)
    step = compiled_once(tx.update)
    state = tx.init(PARAMS)
    for _ in range(3):
        state = retier(state, GRADS, PARAMS)
        _, new = step(GRADS, state, PARAMS)
        assert signature_of(new) == signature_of(state)
        state = new


def test_it_is_found_inside_other_states():
    tx = optax.chain(chain(tiered_state(TIERS, QUICK), optax.scale(-1.0)), optax.identity())
    state = retier(tx.init(PARAMS), GRADS, PARAMS)
    assert tiers_of(state[0][0]) == (0, 2, 1)


def test_a_pickled_state_gets_its_transforms_back():
    tx = tiered_state(TIERS, QUICK)
    state = pickle.loads(pickle.dumps(retier(tx.init(PARAMS), GRADS, PARAMS)))
    with pytest.raises(ValueError, match=r"was pickled; call `chainrule.transforms.adopt"):
        retier(state, GRADS, PARAMS)
    state = adopt(state, tx, PARAMS)
    assert tiers_of(retier(state, GRADS, PARAMS)) == (0, 2, 1)


@pytest.mark.parametrize("budget", [0, 60, 100, 10_000])
def test_the_budget_bounds_every_byte_of_state(budget):
    fixed = chainrule.metrics(tiered_state(TIERS, QUICK).init(PARAMS))["state_bytes"]
    policy = dataclasses.replace(QUICK, fractions={2: 1.0}, budget_bytes=fixed + budget)
    tx = tiered_state(TIERS, policy)
    state = tx.init(PARAMS)
    for _ in range(3):
        state = retier(state, GRADS, PARAMS)
        assert chainrule.metrics(state)["state_bytes"] <= fixed + budget
        _, state = tx.update(GRADS, state, PARAMS)
    promoted = sum(tier > 0 for tier in tiers_of(state))
    assert promoted == {0: 0, 60: 1, 100: 2, 10_000: 3}[budget]


def test_several_states_share_one_budget():
    one = chainrule.metrics(tiered_state(TIERS, QUICK).init(PARAMS))["state_bytes"]
    policy = dataclasses.replace(QUICK, fractions={2: 1.0}, budget_bytes=2 * one + 60)
    tx = tiered_state(TIERS, policy)
    states = retier((tx.init(PARAMS),) * 2, (GRADS, GRADS), (PARAMS, PARAMS))
    assert sum(chainrule.metrics(s)["state_bytes"] for s in states) <= 2 * one + 60
    assert sum(tier > 0 for s in states for tier in tiers_of(s)) == 1


def test_forced_tensors_are_put_in_the_highest_tier():
    policy = dataclasses.replace(QUICK, forced=("a",))
    state = retier(tiered_state(TIERS, policy).init(PARAMS), GRADS, PARAMS)
    assert tiers_of(state)[0] == 2


def test_later_links_are_told_the_tiers_and_a_full_sync():
    policy = TierPolicy(full_sync_interval=2, full_sync_tier=1)
    tx = tiered_state(TIERS, policy)
    state, seen = assign(tx.init(PARAMS), (0, 1, 2), PARAMS), []
    for _ in range(2):
        _, state = tx.update(GRADS, state, PARAMS)
        posted = state.posted()
        seen.append(bool(posted.pop("full_sync")))
        assert posted == {"tiers": (0, 1, 2), "synced_tiers": (1, 1, 2)}
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("tiers", "policy", "message"),
    [
        ({}, None, r"`tiers` must have keys of 0 or greater, got \[\]"),
        ({-1: optax.identity()}, None, r"keys of 0 or greater, got \[-1\]"),
        ({0: optax.identity()}, None, r"fractions for tiers \[1, 2\], `tiers` has \[0\]"),
    ],
)
def test_bad_tiers_are_named(tiers, policy, message):
    with pytest.raises(ValueError, match=message):
        tiered_state(tiers, policy)


def test_a_budget_below_the_lowest_tier_is_an_error():
    tx = tiered_state(TIERS, TierPolicy(budget_bytes=1))
    with pytest.raises(ValueError, match=r"the budget must hold the lowest tier, \d+ bytes, got 1"):
        tx.init(PARAMS)


@pytest.mark.parametrize("empty", [{}, [None]], ids=str)
def test_a_tree_without_tensors_has_nothing_to_move(empty):
    tx = tiered_state(TIERS, QUICK)
    state = tx.init(empty)
    assert retier(state, empty, empty) is state


def test_gradients_of_another_number_of_tensors_are_an_error():
    tx = tiered_state(TIERS, QUICK)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"the state has 3 tensors, the gradients have 1"):
        tx.update({"a": GRADS["a"]}, state)
    with pytest.raises(ValueError, match=r"a tiered state has 3 tensors, the gradients 1"):
        retier(state, {"a": GRADS["a"]}, PARAMS)


@pytest.mark.parametrize(
    ("tiers", "got"),
    [
        ({"a": 0, "b": 1}, r"\{'a': 0, 'b': 1\}"),
        ({0: 0, 1: 1}, r"\{0: 0, 1: 1\}"),
        ([{"a": 0}, 1], r"\[\{'a': 0\}, 1\]"),
        ("01", "'01'"),
        ({0, 1}, r"\{0, 1\}"),
        ([0.0, 1.5], r"\[0\.0, 1\.5\]"),
        (1, "1"),
    ],
)
def test_assign_says_what_it_takes(tiers: Any, got: str) -> None:
    links = {0: optax.scale_by_sign(), 1: optax.scale_by_adam()}
    tx = tiered_state(links, TierPolicy(fractions={}))
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    message = (
        rf"assign: `tiers` must be .* for each of 2 tensors, .*, got {got}; .*jax\.tree\.leaves"
    )
    with pytest.raises(TypeError, match=message):
        assign(tx.init(params), tiers, params)
    leaves = jax.tree.leaves({"a": 0, "b": 1})  # the remedy for a tree
    assert assign(tx.init(params), leaves, params).assignment.tiers == (0, 1)
