"""Paired intervals, Holm's correction and the verdict. SciPy has the t distribution."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

ALPHA = 0.05
LEAST_SEEDS = 5
"""Fewer equal differences say nothing."""
REPRODUCED = "reproduced"
EXPLAINED = "explained by lr/decay"
NOT_REPRODUCED = "not reproduced"
REVERSED = "reversed"
UNDECIDED = "undecided"


class Interval(NamedTuple):
    """A mean paired difference and its confidence interval; positive means better."""

    effect: float
    low: float
    high: float


class Comparison(NamedTuple):
    """One arm's results against another's on the same seeds."""

    n: int
    interval: Interval
    """At level 1 - `ALPHA`, for this comparison alone."""
    corrected: Interval
    """At the level that Holm's procedure leaves it: without 0 exactly if that rejects."""
    p: float
    """Holm's adjusted p-value."""


def paired(ours: Sequence[float], theirs: Sequence[float], level: float) -> tuple[Interval, float]:
    """The t interval of mean(ours - theirs) and its p-value.

    >>> interval, p = paired([3.0, 4.0, 5.5], [1.0, 2.5, 3.0], 0.95)
    >>> print(f"{interval.effect:.2f} [{interval.low:.2f}, {interval.high:.2f}] p = {p:.3f}")
    2.00 [0.76, 3.24] p = 0.020
    """
    difference = np.asarray(ours, float) - np.asarray(theirs, float)
    effect = float(np.mean(difference))
    alike = (
        np.ptp(difference) == 0
    )  # the t statistic is 0/0 or infinite, and few seeds are alike by chance
    least = LEAST_SEEDS if alike else 2
    if len(difference) < least or not np.all(np.isfinite(difference)):
        return Interval(effect, -np.inf, np.inf), 1.0
    if alike:
        return Interval(effect, effect, effect), float(effect == 0)
    result: Any = stats.ttest_1samp(difference, 0)
    low, high = result.confidence_interval(level)
    return Interval(effect, float(low), float(high)), float(result.pvalue)


def compare(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[Comparison]:
    """Each pair (ours, theirs) of paired results, in one family for Holm's procedure."""
    if not pairs:
        return []
    alone = [paired(ours, theirs, 1 - ALPHA) for ours, theirs in pairs]
    p = np.array([value for _, value in alone])
    order = np.argsort(p, kind="stable")
    ranks = np.empty(len(p), int)
    ranks[order] = np.arange(len(p))
    # Holm tests the k-th smallest p at ALPHA / (m - k) and stops at the first that it keeps.
    adjusted = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)[ranks]
    levels = ALPHA / (len(p) - np.minimum(ranks, (adjusted <= ALPHA).sum()))
    return [
        Comparison(
            len(ours),
            alone[i][0],
            paired(ours, theirs, 1 - levels[i])[0],
            float(adjusted[i]),
        )
        for i, (ours, theirs) in enumerate(pairs)
    ]


def verdict(gain: Interval, over_off: Interval | None, margin: float) -> str:
    """What the intervals say about a claim.

    Args:
      gain: of the method over the tuned baseline, positive if better.
      over_off: of the method over itself with the mechanism off; `None` where there is no such arm.
      margin: the largest difference that does not matter.

    Returns:
      "reversed": worse, and maybe by more than the margin; "not reproduced": a gain above the margin is ruled out;
      "undecided": the gain may be zero, or above the margin; and of a gain "reproduced", if the mechanism off is worse;
      "explained by lr/decay", if the mechanism adds no more than the margin; else "undecided".

    >>> verdict(Interval(0.05, 0.03, 0.07), Interval(0.0, -0.01, 0.01), margin=0.01)
    'explained by lr/decay'
    """
    if gain.high < 0 and gain.low < -margin:
        return REVERSED
    if gain.high <= margin:
        return NOT_REPRODUCED
    if gain.low <= 0:
        return UNDECIDED
    if over_off is None:
        return REPRODUCED
    if over_off.high <= margin:
        return EXPLAINED
    return REPRODUCED if over_off.low > 0 else UNDECIDED


class Scenario(NamedTuple):
    """True differences, in standard deviations of a paired difference; the margin is one too."""

    gain: float
    over_off: float
    margin: float = 1.5


SCENARIOS = {
    "no effect": Scenario(0, 0),
    "an effect of the mechanism": Scenario(4, 4),
    "an effect of the rate": Scenario(4, 0),
    "a harm": Scenario(-4, -4),
}


def error_rates(scenario: Scenario, n: int, repeats: int, seed: int = 0) -> dict[str, float]:
    """How often simulated results of `n` seeds get each verdict."""
    random = np.random.default_rng(seed)
    counts: Any = collections.Counter()
    for _ in range(repeats):
        # Three arms with a common part for each seed, as pairing has it.
        arm, baseline, off = random.normal(0, np.sqrt(0.5), (3, n)) + random.normal(0, 3, n)
        baseline, off = baseline - scenario.gain, off - scenario.over_off
        gain, over_off = compare([(arm, baseline), (arm, off)])
        counts[verdict(gain.corrected, over_off.corrected, scenario.margin)] += 1
    return {name: count / repeats for name, count in counts.items()}
