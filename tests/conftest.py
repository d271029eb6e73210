"""Settings of every test run: CPU, quick compilation, no window for figures, reproducible hypothesis examples."""

import os

# Before jax or matplotlib is imported anywhere.
# A test run is mostly XLA compiling small functions that run a few times: three times quicker so, for
# the same arithmetic. XLA_FLAGS="" runs the tests on what users run.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import settings

settings.register_profile("chainrule", deadline=None, derandomize=True)
settings.load_profile("chainrule")
