"""Results as one JSON file an experiment and setting, written after every block of runs, so that nothing runs twice.

The file's name ends with a key of the settings and of the code that the numbers depend on (comments and documentation
aside): other settings or other code make another file.
"""

import ast
import dataclasses
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from chainrule.evidence.experiment import TUNING_SEEDS, Experiment, Point
from chainrule.evidence.training import Outcome

HARNESS = (
    "data",
    "models",
    "probes",
    "processes",
    "tasks",
    "torch_models",
    "training",
    "tuning",
)
"""The files of the harness that numbers depend on."""
PACKAGES = ("chainrule", "jax", "jaxlib", "numpy", "optax", "scipy")


def _code(path: pathlib.Path) -> str:
    """A file's syntax tree without documentation."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # pyright: ignore[reportAttributeAccessIssue]
                n
                for n in body
                if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
            ]
    return ast.dump(tree)


def _sources(experiment: Experiment) -> Iterator[pathlib.Path]:
    own = importlib.util.find_spec(experiment.build.__module__)
    assert own is not None
    assert own.origin is not None
    yield pathlib.Path(own.origin)
    here = pathlib.Path(__file__).parent
    yield from (here / f"{name}.py" for name in HARNESS)
    for room in ("transforms", "chains"):
        spec = importlib.util.find_spec(f"chainrule.{room}")
        assert spec is not None
        assert spec.origin is not None
        yield from sorted(pathlib.Path(spec.origin).parent.glob("*.py"))


def key_of(experiment: Experiment, setting: str) -> str:
    """Eight hexadecimal digits of everything that the numbers depend on but seeds and arms, which only add runs."""
    settings = dataclasses.asdict(experiment.settings[setting])
    settings = {name: value for name, value in settings.items() if name not in ("seeds", "arms")}
    digest = hashlib.sha256(json.dumps([settings, versions()], sort_keys=True).encode())
    for path in _sources(experiment):
        digest.update(_code(path).encode())
    return digest.hexdigest()[:8]


def versions() -> dict[str, str]:
    """The installed version of what the numbers come from."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def processor() -> dict[str, Any]:
    """What the runs ran on."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "name": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def plain(value: Any) -> Any:
    """Numbers as JSON has them: six digits, and `None` for what is not finite."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def number(value: float | None) -> float:
    """A number of the file: `None` is NaN."""
    return float("nan") if value is None else value


class Store:
    """The results of one experiment at one setting, in a file that is always whole."""

    def __init__(self, experiment: Experiment, setting: str, folder: pathlib.Path) -> None:
        key = key_of(experiment, setting)
        self.path = folder / f"{experiment.id}-{setting}-{key}.json"
        self._experiment = experiment
        if self.path.exists():
            self.document = json.loads(self.path.read_text())
        else:
            self.document = self._new(experiment, setting, key)
        self._known = {self._id(run["arm"], run["point"], run["seed"]): run for run in self.runs}

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Every finished run."""
        return self.document["runs"]

    @staticmethod
    def _new(experiment: Experiment, setting: str, key: str) -> dict[str, Any]:
        settings = dataclasses.asdict(experiment.settings[setting])
        return {
            "experiment": experiment.id,
            "setting": setting,
            "key": key,
            "settings": {name: plain(value) for name, value in settings.items()},
            "versions": versions(),
            "processor": processor(),
            "title": experiment.title,
            "source": experiment.source,
            "data": experiment.data,
            "model": experiment.model,
            "claims": [dataclasses.asdict(claim) for claim in experiment.claims],
            "metrics": [dataclasses.asdict(metric) for metric in experiment.metrics],
            "tune_on": dataclasses.asdict(experiment.tune_on),
            "finished": None,
            "seconds": 0.0,
            "arms": {},
            "runs": [],
        }

    @staticmethod
    def _id(arm: str, point: Point, seed: int) -> str:
        return json.dumps([arm, plain(dict(point)), seed], sort_keys=True)

    def find(self, arm: str, point: Point, seed: int) -> dict[str, Any] | None:
        """A finished run, or `None`."""
        return self._known.get(self._id(arm, point, seed))

    def add(self, arm: str, outcomes: Sequence[Outcome], seconds: float) -> None:
        """Keeps finished runs and writes the file. Only reported runs keep their curves."""
        for outcome in outcomes:
            run = self._recorded(arm, outcome)
            self._known[self._id(arm, outcome.point, outcome.seed)] = run
            self.runs.append(run)
        self.document["seconds"] = round(self.document["seconds"] + seconds, 1)
        self.write()

    def add_bridged(self, arm: str, outcomes: Sequence[Outcome]) -> None:
        """Keeps runs that the torch bridge repeated."""
        bridged = self.document.setdefault("bridged", [])
        bridged += [self._recorded(arm, outcome) for outcome in outcomes]
        self.write()

    def _recorded(self, arm: str, outcome: Outcome) -> dict[str, Any]:
        final = {name: values[-1] for name, values in outcome.curves.items()}
        for name, summary in self._experiment.summaries.items():
            final[name] = summary(outcome.curves)
        run = {"arm": arm, "point": dict(outcome.point), "seed": outcome.seed, "final": final}
        if outcome.seed < TUNING_SEEDS:
            run |= {"curves": outcome.curves, "measured": outcome.measured}
        return plain(run)

    def finish(self) -> None:
        """Says that the experiment has run to its end."""
        now = datetime.datetime.now(datetime.UTC)
        self.document["finished"] = now.isoformat(timespec="seconds")
        self.write()

    def write(self) -> None:
        """Writes the file in one move: a reader never sees half of it. A run is a line."""
        lines = ",\n".join(json.dumps(run) for run in self.runs)
        rest = {name: value for name, value in self.document.items() if name != "runs"}
        head = json.dumps({**rest, "runs": []}, indent=1)
        assert head.endswith("[]\n}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(f"{head[:-4]}[\n{lines}\n]}}\n")
        os.replace(partial, self.path)
