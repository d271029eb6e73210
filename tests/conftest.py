"""Settings of every test run: CPU, quick compilation, no window for figures, reproducible hypothesis examples."""

import importlib.metadata
import importlib.util
import os
import pathlib
import re

# Before jax or matplotlib is imported anywhere.
# A test run is mostly XLA compiling small functions that run a few times: three times quicker so, for
# the same arithmetic. XLA_FLAGS="" runs the tests on what users run; other flags are added to these.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", " ")
    and (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_parallel_codegen_split_count=1 "
        # jaxlib 0.11 has fusion emitters alone, and stops at a flag that it does not know.
        + "--xla_cpu_use_fusion_emitters=false "
        * (tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11))
        + os.environ.get("XLA_FLAGS", "")
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import settings

settings.register_profile("chainrule", deadline=None, derandomize=True)
settings.load_profile("chainrule")

TORCH = importlib.util.find_spec("torch") is not None
NEEDS_TORCH = re.compile(
    r"^(from|import) (torch|compositions|chainrule\.(bridges|evidence\.bridged)|chainrule import .*TorchBridge)",
    re.M,
)


def pytest_ignore_collect(collection_path: pathlib.Path) -> bool | None:
    """Without torch, as on a version that it has no file for: the files that import it are left out."""
    if TORCH or collection_path.suffix != ".py":
        return None
    return bool(NEEDS_TORCH.search(collection_path.read_text())) or None


def pytest_report_header() -> str | None:
    return None if TORCH else "without torch: the files of tests that import it are left out"
