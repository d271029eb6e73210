"""Tuning finds the optimum inside the grid, or says that it did not."""

import math

import pytest

from chainrule.evidence.experiment import Arm, Metric, Setting, log_grid
from chainrule.evidence.tuning import tune

LOSS = Metric("loss", "loss", margin=0.0, better=-1)
GRID = {"rate": (0.01, 0.1, 1.0)}


def setting(extensions: int = 4, grid_points: int | None = None) -> Setting:
    return Setting(10, 1, 2, 1, 2, extensions=extensions, grid_points=grid_points)


def bowl(*best):
    """Losses of points, least at `best` in every hyperparameter; and the points asked for."""
    asked = []

    def scores(points):
        asked.extend(points)
        return [
            sum(math.log(v / b) ** 2 for v, b in zip(p.values(), best, strict=True)) for p in points
        ]

    return scores, asked


def test_an_optimum_inside_needs_no_more_trials():
    scores, asked = bowl(0.1)
    tuned = tune(GRID, LOSS, setting(), scores)
    assert tuned == ({"rate": 0.1}, GRID, (), (), 3)
    assert len(asked) == 3


@pytest.mark.parametrize(("best", "end"), [(1e-4, "down"), (100.0, "up")])
def test_the_grid_grows_until_the_optimum_is_inside(best, end):
    scores, asked = bowl(best)
    tuned = tune(GRID, LOSS, setting(), scores)
    assert tuned.point == {"rate": best}
    assert tuned.extended == (f"rate {end}",) * 3
    assert tuned.at_edge == ()
    assert tuned.trials == len(asked) == 6  # none twice


def test_growth_is_bounded_and_the_edge_is_recorded():
    scores, _ = bowl(1e9)
    tuned = tune(GRID, LOSS, setting(extensions=2), scores)
    assert tuned.point == {"rate": 100.0}
    assert tuned.at_edge == ("rate up",)
    assert len(tuned.extended) == 2


def test_each_axis_grows_by_itself():
    scores, _ = bowl(10.0, 0.1)
    tuned = tune(GRID | {"decay": (0.01, 0.1, 1.0)}, LOSS, setting(), scores)
    assert tuned.point == {"rate": 10.0, "decay": 0.1}
    assert tuned.extended == ("rate up",) * 2
    assert tuned.trials == 15


def test_a_diverged_point_is_worse_than_all():
    tuned = tune(GRID, LOSS, setting(), lambda points: [5.0, 4.0, math.nan][: len(points)])
    assert tuned.point == {"rate": 0.1}


def test_quick_keeps_the_middle():
    scores, asked = bowl(0.1)
    tune({"rate": log_grid(1e-3, 1e1, 5)}, LOSS, setting(0, grid_points=3), scores)
    assert [point["rate"] for point in asked] == [0.01, 0.1, 1.0]


@pytest.mark.parametrize(
    "grid", [{"rate": (0.1, 1.0)}, {"rate": (0.0, 0.1, 1.0)}, {"r": (1, 2, 2)}]
)
def test_a_grid_is_rising_and_positive(grid):
    with pytest.raises(ValueError, match="at least 3 rising positive numbers"):
        Arm("a", "claim", lambda h: h, grid)


def test_tuning_seeds_are_never_reported():
    with pytest.raises(ValueError, match="seeds from there on tune"):
        Setting(10, 1, seeds=1001, tuning_seeds=1, block=1)
