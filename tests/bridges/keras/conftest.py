"""Tests of the Keras bridge: `make keras` runs them in a process for each backend, which KERAS_BACKEND names."""

import os

BACKEND = os.environ.get("KERAS_BACKEND")
# Keras reads its backend when it is imported; without one, as in `make test`, nothing here is.
collect_ignore_glob = [] if BACKEND else ["*.py"]

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if BACKEND == "jax":
    # Programs on eight devices that wait for each other need a thread each: one program at a time.
    os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
