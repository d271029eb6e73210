"""The compiled kernel: COSMIC's tier update, block-quantised state, sums over tensors, scalars, elementwise programs.

    primitives   each call of the kernel as a JAX primitive, which chains bind and bridges read
    forms        what each computes, in JAX: the program where the kernel does not run
    loops        element-wise programs as one call of C++ that is generated (`loop_text`) and compiled for them
    coding       tensors in codes, likewise
    xla          functions that check their arguments and bind a primitive
    _kernel      the compiled module, for NumPy arrays and raw memory; None where it was left out

Without the kernel everything runs in XLA, or in a bridge's own framework, and one warning says so.
"""

import warnings
from types import ModuleType

try:
    from chainrule.native import _kernel
except ImportError:  # installed with CHAINRULE_NATIVE=OFF
    _kernel: ModuleType | None = None

_warned = False
FLOATS = ("float32", "bfloat16", "float16")
"""The dtypes that the kernel has."""


def available() -> bool:
    """Whether the compiled kernel is there; the first time it is not, a warning says so."""
    global _warned
    if _kernel is None and not _warned:
        _warned = True
        warnings.warn(
            "chainrule.native: the compiled kernel is not installed, so chains run in XLA; "
            "install a wheel, or from source with a C++17 compiler, to have it",
            RuntimeWarning,
            stacklevel=2,
        )
    return _kernel is not None


def info() -> dict[str, object]:
    """What was built and what is chosen on this machine.

    Returns:
        ``available``; with the kernel also its ``compiler``, the ``instruction_sets`` compiled in that
        this processor runs, the ``instruction_set`` chosen and the default number of ``threads``.
        The environment variables ``CHAINRULE_ISA`` and ``CHAINRULE_NUM_THREADS`` choose otherwise.
    """
    if _kernel is None:
        return {"available": False}
    return {"available": True, **_kernel.info()}
