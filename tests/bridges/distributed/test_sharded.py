"""Chains on DTensors against one process: 2 and 4 ranks over gloo on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAINED, PLACED = (Path(__file__).with_name(name) for name in ("ranks.py", "placed.py"))


def run(scenarios: str, ranks: int, folder: Path, script: Path = TRAINED) -> None:
    """Starts the ranks, which go through the scenarios, and stops all of them where one fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    file = folder / f"ranks-{scenarios}"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), scenarios, str(rank), str(ranks), str(file)],
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


@pytest.mark.slow
def test_two_ranks_go_on_when_parameters_are_exchanged(tmp_path):
    run("exchanged", 2, tmp_path)


# To start a rank costs seconds: many scenarios share a start.


@pytest.mark.slow
def test_training_is_as_on_one_process(tmp_path):
    """And what four ranks saved, two and one load."""
    run("eager,frozen,save", 4, tmp_path)
    run("in_jax,refused,emptied,compiled_shortly,load", 2, tmp_path)
    run("load", 1, tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_compiled_and_rounded_training_is_as_on_one_process(tmp_path):
    run("compiled,rounded", 4, tmp_path)
    run("compiled_by_two", 2, tmp_path)


@pytest.mark.slow
def test_parameters_laid_out_by_hand_are_as_on_one_process(tmp_path):
    run(
        "optax_chains,owners,meshes,missing,gradients,kahan,reductions,tiers,refused",
        4,
        tmp_path,
        PLACED,
    )
    run("owners,zero", 2, tmp_path, PLACED)
