"""The compiled kernel: COSMIC's tier update and the block-quantised state.

Everything here also exists in XLA; without the compiled module the chains run there, and one
warning says so.
"""

import warnings

try:
    from chainrule.native import _kernel
except ImportError:  # built with CHAINRULE_NATIVE=OFF
    _kernel = None

_warned = False


def available() -> bool:
    """Whether the compiled kernel can be imported; the first time it cannot, one warning says so."""
    global _warned
    if _kernel is None and not _warned:
        _warned = True
        warnings.warn(
            "chainrule.native: the compiled kernel is not installed, everything runs in XLA; "
            "install chainrule from a wheel or with a C++17 compiler to get it",
            RuntimeWarning,
            stacklevel=2,
        )
    return _kernel is not None


def info() -> dict[str, object]:
    """What was built and what was chosen on this machine."""
    if _kernel is None:
        return {"available": False}
    return {"available": True, **_kernel.info()}
