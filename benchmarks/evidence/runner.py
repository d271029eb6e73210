"""Runs an experiment: each arm is tuned on its own seeds, then trained on the seeds that all arms share."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from chainrule.evidence import costs
from chainrule.evidence.experiment import TUNING_SEEDS, Arm, Experiment, Point, Setting
from chainrule.evidence.store import Store, number, plain
from chainrule.evidence.training import Trainer
from chainrule.evidence.tuning import Tuned, tune

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
        self._trainers: dict[str, Trainer] = {}

    def __call__(self) -> dict[str, Any]:
        """Runs what is missing and returns the document."""
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
        if self.experiment.timed and "costs" not in self.store.document:
            self.store.document["costs"] = self._costs(self.experiment.timed())
        self.store.finish()
        return self.store.document

    def _costs(self, params: Any) -> dict[str, Any]:
        """What a step costs, by arm; all conditions have the same arms."""
        first = next(iter(self.experiment.conditions))
        arms = [arm for arm in self.arms if arm.condition == first] or self.arms
        known = self.store.document["arms"]
        self._progress(f"{self.experiment.id}: timing", 0, 1)
        found = costs.measure(arms, [known[arm.name]["point"] for arm in arms], params)
        self._progress(f"{self.experiment.id}: timing", 1, 0)
        return plain({name: cost._asdict() for name, cost in found.items()})

    def _tune(self, arm: Arm) -> Tuned:
        seeds = [TUNING_SEEDS + i for i in range(self.setting.tuning_seeds)]
        name = self.experiment.tune_on.name

        def scores(points: list[Point]) -> list[float]:
            runs = self._train(arm, [(point, seed) for point in points for seed in seeds])
            finals = [number(run["final"][name]) for run in runs]
            return np.reshape(finals, (len(points), -1)).mean(1).tolist()

        return tune(arm.grid, self.experiment.tune_on, self.setting, scores)

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

    def _trainer(self, condition: str) -> Trainer:
        """What trains the arms of a condition."""
        if condition not in self._trainers:
            task = self.experiment.task(self.setting, condition)
            self._trainers[condition] = Trainer(task, self.setting)
        return self._trainers[condition]

    def _train(self, arm: Arm, runs: list[tuple[Point, int]]) -> list[dict[str, Any]]:
        """The stored results of `runs`, trained where they are missing."""
        missing = [run for run in runs if self.store.find(arm.name, *run) is None]
        size, evaluations = self.setting.block, self.setting.evaluations
        tuning = any(seed >= TUNING_SEEDS for _, seed in runs)
        what = f"{self.experiment.id} {arm.name}: {'tuning' if tuning else 'results'}"
        self._progress(what, 0, -(-len(missing) // size) * evaluations)
        start = time.perf_counter()
        trainer = self._trainer(arm.condition)
        for outcomes in trainer.train(arm, missing, lambda done: self._progress(what, done, 0)):
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
