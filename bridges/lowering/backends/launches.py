"""One loop in the compiled kernel for the calls of a piece that is compiled once for many leaves.

Inductor wraps each C++ function that it compiles in a Python function that takes tensors apart: some ten microseconds
a leaf, of which the arithmetic of a small tensor is one. Where such a wrapper does nothing but allocate and hand
addresses on, which is found out by running it on a recorder, its C++ function is called directly, leaf after leaf.
Exported files have what is below the line, and a loop of their own.
"""

import ctypes
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------


_MOST_ARGUMENTS = 64
_METHODS = {"clear", "size"}


class Function(NamedTuple):
    """A compiled C++ function and what its wrapper hands on to it."""

    address: int
    arguments: tuple[tuple[str, int], ...]
    """Each ("input", i), ("buffer", i), the number of elements ("size", 0), or ("number", n)."""
    buffers: tuple[torch.dtype, ...]
    """What the wrapper allocates: its results, and scalars for itself."""
    results: tuple[int, ...]
    """The buffers that it returns."""


def function_of(compiled: Any, examples: Mapping[int, Sequence[Tensor]]) -> Function | None:
    """The one C++ function that a compiled piece calls, or None where it does more than that.

    Args:
      compiled: what Inductor made.
      examples: inputs for it, which are not changed, by the number of elements of flat tensors; 0 where it takes
        tensors of one shape only.
    """
    wrapper: Any = getattr(compiled, "current_callable", None)
    code = getattr(wrapper, "__code__", None)
    if code is None:
        return None
    kernels = {name: wrapper.__globals__.get(name) for name in code.co_names}
    kernels = {name: address for name, k in kernels.items() if (address := _address(k))}
    known = {*kernels, *_METHODS, "empty_strided_cpu", "torch"}
    if len(kernels) != 1 or any(
        name not in known and not _is_dtype(name) for name in code.co_names
    ):
        return None
    ((name, address),) = kernels.items()
    recorded = [_recorded(wrapper, name, inputs, size) for size, inputs in examples.items()]
    found = recorded[0]
    if found is None or any(other != found for other in recorded):
        return None
    return Function(address, *found) if len(found[0]) <= _MOST_ARGUMENTS else None


def _address(kernel: Any) -> int | None:
    """Of the C++ function behind one that Inductor compiled for Python."""
    module = getattr(kernel, "__self__", None)
    if not isinstance(kernel, types.BuiltinFunctionType) or not isinstance(
        module, types.ModuleType
    ):
        return None
    path = getattr(module, "__file__", None)
    function = getattr(ctypes.CDLL(path), "kernel", None) if path else None
    return ctypes.cast(function, ctypes.c_void_p).value if function else None


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def _recorded(wrapper: Any, kernel: str, inputs: Sequence[Tensor], size: int) -> Any:
    """(arguments, buffers, results) of a run in which nothing is computed; None if it is not understood."""
    calls: list[tuple[Any, ...]] = []
    made: list[Tensor] = []

    def allocate(shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        made.append(torch.empty_strided(shape, stride, dtype=dtype, device="cpu"))
        return made[-1]

    stand_ins = {kernel: lambda *arguments: calls.append(arguments), "empty_strided_cpu": allocate}
    function = types.FunctionType(wrapper.__code__, {**wrapper.__globals__, **stand_ins})
    results = function(wrapper.__self__, list(inputs))
    sources = {id(x): ("input", i) for i, x in enumerate(inputs)}
    sources |= {id(x): ("buffer", i) for i, x in enumerate(made)}

    def source(argument: Any) -> tuple[str, int] | None:
        if isinstance(argument, int):
            return ("size", 0) if size and argument == size else ("number", argument)
        return sources.get(id(argument))

    arguments = tuple(map(source, *calls)) if len(calls) == 1 else (None,)
    returned = [i for i, x in enumerate(made) if any(x is r for r in results)]
    is_known = (
        None not in arguments
        and len(returned) == len(results)
        and all(x.is_contiguous() and (x.ndim == 0 or i in returned) for i, x in enumerate(made))
    )
    order = tuple(next((i for i in returned if made[i] is r), -1) for r in results)
    return (arguments, tuple(x.dtype for x in made), order) if is_known else None
