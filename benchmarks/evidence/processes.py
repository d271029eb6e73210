"""Arms that train in torch, each in a process of its own, so that the memory it needs is its own."""

import contextlib
import multiprocessing
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from chainrule.evidence.experiment import Arm, Point, Setting
from chainrule.evidence.training import Outcome


class TorchTask(NamedTuple):
    """What is trained in torch."""

    prepare: Callable[[pathlib.Path], None]
    """Writes what all runs start from to a file, once."""
    start: Callable[[int, pathlib.Path], tuple[Any, Any]]
    """From a seed and that file to a model and its batches, (steps, ...)."""
    loss: Callable[[Any, Any], Any]
    """loss(model, batch)."""
    evaluate: Callable[[Any], dict[str, float]]
    """Metrics of a model by name."""
    tokens: int
    """In a batch, for the speed."""


class Process:
    """A process that trains one arm; call it with a request.

    It is forked from a server that has imported torch: that takes longer than a short run.
    """

    def __init__(self, experiment: str, arm: str, setting: Setting, start: pathlib.Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", __name__])
        self._pipe, theirs = context.Pipe()
        self._running = context.Process(
            target=serve, args=(theirs, experiment, arm, setting, start)
        )
        self._running.start()
        theirs.close()
        self._name = arm

    def __call__(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer."""
        try:
            self._pipe.send(request)
            return self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as ended:
            self._running.join()
            status = self._running.exitcode
            raise RuntimeError(f"the process of {self._name} ended with status {status}") from ended

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # which ends it
        self._running.join()


class ProcessTrainer:
    """Trains the runs of an arm one after another in its process; `Trainer` for a `TorchTask`.

    The first process writes what all start from. This one never imports torch.
    """

    def __init__(self, experiment: str, setting: Setting) -> None:
        self._experiment, self._setting = experiment, setting
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="chainrule-evidence-"))
        self._start = self._folder / "start.pt"
        self._arm, self._at_work = "", contextlib.ExitStack()

    def close(self) -> None:
        """Ends the process of the last arm and removes what all started from."""
        self._at_work.close()
        shutil.rmtree(self._folder)

    def _process(self, arm: Arm) -> Process:
        return Process(self._experiment, arm.name, self._setting, self._start)

    def train(
        self,
        arm: Arm,
        runs: Sequence[tuple[Point, int]],
        advance: Callable[[int], None] = lambda evaluations: None,
        evaluations: int | None = None,
    ) -> Iterator[list[Outcome]]:
        """Yields the outcome of each run; a block is a run."""
        if runs and arm.name != self._arm:
            self._at_work.close()
            self._arm, self._at_work = arm.name, contextlib.ExitStack()
            self._process_at_work = self._at_work.enter_context(self._process(arm))
        for point, seed in runs:
            curves: list[dict[str, float]] = []
            self._process_at_work(begin=dict(point), seed=seed)
            for _ in range(evaluations or self._setting.evaluations):
                steps = self._setting.steps // self._setting.evaluations
                curves.append(self._process_at_work(go=steps))
                advance(1)
            found = {name: np.array([each[name] for each in curves]) for name in curves[0]}
            yield [Outcome(point, seed, found, {})]

    def costs(
        self, arms: Sequence[Arm], points: Sequence[Point], rounds: int = 20
    ) -> dict[str, Any]:
        """Speed of whole steps, round by round over all arms, and memory, each arm in a process for this alone."""
        self._at_work.close()  # the machine is theirs
        if not self._start.exists():  # in a process of its own: none of theirs has its peak from it
            with self._process(arms[0]) as process:
                process(begin=dict(points[0]), seed=0)
        with contextlib.ExitStack() as stack:
            processes = [stack.enter_context(self._process(arm)) for arm in arms]
            for process, point in zip(processes, points, strict=True):
                process(begin=dict(point), seed=0)
                process(time=3)  # the first steps build programs
            speeds = [[process(time=5)["speed"] for process in processes] for _ in range(rounds)]
            memory = [process(memory=True) for process in processes]
        middle = np.median(np.array(speeds), 0)
        return {
            arm.name: {"tokens_per_second": float(speed), **each}
            for arm, speed, each in zip(arms, middle, memory, strict=True)
        }


class Running:
    """One run in a process."""

    def __init__(self, task: TorchTask, arm: Arm, setting: Setting, start: pathlib.Path) -> None:
        self._task, self._arm, self._setting, self._start = task, arm, setting, start
        self._model: Any = None
        self._optimizer: Any = None
        self._batches: Any = None
        self._at = 0

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Does what a request asks for."""
        if "begin" in request:
            if not self._start.exists():
                self._task.prepare(self._start)
            self._model, self._batches = self._task.start(request["seed"], self._start)
            point = {**request["begin"], "seed": request["seed"], "steps": self._setting.steps}
            self._optimizer: Any = self._arm.make(point)
            self._optimizer, self._at = self._optimizer(self._model), 0
            return {}
        if "go" in request:
            loss = self._steps(request["go"])
            return {**self._task.evaluate(self._model), "train_loss": loss}
        if "time" in request:
            start = time.perf_counter()
            self._steps(request["time"])
            seconds = time.perf_counter() - start
            return {"speed": self._task.tokens * request["time"] / seconds}
        kept = [value for held in self._optimizer.state.values() for value in held.values()]
        return {
            "state_bytes": sum(getattr(value, "nbytes", 0) for value in kept),
            "peak_bytes": peak_bytes(),
        }

    def _steps(self, count: int) -> float:
        losses = []
        for _ in range(count):
            loss = self._task.loss(self._model, self._batches[self._at % len(self._batches)])
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            losses.append(loss.item())
            self._at += 1
        return float(np.mean(losses))


def peak_bytes() -> int:
    """The peak memory of this process' own program."""
    status = pathlib.Path("/proc/self/status")
    if (
        status.exists()
    ):  # Linux's `ru_maxrss` counts what the process was before it became this program
        (line,) = [each for each in status.read_text().splitlines() if each.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve(
    pipe: Connection, experiment: str, arm: str, setting: Setting, start: pathlib.Path
) -> None:
    """Answers requests until the other end closes."""
    from chainrule.evidence import experiments

    known = experiments.load(experiment)
    (chosen,) = [each for each in known.arms if each.name == arm]
    running = Running(known.task(setting, chosen.condition), chosen, setting, start)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(running.answer(pipe.recv()))
