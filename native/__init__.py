"""The compiled kernel: COSMIC's tier update, block-quantised state, sums over tensors, and programs of scalars.

`_kernel` is its door for NumPy arrays and raw memory (None where it was left out), `chainrule.native.xla`
its door for jitted programs. Everything they do also exists in XLA, or in torch for a
bridge: without the kernel the chains run there, and one warning says so.
"""

import contextlib
import contextvars
import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import NamedTuple

try:
    from chainrule.native import _kernel
except ImportError:  # installed with CHAINRULE_NATIVE=OFF
    _kernel: ModuleType | None = None

_warned = False
_FLOATS = ("float32", "bfloat16", "float16")


class _Bridge(NamedTuple):
    """Where a bridge will run the chain that it traces."""

    on_cpu: bool
    compiled: bool


_bridge: contextvars.ContextVar[_Bridge | None] = contextvars.ContextVar("bridge", default=None)


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


@contextlib.contextmanager
def bridging(on_cpu: bool, compiled: bool = False) -> Iterator[None]:
    """While a bridge traces a chain for another framework: on the CPU ``kernel="auto"`` is the kernel.

    Args:
        on_cpu: whether the chain will run on the CPU.
        compiled: whether by a compiler that fuses operations, instead of one by one.
    """
    token = _bridge.set(_Bridge(on_cpu, compiled))
    try:
        yield
    finally:
        _bridge.reset(token)


def chosen(kernel: str, dtypes: Iterable[object] = ()) -> bool:
    """Whether an atom with this `kernel` argument runs in the compiled kernel.

    Args:
        kernel: ``"xla"``, ``"native"`` or ``"auto"``, which is the kernel in a bridge alone (see `for_cpu`
            for what it takes in JAX).
        dtypes: what it would be given. In a bridge, others than the kernel's run as ``"xla"`` does.

    >>> chosen("native"), chosen("auto"), chosen("xla")
    (True, False, False)
    """
    bridge = _bridge.get()
    if kernel == "xla" or (kernel == "auto" and bridge is None):
        return False
    if bridge is not None and not (bridge.on_cpu and _takes(dtypes)):
        return False
    return available()


def chosen_for_sums(dtypes: Iterable[object]) -> bool:
    """Whether a chain that is traced now takes its sums in the kernel wherever it runs: in a bridge that runs it
    on the CPU op by op, so that each operation before a sum would be a pass over the memory.
    """
    bridge = _bridge.get()
    return bridge is not None and not bridge.compiled and chosen("auto", dtypes)


def for_cpu(dtypes: Iterable[object]) -> bool:
    """Whether the kernel can take, where a chain in JAX runs on the CPU, what it is faster at: sums, and codes.

    Where the chain runs is known when it is compiled: ask ``jax.lax.platform_dependent``. A bridge has a
    compiler of its own, which fuses sums.

    Args:
        dtypes: what it would be given.
    """
    return _bridge.get() is None and _takes(dtypes) and available()


def _takes(dtypes: Iterable[object]) -> bool:
    return all(str(dtype) in _FLOATS for dtype in dtypes)
