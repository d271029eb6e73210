"""Settings of every test run: CPU, no window for figures, reproducible hypothesis examples."""

import os

# Before jax or matplotlib is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import settings

settings.register_profile("chainrule", deadline=None, derandomize=True)
settings.load_profile("chainrule")
