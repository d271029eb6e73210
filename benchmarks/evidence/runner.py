"""Runs an experiment: each arm is tuned on its own seeds, then trained on the seeds that all arms share."""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from chainrule.evidence import costs
from chainrule.evidence.experiment import (
    HALVING_SEEDS,
    TUNING_SEEDS,
    Arm,
    Experiment,
    Point,
    Setting,
)
from chainrule.evidence.halving import halve
from chainrule.evidence.store import Store, number, plain
from chainrule.evidence.training import Trainer
from chainrule.evidence.tuning import Tuned, best_of, first_axes, tune

Progress = Callable[[str, int, int], None]
"""progress(what, done, planned): evaluations of blocks, done and (more) planned."""


def silent(what: str, done: int, planned: int) -> None:
    """No progress bar."""
    del what, done, planned


class Run:
    """One execution of an experiment at a setting; picks up where the file of results ends."""

    def __init__(
        self,
        experiment: Experiment,
        setting: str,
        folder: pathlib.Path,
        *,
        seeds: int | None = None,
        arms: Sequence[str] | None = None,
        progress: Progress = silent,
    ) -> None:
        chosen = experiment.settings[setting]
        self.setting: Setting = dataclasses.replace(chosen, seeds=seeds or chosen.seeds)
        self.experiment, self._progress = experiment, progress
        self.arms = with_sources(experiment, arms or chosen.arms)
        self.store = Store(experiment, setting, folder)
        self._trainers: dict[str, Any] = {}

    def __call__(self) -> dict[str, Any]:
        """Runs what is missing and returns the document."""
        try:
            return self._run()
        finally:
            for trainer in self._trainers.values():
                trainer.close()
            self._trainers.clear()

    def _run(self) -> dict[str, Any]:
        self.arms = self._left_by_halving()
        for arm in self.arms:
            start = time.perf_counter()
            info: dict[str, Any] = {"role": arm.role, "condition": arm.condition}
            if arm.matches is None:
                tuned = self._tune(arm)
                point = tuned.point
                info |= tuned._asdict() | {"grid": dict(arm.grid)}
            else:
                point = self._matched(arm)
                info |= {"point": point, "matches": arm.matches, "trials": 0}
            seeds = range(self.setting.seeds)
            self._train(arm, [(point, seed) for seed in seeds])
            before = self.store.document["arms"].get(arm.name, {"seconds": 0.0})["seconds"]
            seconds = before + time.perf_counter() - start
            self.store.document["arms"][arm.name] = plain(info | {"seconds": round(seconds, 1)})
            self.store.write()
        timed = self.experiment.timed or self.experiment.trainer
        if timed and "costs" not in self.store.document:
            self.store.document["costs"] = self._costs()
        self.store.finish()
        return self.store.document

    def through_torch(self) -> dict[str, Any]:
        """Repeats the reported runs with every step by `TorchBridge`, and returns the document."""
        from chainrule.evidence.bridged import BridgeTrainer

        trainers: dict[str, BridgeTrainer] = {}
        have = {(run["arm"], run["seed"]) for run in self.store.document.get("bridged", [])}
        for arm in self.arms:
            point = self.store.document["arms"][arm.name]["point"]
            missing = [(point, s) for s in range(self.setting.seeds) if (arm.name, s) not in have]
            if arm.condition not in trainers:
                task = self.experiment.task(self.setting, arm.condition)
                trainers[arm.condition] = BridgeTrainer(task, self.setting)
            what = f"{self.experiment.id} {arm.name}: torch bridge"
            self._progress(what, 0, len(missing) * self.setting.evaluations)
            trained = trainers[arm.condition].train(
                arm, missing, lambda done, what=what: self._progress(what, done, 0)
            )
            for outcomes in trained:
                self.store.add_bridged(arm.name, outcomes)
        return self.store.document

    def _costs(self) -> dict[str, Any]:
        """What a step costs, by arm; all conditions have the same arms."""
        first = next(iter(self.experiment.conditions))
        arms = [arm for arm in self.arms if arm.condition == first] or self.arms
        known = self.store.document["arms"]
        self._progress(f"{self.experiment.id}: timing", 0, 1)
        points = [known[arm.name]["point"] for arm in arms]
        if self.experiment.timed:
            found = costs.measure(arms, points, self.experiment.timed())
        else:
            found = self._trainer(first).costs(arms, points)
        self._progress(f"{self.experiment.id}: timing", 1, 0)
        return plain(found)

    def _left_by_halving(self) -> list[Arm]:
        """All arms but the candidates that successive halving drops, which it tells the document."""
        candidates: dict[str, list[Arm]] = {}
        for arm in self.arms:
            if arm.role == "candidate":
                candidates.setdefault(arm.base, []).append(arm)
        if not (candidates and self.setting.halving):
            return self.arms
        metric = self.experiment.tune_on

        def score(arm: Arm, number: int, evaluations: int) -> float:
            axes = first_axes(arm.grid, self.setting.grid_points)
            points: list[Point] = [
                dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
            ]
            first = HALVING_SEEDS + 100 * number
            return best_of(self._scores(arm, points, first, evaluations), metric)

        rounds = halve(candidates, self.setting.halving, metric, score)
        self.store.document["halving"] = plain([each._asdict() for each in rounds])
        kept = set(rounds[-1].kept)
        return [arm for arm in self.arms if arm.role != "candidate" or arm.base in kept]

    def _tune(self, arm: Arm) -> Tuned:
        def scores(points: list[Point]) -> list[float]:
            return self._scores(arm, points, TUNING_SEEDS)

        return tune(arm.grid, self.experiment.tune_on, self.setting, scores)

    def _scores(
        self, arm: Arm, points: list[Point], first: int, evaluations: int | None = None
    ) -> list[float]:
        """What each point is worth: the mean over tuning seeds from `first` on."""
        seeds = range(first, first + self.setting.tuning_seeds)
        runs = self._train(arm, [(point, seed) for point in points for seed in seeds], evaluations)
        finals = [number(run["final"][self.experiment.tune_on.name]) for run in runs]
        return np.reshape(finals, (len(points), -1)).mean(1).tolist()

    def _matched(self, arm: Arm) -> Point:
        """The hyperparameters of a mechanism-off arm, from what its source measured."""
        assert arm.matches is not None
        assert arm.match is not None
        point = self.store.document["arms"][arm.matches]["point"]
        runs = [self.store.find(arm.matches, point, seed) for seed in range(self.setting.seeds)]
        measured = {
            name: np.mean([run["measured"][name] for run in runs if run], 0)
            for name in (runs[0] or {})["measured"]
        }
        return plain(dict(arm.match(point, measured)))

    def _trainer(self, condition: str) -> Any:
        """What trains the arms of a condition."""
        if condition not in self._trainers:
            if self.experiment.trainer:
                trainer = self.experiment.trainer(self.setting)
            else:
                trainer = Trainer(self.experiment.task(self.setting, condition), self.setting)
            self._trainers[condition] = trainer
        return self._trainers[condition]

    def _train(
        self, arm: Arm, runs: list[tuple[Point, int]], evaluations: int | None = None
    ) -> list[dict[str, Any]]:
        """The stored results of `runs`, trained where they are missing, for so many evaluations (`None`: all)."""
        missing = [run for run in runs if self.store.find(arm.name, *run) is None]
        size, each = self.setting.block, evaluations or self.setting.evaluations
        stage = "results" if runs[0][1] < TUNING_SEEDS else "halving" if evaluations else "tuning"
        what = f"{self.experiment.id} {arm.name}: {stage}"
        self._progress(what, 0, -(-len(missing) // size) * each)
        start = time.perf_counter()
        trained = self._trainer(arm.condition).train(
            arm, missing, lambda done: self._progress(what, done, 0), evaluations
        )
        for outcomes in trained:
            self.store.add(arm.name, outcomes, time.perf_counter() - start)
            start = time.perf_counter()
        found = [self.store.find(arm.name, *run) for run in runs]
        assert all(run is not None for run in found)
        return [run for run in found if run is not None]


def with_sources(experiment: Experiment, names: Sequence[str] | None) -> list[Arm]:
    """The arms called `names`, all for `None`, and those that they are made from, in the experiment's order."""
    known = {arm.name: arm for arm in experiment.arms}
    wanted = set(known if names is None else names)
    if unknown := wanted - set(known):
        raise ValueError(
            f"{experiment.id} has no arm {sorted(unknown)[0]!r}; its arms are {', '.join(known)}"
        )
    wanted |= {source for name in wanted if (source := known[name].matches) is not None}
    return [arm for arm in experiment.arms if arm.name in wanted]
