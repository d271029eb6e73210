"""Signals, candidates and confirmed moves, on the host."""

import dataclasses

import numpy as np
import pytest

import bounds
from chainrule.transforms import TierPolicy, tier_signal


def anything_fits(tensor, tier):
    return True


QUICK = {"min_tier_steps": 0, "warmup_steps": 0, "signal_ema_decay": None}


def signal(g):
    g = np.asarray(g, np.float64).ravel()
    a, rms = np.abs(g).mean(), np.sqrt(np.mean(g * g))
    spread, peak = g.var() / (a * a + 1e-12), np.abs(g).max() / (a + 1e-12)
    return (a + 0.1 * rms) * (1 + 0.25 * min(spread, 8)) * (1 + 0.1 * min(peak, 8))


@pytest.mark.parametrize(
    "g", [[1.0, -2.0, 0.5], [3.0], np.eye(20), [0.0, 0.0], np.full(5, -1e-8)], ids=len
)
def test_the_signal_is_the_formula(g):
    np.testing.assert_allclose(tier_signal(g), signal(g), rtol=bounds.summed(400, "float64"))


def test_an_empty_tensor_has_no_signal():
    assert tier_signal(np.zeros((0, 3))) == 0


def candidates(policy, signals, step=1, forced=None, fits=anything_fits):
    return policy.candidates(step, np.array(signals), forced or [False] * len(signals), fits)


def test_the_strongest_are_candidates():
    policy = TierPolicy({2: 0.25, 1: 0.5})
    assert candidates(policy, [1.0, 4.0, 2.0, 3.0]) == [0, 2, 1, 1]
    assert candidates(policy, [1.0, 1.0, 1.0, 1.0]) == [2, 1, 1, 0]  # the first, of equals


@pytest.mark.parametrize(("rounding", "expected"), [("up", [1]), ("half_even", [0])])
def test_a_single_tensor_can_leave_the_lowest_tier(rounding, expected):
    assert candidates(TierPolicy({1: 0.5}, rounding=rounding), [1.0]) == expected


def test_warmup_has_its_own_fractions():
    policy = TierPolicy({1: 0.0}, warmup_fractions={1: 1.0}, warmup_steps=5)
    assert candidates(policy, [1.0, 2.0], step=4) == [1, 1]
    assert candidates(policy, [1.0, 2.0], step=5) == [0, 0]


def test_forced_tensors_come_first_and_take_a_place():
    policy = TierPolicy({1: 0.5})
    assert candidates(policy, [1.0, 4.0, 2.0, 3.0], forced=[True, False, False, False]) == [
        1,
        1,
        0,
        0,
    ]


def test_what_does_not_fit_gives_way_to_what_does():
    policy = TierPolicy({2: 0.5, 1: 0.5})
    assert candidates(policy, [3.0, 2.0], fits=lambda tensor, tier: tier < 2) == [1, 0]


def moved(policy, rounds, current=(0,), step=10):
    """The tiers after each round of (signals, candidates)."""
    memory, tiers, seen = policy.memory(len(current)), list(current), []
    for i, (signals, wanted) in enumerate(rounds):
        no = [False] * len(tiers)
        tiers, memory = policy.move(step + i, memory, tiers, np.array(signals), wanted, no)
        seen.append(tuple(tiers))
    return seen


def test_the_first_assignment_is_immediate_and_others_are_confirmed():
    policy = TierPolicy({1: 1.0}, confirmations=2, **QUICK)
    rounds = [([1.0], [0]), ([2.0], [1]), ([2.0], [1]), ([2.0], [1])]
    assert moved(policy, rounds) == [(0,), (0,), (1,), (1,)]


def test_a_refusal_starts_the_count_again():
    policy = TierPolicy({1: 1.0}, confirmations=2, **QUICK)
    rounds = [([1.0], [0]), ([2.0], [1]), ([2.0], [0]), ([2.0], [1]), ([2.0], [1])]
    assert [tier for (tier,) in moved(policy, rounds)] == [0, 0, 0, 0, 1]


def test_a_move_needs_the_margin():
    policy = TierPolicy({1: 1.0}, confirmations=1, signal_margin=0.5, **QUICK)
    assert moved(policy, [([1.0], [0]), ([1.4], [1]), ([1.5], [1])]) == [(0,), (0,), (1,)]
    assert moved(policy, [([1.0], [1]), ([0.6], [0]), ([0.5], [0])]) == [(1,), (1,), (0,)]


def test_the_margin_is_since_the_last_move_or_the_last_reassignment():
    rounds = [([1.0], [0]), ([1.3], [1]), ([1.6], [1])]
    settings = {**QUICK, "confirmations": 1, "signal_margin": 0.5}
    for baseline, last in (("last_move", 1), ("last_reassignment", 0)):
        policy = TierPolicy({1: 1.0}, margin_baseline=baseline, **settings)
        assert moved(policy, rounds)[-1] == (last,)


def test_a_tensor_stays_a_while_and_is_not_demoted_in_warmup():
    settings = {**QUICK, "confirmations": 1, "signal_margin": 0.0}
    stays = TierPolicy({1: 1.0}, **{**settings, "min_tier_steps": 2})
    assert moved(stays, [([1.0], [0]), ([2.0], [1]), ([2.0], [1])]) == [(0,), (0,), (1,)]
    warm = TierPolicy({1: 1.0}, **{**settings, "warmup_steps": 12})
    assert moved(warm, [([2.0], [1]), ([1.0], [0]), ([1.0], [0])]) == [(1,), (1,), (0,)]


def test_the_signal_is_smoothed_from_its_first_value():
    policy = TierPolicy(signal_ema_decay=0.75)
    memory = policy.memory(2)
    first = policy.smooth(memory, np.array([1.0, 2.0]))
    np.testing.assert_array_equal(first, [1.0, 2.0])
    memory = memory._replace(signal=first)
    np.testing.assert_allclose(policy.smooth(memory, np.array([5.0, 2.0])), [2.0, 2.0])


def test_when_it_is_due():
    policy = TierPolicy(reassignment_interval=4, first_reassignment=1)
    assert [step for step in range(1, 10) if policy.due(step)] == [1, 4, 8]
    late = dataclasses.replace(policy, first_reassignment=None)
    assert [step for step in range(1, 10) if late.due(step)] == [4, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fractions": {1: 1.5}}, r"`fractions` must be in \[0, 1\], got \{1: 1.5\}"),
        ({"reassignment_interval": 0}, r"`reassignment_interval` must be in \[1, inf\], got 0"),
        ({"signal_ema_decay": 1.0}, r"`signal_ema_decay` must be in \[0, 0.99"),
        ({"confirmations": 0}, r"`confirmations` must be in \[1, inf\], got 0"),
        ({"budget_bytes": -1}, r"`budget_bytes` must be in \[0, inf\], got -1"),
        ({"rounding": "down"}, r"`rounding` must be one of 'up', 'half_even', got 'down'"),
        ({"budget_counts": "all"}, r"`budget_counts` must be one of 'state', 'parameters'"),
        ({"margin_baseline": "first"}, r"`margin_baseline` must be one of 'last_move'"),
    ],
)
def test_bad_numbers_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"TierPolicy: {message}"):
        TierPolicy(**arguments)
