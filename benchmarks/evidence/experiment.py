"""What an experiment is: claims, the arms that test them, and a task to train on.

An experiment's own file says these and nothing else. All arms of a seed share initial parameters, data and batches.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

Point = Mapping[str, Any]
"""Hyperparameters by name: numbers, and in a matched arm also sequences of numbers."""
Role = Literal["baseline", "claim", "mechanism-off", "control", "hypothesis", "candidate"]

TUNING_SEEDS = 1000
"""Seeds from here on choose hyperparameters, those below are reported: never the same ones."""
HALVING_SEEDS = 2000
"""Seeds from here on choose among candidates, a hundred for each round."""


def log_grid(low: float, high: float, points: int) -> tuple[float, ...]:
    """`points` numbers from `low` to `high` in equal ratios, with three digits.

    >>> log_grid(1e-4, 1e-2, 5)
    (0.0001, 0.000316, 0.001, 0.00316, 0.01)
    """
    return tuple(float(f"{value:.3g}") for value in np.geomspace(low, high, points))


def no_measures(state: Any) -> dict[str, jax.Array]:
    """Nothing of the state is measured."""
    del state
    return {}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to optimise: a chain with a grid to tune, or one made of what another arm measured."""

    name: str
    role: Role
    make: Callable[[dict[str, Any]], Any]
    """From hyperparameters (traced scalars, so that a grid is one program), the run's "seed" (traced) and its number
    of "steps" (a Python int) to a chain, or to what `Experiment.trainer` asks for."""
    grid: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    """Where tuning starts: values in equal ratios, by hyperparameter."""
    measure: Callable[[Any], Mapping[str, jax.Array]] = no_measures
    """From the optimizer's state after a step to scalars, averaged over time: what a matched arm is made from."""
    matches: str | None = None
    """The arm whose measurements this one is made from; it has no grid then."""
    match: Callable[[Point, Mapping[str, np.ndarray]], Point] | None = None
    """From that arm's tuned hyperparameters and its measures over time, (evaluations,) each and the mean of its
    reported runs, to this arm's hyperparameters."""
    condition: str = ""
    """The variant of the task that it is trained on, a key of `Experiment.conditions`."""

    @property
    def base(self) -> str:
        """The name without the condition, which `across` puts behind it."""
        return self.name.removesuffix(f" ({self.condition})")

    def __post_init__(self) -> None:
        if (self.matches is None) != (self.match is None) or bool(self.grid) == bool(self.matches):
            raise ValueError(f"Arm {self.name}: give either `grid`, or `matches` and `match`")
        for axis, values in self.grid.items():
            ratios = [b / a for a, b in itertools.pairwise(values) if a > 0]
            if len(values) < 3 or min(values) <= 0 or min(ratios) <= 1:
                raise ValueError(
                    f"Arm {self.name}: the grid of {axis} must be at least 3 rising positive numbers, got {values}"
                )


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that runs are compared by."""

    name: str
    label: str
    margin: float
    """The largest difference that does not matter, chosen before the runs; in the metric's own unit."""
    better: Literal[1, -1] = 1
    """1: more is better; -1: less is."""
    percent: bool = False

    def shown(self, value: float, signed: bool = False) -> str:
        """`value` for a reader; a signed difference of percentages is in percentage points."""
        scaled, digits = (100 * value, 1) if self.percent else (value, 3)
        if abs(scaled) >= 100:
            digits = 1
        unit = (" pp" if signed else " %") if self.percent else ""
        return f"{scaled:{'+' if signed else ''}.{digits}f}{unit}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """`arm` is better than the tuned `baseline`, and (where given) also than `off`, itself without its mechanism."""

    text: str
    arm: str
    baseline: str
    metric: str
    off: str | None = None


@dataclasses.dataclass(frozen=True)
class Setting:
    """How much is run. `chainrule evidence` has "quick", "normal" and "full"."""

    steps: int
    evaluations: int
    """How often in a run metrics are taken, at equal distances, the last time at its end; divides `steps`."""
    seeds: int
    tuning_seeds: int
    block: int
    """Runs that train together."""
    extensions: int = 4
    """How often an axis of a grid may grow while its optimum is at its end."""
    grid_points: int | None = None
    """Keep so many values in the middle of each axis; `None`: all."""
    arms: tuple[str, ...] | None = None
    """Keep these arms; `None`: all."""
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What `Experiment.build` wants to know."""
    halving: tuple[tuple[int, int], ...] = ()
    """Rounds of successive halving among the arms of role "candidate": (evaluations, how many are kept) of each."""

    def __post_init__(self) -> None:
        if self.steps % self.evaluations:
            raise ValueError(
                f"Setting: `evaluations` must divide `steps`, got {self.evaluations} and {self.steps}"
            )
        if not 1 <= self.seeds < TUNING_SEEDS:
            raise ValueError(
                f"Setting: `seeds` must be in [1, {TUNING_SEEDS}): seeds from there on tune; got {self.seeds}"
            )


def quick(steps: int, sizes: Mapping[str, Any], **more: Any) -> Setting:
    """A setting of seconds, for the checks: no part of a result."""
    least = {"evaluations": 2, "seeds": 2, "tuning_seeds": 1, "block": 3, "extensions": 0}
    settings: dict[str, Any] = {**least, "grid_points": 1, **more}
    return Setting(steps, sizes=sizes, **settings)


