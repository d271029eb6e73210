"""Successive halving: many candidates train for a little, the best of them for longer, until few are left to tune.

Rounds have seeds of their own, so that what is kept was not lucky twice. In each a candidate is as good as the best
point of its grid, and is ranked in every condition; the sums of its ranks decide.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from chainrule.evidence.experiment import Arm, Metric


class Round(NamedTuple):
    """What came of a round."""

    evaluations: int
    """How long each trained."""
    scores: dict[str, list[float]]
    """By candidate, one a condition."""
    kept: list[str]
    """The best, best first."""


def halve(
    candidates: Mapping[str, Sequence[Arm]],
    rounds: Sequence[tuple[int, int]],
    metric: Metric,
    score: Callable[[Arm, int, int], float],
) -> list[Round]:
    """All rounds.

    Args:
      candidates: the arms of each, one a condition.
      rounds: (evaluations, candidates kept) of each.
      metric: says which score is better.
      score: of an arm in a round (its number, its evaluations); NaN where it diverged.
    """
    alive, done = list(candidates), []
    for number, (evaluations, keep) in enumerate(rounds):
        scores = {
            name: [score(arm, number, evaluations) for arm in candidates[name]] for name in alive
        }
        table = -metric.better * np.array([scores[name] for name in alive])
        ranks = stats.rankdata(np.where(np.isnan(table), np.inf, table), axis=0).sum(1)
        alive = [alive[i] for i in np.argsort(ranks, kind="stable")[:keep]]
        done.append(Round(evaluations, scores, alive))
    return done
