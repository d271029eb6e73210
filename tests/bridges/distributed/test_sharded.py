"""Chains on DTensors against one process: 2 and 4 ranks over gloo on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAINED, PLACED, MATRIX = (
    Path(__file__).with_name(name) for name in ("ranks.py", "placed.py", "matrix.py")
)
PARTS = 13
"""Of the matrix, each of a few chains: what one test runs."""


def run(
    scenarios: str, ranks: int, folder: Path, script: Path = TRAINED, *more: int, wait: int = 600
) -> str:
    """Starts the ranks, which go through the scenarios, and stops all of them where one fails.

    Returns:
      What the first printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    file = folder / f"ranks-{scenarios}"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), scenarios, *map(str, (rank, ranks, file, *more))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        printed = [process.communicate(timeout=wait)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    file.unlink(missing_ok=True)
    failed = [text for process, text in zip(processes, printed, strict=True) if process.returncode]
    # The others fail because one did: its own error is the one that is no lost connection.
    failed.sort(key=lambda text: "Connection closed" in text)
    assert not failed, failed[0][-3000:]
    return printed[0]


@pytest.mark.slow
def test_two_ranks_go_on_when_parameters_are_exchanged(tmp_path):
    run("exchanged", 2, tmp_path)


# To start a rank costs seconds: many scenarios share a start.


@pytest.mark.slow
def test_training_is_as_on_one_process(tmp_path):
    """And what four ranks saved, two and one load."""
    run("eager,frozen,save", 4, tmp_path)
    run("in_jax,refused,emptied,load", 2, tmp_path)
    run("load", 1, tmp_path)


@pytest.mark.slow
def test_compiled_and_rounded_training_is_as_on_one_process(tmp_path):
    run("diagonal", 4, tmp_path, MATRIX)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("how", ["eager", "compiled", "eager_rounded", "compiled_rounded"])
def test_every_chain_is_on_every_mesh_as_on_one_process(how, ranks, part, tmp_path):
    """The whole matrix: `-rP` shows every cell, with its error."""
    printed = run(how, ranks, tmp_path, MATRIX, part, PARTS, wait=3000)
    sys.stdout.write(printed)
    assert printed.count("right | ") >= 5 * {2: 2, 4: 5}[ranks]


@pytest.mark.slow
def test_parameters_laid_out_by_hand_are_as_on_one_process(tmp_path):
    run(
        "optax_chains,owners,meshes,missing,gradients,kahan,reductions,tiers,refused",
        4,
        tmp_path,
        PLACED,
    )
    run("owners,zero", 2, tmp_path, PLACED)
