"""Tuning: every arm starts from equally many trials, and a grid grows until the optimum is inside it.

Scores are means over seeds that no result uses. A grid that still has its optimum at an end after `extensions` steps is
recorded with that end, for the report to say.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from chainrule.evidence.experiment import Metric, Point, Setting, is_better

Axes = dict[str, tuple[float, ...]]


class Tuned(NamedTuple):
    """What tuning an arm found."""

    point: Point
    axes: Axes
    """Every value that was tried."""
    extended: tuple[str, ...]
    """Each step beyond the first grid, such as "learning_rate up"."""
    at_edge: tuple[str, ...]
    """Axes whose optimum is at their end after all."""
    trials: int
    """Grid points tried."""


def first_axes(grid: Mapping[str, tuple[float, ...]], keep: int | None) -> Axes:
    """The grid to start from: each axis, or `keep` values in its middle."""
    axes = {}
    for axis, values in grid.items():
        drop = 0 if keep is None else max(len(values) - keep, 0) // 2
        axes[axis] = tuple(values[drop : len(values) if keep is None else drop + keep])
    return axes


def tune(
    grid: Mapping[str, tuple[float, ...]],
    metric: Metric,
    setting: Setting,
    scores: Callable[[list[Point]], list[float]],
) -> Tuned:
    """The best point of `grid`, extended where the best is at an end.

    Args:
      grid: values in equal ratios, by hyperparameter.
      metric: says which score is better.
      setting: says which part of the grid to start from, and how often each end may grow.
      scores: trains points and returns the mean score of each, NaN where a run diverged.
    """
    axes, extended = first_axes(grid, setting.grid_points), []
    known: dict[tuple[float, ...], float] = {}
    while True:
        new = [values for values in itertools.product(*axes.values()) if values not in known]
        points: list[Point] = [dict(zip(axes, values, strict=True)) for values in new]
        known.update(zip(new, scores(points), strict=True))
        best = max(known, key=lambda values: _rank(known[values], metric))
        edges = _edges(axes, best)
        growing = [edge for edge in edges if extended.count(edge) < setting.extensions]
        if not growing:
            point = dict(zip(axes, best, strict=True))
            return Tuned(point, axes, tuple(extended), tuple(edges), len(known))
        for edge in growing:
            axis, _, end = edge.rpartition(" ")
            axes[axis] = grown(axes[axis], end)
        extended += growing


def best_of(scores: Iterable[float], metric: Metric) -> float:
    """The best score; NaN if all are."""
    return max(scores, key=lambda score: _rank(score, metric))


def _rank(score: float, metric: Metric) -> Any:
    return (is_better(score, float("nan"), metric), metric.better * score if score == score else 0)


def _edges(axes: Axes, best: tuple[float, ...]) -> list[str]:
    """The ends that `best` is at."""
    at = zip(axes.items(), best, strict=True)
    return [
        f"{axis} {end}"
        for (axis, values), value in at
        for end, last in (("down", values[0]), ("up", values[-1]))
        if value == last
    ]


def grown(values: tuple[float, ...], end: str) -> tuple[float, ...]:
    """`values` and one more beyond an end, in the same ratio.

    >>> grown((0.1, 0.2, 0.4), "up")
    (0.1, 0.2, 0.4, 0.8)
    """
    if end == "up":
        return (*values, float(f"{values[-1] ** 2 / values[-2]:.3g}"))
    return (float(f"{values[0] ** 2 / values[1]:.3g}"), *values)