class Task(NamedTuple):
    """What is trained; functions of one run, which the harness vectorises."""

    data: Any
    """Arrays that all runs share."""
    draw: Callable[[int], tuple[Any, Any]]
    """From a seed to initial parameters and what else it decides (batches, wrong labels), as NumPy arrays."""
    loss: Callable[[Any, Any, Any, jax.Array], jax.Array]
    """loss(params, data, drawn, step): a scalar."""
    evaluate: Callable[[Any, Any, Any], Mapping[str, jax.Array]]
    """evaluate(params, data, drawn): scalars by name. The harness adds "train_loss", the mean since the last time."""
    gradient: Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any]] | None = None
    """gradient(params, data, drawn, step): loss and updates for the chain, where these are not the loss's gradient."""


Curves = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Claims, arms and a task. All texts are what the report says."""

    id: str
    title: str
    source: str
    """Who claims it, and where."""
    data: str
    model: str
    build: Callable[[Mapping[str, Any]], Any]
    """From `Setting.sizes` and the number of "steps" to the task: a `Task`, or what `trainer` trains."""
    arms: Sequence[Arm]
    claims: Sequence[Claim]
    metrics: Sequence[Metric]
    """The first is what the figure shows."""
    tune_on: Metric
    """What the hyperparameters are chosen by: not a number that is reported, where a validation split can be had."""
    settings: Mapping[str, Setting]
    summaries: Mapping[str, Callable[[Curves], float]] = dataclasses.field(default_factory=dict)
    """More metrics of a run, computed from its curves."""
    conditions: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=lambda: {"": {}}
    )
    """Variants of the task by name: what each has in place of `Setting.sizes`. Arms are compared within one."""
    timed: Callable[[], Any] | None = None
    """Parameters on which the arms of the first condition are timed, with their tuned hyperparameters."""
    trainer: Callable[[Setting], Any] | None = None
    """From a setting to what trains in the place of `Trainer`, and also says what arms cost (`costs`)."""

    def __post_init__(self) -> None:
        metrics = {m.name for m in self.metrics}
        conditions = {arm.name: arm.condition for arm in self.arms}
        if len(conditions) != len(self.arms):
            raise ValueError(f"{self.id}: two arms have one name: {[a.name for a in self.arms]}")
        if unknown := set(conditions.values()) - set(self.conditions):
            raise ValueError(f"{self.id}: no condition {sorted(unknown)}")
        for claim in self.claims:
            wanted = {claim.arm, claim.baseline, *([claim.off] if claim.off else [])}
            if wanted - set(conditions) or claim.metric not in metrics:
                raise ValueError(f"{self.id}: the claim {claim} names what there is not")
            if len({conditions[name] for name in wanted}) > 1:
                raise ValueError(f"{self.id}: the claim {claim} compares arms of two conditions")
        names = list(conditions)
        for arm in self.arms:
            if arm.matches is None:
                continue
            if arm.matches not in names[: names.index(arm.name)]:
                raise ValueError(f"{self.id}: {arm.name} must come after {arm.matches}")
            if conditions[arm.matches] != arm.condition:
                raise ValueError(f"{self.id}: {arm.name} is of another condition than its source")

    def task(self, setting: Setting, condition: str) -> Any:
        """The task of a condition at a setting."""
        sizes = {"steps": setting.steps, **setting.sizes, **self.conditions[condition]}
        return self.build(sizes)

    def metric(self, name: str) -> Metric:
        """The metric called `name`."""
        return next(metric for metric in self.metrics if metric.name == name)


def across(
    conditions: Iterable[str], arms: Sequence[Arm], claims: Sequence[Claim] = ()
) -> tuple[list[Arm], list[Claim]]:
    """The same arms and claims in each condition, called `"name (condition)"`."""

    def named(name: str | None, condition: str) -> Any:
        return name and f"{name} ({condition})"

    found_arms, found_claims = [], []
    for condition in conditions:
        found_arms += [
            dataclasses.replace(
                arm,
                name=named(arm.name, condition),
                matches=named(arm.matches, condition),
                condition=condition,
            )
            for arm in arms
        ]
        found_claims += [
            dataclasses.replace(
                claim,
                arm=named(claim.arm, condition),
                baseline=named(claim.baseline, condition),
                off=named(claim.off, condition),
            )
            for claim in claims
        ]
    return found_arms, found_claims


def area(metric: str) -> Callable[[Curves], float]:
    """The mean of a metric over the run."""
    return lambda curves: float(np.mean(curves[metric]))


def share_until(metric: str, target: float) -> Callable[[Curves], float]:
    """The share of the run after which `metric` first was at least `target`; 1 also if it never was."""

    def summary(curves: Curves) -> float:
        reached = np.flatnonzero(np.asarray(curves[metric]) >= target)
        return float((reached[0] + 1) / len(curves[metric])) if len(reached) else 1.0

    return summary


def is_better(score: float, other: float, metric: Metric) -> bool:
    """Whether `score` is better than `other`; what is not a number is worse than all."""
    return not math.isnan(score) and (math.isnan(other) or metric.better * (score - other) > 0)
