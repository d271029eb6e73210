"""Sharded over devices equals unsharded."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from conformance.eight_devices import CHECKS
from registry import CASES

HERE = pathlib.Path(__file__).parent


def run(devices: int, *command: str) -> list[str]:
    """The lines that a script prints on so many devices; their number is fixed when JAX starts."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(HERE.parent),
    }
    script, *arguments = command
    result = subprocess.run(
        [sys.executable, HERE / script, *arguments], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
def test_every_case_on_two_devices():
    assert run(2, "two_devices.py") == [case.name for case in CASES]


FAST = r"fsdp, Auto|matrices"


@pytest.mark.parametrize(
    "pattern", [FAST, pytest.param(rf"(?!{FAST})", marks=pytest.mark.slow)], ids=["fsdp", "others"]
)
def test_every_chain_on_eight_devices(pattern):
    wanted = [name for name in CHECKS if re.match(pattern, name)]
    assert len(wanted) > 10 and run(8, "eight_devices.py", pattern) == wanted
