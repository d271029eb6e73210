"""Successive halving ranks candidates in every condition, and keeps those whose ranks add up to least."""

import numpy as np
import optax

from chainrule.evidence.experiment import Arm, Metric
from chainrule.evidence.halving import halve

GRID = {"learning_rate": (0.01, 0.1, 1.0)}


def test_ranks_decide_over_conditions_and_what_diverged_is_last():
    losses = {
        "diverged": [np.nan, np.nan],  # ranks 4 + 4
        "lopsided": [0.1, 9.0],  # 1 + 3, though its mean loss is the largest
        "even": [2.0, 2.0],  # 2 + 2
        "worst": [5.0, 1.0],  # 3 + 1
    }
    candidates = {
        name: [Arm(f"{name}{c}", "candidate", lambda h: optax.identity(), GRID) for c in "ab"]
        for name in losses
    }
    asked = []

    def score(arm, number, evaluations):
        asked.append((arm.name, number, evaluations))
        if number == 1 and arm.name.startswith("even"):
            return 0.0
        return losses[arm.name[:-1]]["ab".index(arm.name[-1])]

    rounds = halve(candidates, [(2, 3), (4, 1)], Metric("loss", "loss", 0.0, better=-1), score)
    assert [each.evaluations for each in rounds] == [2, 4]
    assert rounds[0].kept == ["lopsided", "even", "worst"]  # equal sums: in the order given
    assert list(rounds[1].scores) == rounds[0].kept
    assert rounds[1].kept == ["even"]
    assert len(asked) == 2 * 4 + 2 * 3
