"""Sharded over two devices equals unsharded."""

import os
import pathlib
import subprocess
import sys

from registry import CASES


def test_every_case_on_two_devices():
    here = pathlib.Path(__file__).parent
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(here.parent),
    }
    # A process of its own: the number of devices is fixed when JAX starts.
    result = subprocess.run(
        [sys.executable, here / "two_devices.py"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == [case.name for case in CASES]
