"""Chains on DTensors against one process: 2 and 4 ranks over gloo on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = Path(__file__).with_name("ranks.py")


def run(scenario: str, ranks: int, folder: Path) -> None:
    """Starts the ranks, and stops all of them where one fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    file = folder / f"ranks-{scenario}"
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANKS), scenario, str(rank), str(ranks), str(file)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        printed = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    file.unlink(missing_ok=True)
    failed = [text for process, text in zip(processes, printed, strict=True) if process.returncode]
    # The others fail because one did: its own error is the one that is no lost connection.
    failed.sort(key=lambda text: "Connection closed" in text)
    assert not failed, failed[0][-3000:]


def test_two_ranks_go_on_when_parameters_are_exchanged(tmp_path):
    run("exchanged", 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "ranks"),
    [
        ("eager", 4),
        ("compiled", 4),
        ("rounded", 4),
        ("frozen", 4),
        ("in_jax", 2),
        ("refused", 2),
    ],
)
def test_it_is_as_on_one_process(scenario, ranks, tmp_path):
    run(scenario, ranks, tmp_path)


@pytest.mark.slow
def test_what_four_ranks_saved_two_and_one_load(tmp_path):
    run("save", 4, tmp_path)
    run("load", 2, tmp_path)
    run("load", 1, tmp_path)
