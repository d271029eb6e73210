"""A trainer that is killed at random moments goes on each time as if it had not been."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

KILLS = 50

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc"),
]


class Server(NamedTuple):
    """A process of `trainer.py`."""

    process: subprocess.Popen[str]

    def start(self, folder: pathlib.Path, log: pathlib.Path, steps: float) -> int:
        self.process.stdin.write(f"{folder} {log} {steps}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def status(self) -> int:
        return int(self.process.stdout.readline())


@pytest.fixture(params=["torch", "jax"])
def server(request: Any) -> Iterator[Server]:
    here = pathlib.Path(__file__).parent
    # One thread for numbers: the others of NumPy's would be there before the fork.
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, here / "trainer.py", request.param],
        env={**os.environ, **threads},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield Server(process)


def lines(log: pathlib.Path) -> list[tuple[int, str]]:
    found = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(int(step), digest) for step, digest in found]


def wait_for(log: pathlib.Path, count: int) -> None:
    until = time.monotonic() + 120
    while len(lines(log)) < count:
        assert time.monotonic() < until, f"no {count} lines in {log}"
        time.sleep(0.01)


def test_every_start_after_a_kill_goes_on_bit_for_bit(
    server: Server, tmp_path: pathlib.Path
) -> None:
    rng = np.random.default_rng(0)
    folder, log = tmp_path / "run", tmp_path / "log"
    folder.mkdir()
    starts = []
    for _ in range(KILLS):
        before = len(lines(log))
        child = server.start(folder, log, np.inf)
        # From what it found, and for the first one until there is a checkpoint to go on from.
        wait_for(log, before + (1 if starts else 4))
        starts.append(before)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert server.status() == -signal.SIGKILL
    before = len(lines(log))
    server.start(folder, log, lines(log)[-1][0] + 3)
    assert server.status() == 0
    starts.append(before)

    run = lines(log)
    straight = tmp_path / "straight"
    straight.mkdir()
    server.start(straight, tmp_path / "expected", max(step for step, _ in run))
    assert server.status() == 0
    expected = dict(lines(tmp_path / "expected"))
    resumed = [run[start] for start in starts[1:]]
    assert len(resumed) == KILLS
    assert all(step > 0 for step, _ in resumed)
    assert [expected[step] for step, _ in run] == [digest for _, digest in run]
