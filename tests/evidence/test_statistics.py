"""Intervals, Holm's correction and the verdict, on data whose truth is known."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from chainrule.evidence import statistics
from chainrule.evidence.statistics import SCENARIOS, Interval, compare, error_rates, paired, verdict

REPEATS = 150


def most(rate: float) -> float:
    """A share of `REPEATS` that a true rate exceeds once in 100,000 times."""
    return float(stats.binom.ppf(1 - 1e-5, REPEATS, rate)) / REPEATS


def test_the_interval_is_the_formula():
    ours, theirs = np.random.default_rng(0).normal(size=(2, 7))
    interval, p = paired(ours, theirs, 0.9)
    difference = ours - theirs
    half = stats.t.ppf(0.95, 6) * difference.std(ddof=1) / 7**0.5
    expected = difference.mean() + np.array([0, -half, half])
    np.testing.assert_allclose(interval, expected, rtol=1e-12)
    statistic = difference.mean() / (difference.std(ddof=1) / 7**0.5)
    assert p == pytest.approx(2 * stats.t.sf(abs(statistic), 6))


def test_one_seed_and_a_diverged_run_say_nothing():
    assert paired([1.0], [0.0], 0.95) == (Interval(1.0, -np.inf, np.inf), 1.0)
    interval, p = paired([1.0, np.nan, 2.0], [0.0, 0.0, 0.0], 0.95)
    assert (interval.low, interval.high, p) == (-np.inf, np.inf, 1.0)


def test_five_equal_differences_are_a_point():
    results = np.arange(5.0)
    assert paired(results, results, 0.95) == (Interval(0.0, 0.0, 0.0), 1.0)
    assert paired(results + 1, results, 0.95) == (Interval(1.0, 1.0, 1.0), 0.0)


def test_few_equal_differences_are_chance():
    assert paired([1.0, 2.0], [1.0, 2.0], 0.95) == (Interval(0.0, -np.inf, np.inf), 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_corrected_intervals_exclude_zero_exactly_where_holm_rejects(seed):
    random = np.random.default_rng(seed)
    pairs = [(random.normal(shift, 1, 6), np.zeros(6)) for shift in (0, 0.5, 1, 1.5, 2)]
    compared = compare(pairs)
    p = [stats.ttest_1samp(ours, 0).pvalue for ours, _ in pairs]
    reject, adjusted, *_ = multipletests(p, statistics.ALPHA, "holm")
    assert [c.corrected.low > 0 or c.corrected.high < 0 for c in compared] == reject.tolist()
    np.testing.assert_allclose([c.p for c in compared], adjusted)
    assert all(c.corrected.low <= c.interval.low for c in compared)


@pytest.mark.parametrize(
    ("gain", "over_off", "expected"),
    [
        ((2, 4), (2, 4), "reproduced"),
        ((2, 4), None, "reproduced"),
        ((2, 4), (-0.5, 0.5), "explained by lr/decay"),
        ((2, 4), (-4, -2), "explained by lr/decay"),
        ((2, 4), (-1, 3), "undecided"),  # the mechanism may be all of it or nothing
        ((-1, 4), (2, 4), "undecided"),
        ((-0.5, 0.5), (2, 4), "not reproduced"),
        ((0.1, 0.9), (2, 4), "not reproduced"),  # surely above zero, and too small to matter
        ((-3, 0.5), None, "not reproduced"),
        ((-0.9, -0.1), None, "not reproduced"),  # surely below zero, and too small to matter
        ((-3, -1), (2, 4), "reversed"),
        ((-np.inf, np.inf), None, "undecided"),
    ],
)
def test_verdict(gain, over_off, expected):
    def interval(ends):
        return None if ends is None else Interval(sum(ends) / 2, *ends)

    assert verdict(interval(gain), interval(over_off), margin=1.0) == expected


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("truth", SCENARIOS)
def test_error_rates(truth, n):
    """A wrong verdict for a reason of chance is as rare as the tests' level says; a large effect is found."""
    rates = error_rates(SCENARIOS[truth], n, REPEATS)
    scenario, level = SCENARIOS[truth], statistics.ALPHA
    if scenario.gain == 0:
        assert rates.get("reproduced", 0) + rates.get("explained by lr/decay", 0) <= most(level)
        assert rates.get("reversed", 0) <= most(level)
    elif scenario.over_off == 0:
        assert rates.get("reproduced", 0) <= most(level)
    # Both comparisons must reject at the stricter level of Holm's two; each is a t test of one sample.
    power = TTestPower().power(abs(scenario.gain), n, level / 2, alternative="two-sided")
    missed = most(min(2 * (1 - power), 1))
    if scenario.gain < 0:
        assert rates.get("reversed", 0) >= 1 - missed
        assert rates.get("reproduced", 0) == 0
    elif scenario.over_off > 0:
        assert rates.get("reproduced", 0) >= 1 - missed
