"""What an exported step does, in order: the calls of its functions."""

# pyright: reportUnusedClass=false, reportUnusedFunction=false
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chainrule.bridges.export.runtime_lists import _Entries  # pyright: ignore[reportPrivateUsage]

# ------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A call of one of the step's functions; or a copy, which has none."""

    name: str
    arguments: tuple[Any, ...]
    results: tuple[Any, ...]


class _Record(TorchDispatchMode):
    """The calls of a step in order; None if it does anything but to call its functions and to copy."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] | None = []
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if self.inside or self.calls is None or not isinstance(result, Tensor):
            return result
        if func is torch.ops.aten.copy_.default:
            self.calls.append(_Call("", (args[1],), (args[0],)))
        elif func is torch.ops.aten.clone.default:
            self.calls.append(_Call("", (args[0],), (result,)))
        else:
            self.calls = None
        return result

    def recorded(self, name: str) -> Callable[..., Any]:
        function = _with_entries(name)

        def call(*arguments: Any) -> Any:
            self.inside = True
            made = function(*arguments)
            self.inside = False
            if self.calls is not None:
                self.calls.append(_Call(name, arguments, _results(made)))
            return made

        return call


def _results(made: Any) -> tuple[Any, ...]:
    return () if made is None else made if type(made) is tuple else (made,)


def _rebound(function: Any, names: Mapping[str, Any]) -> Callable[..., Any]:
    """A function that finds other things under some names."""
    return types.FunctionType(function.__code__, {**function.__globals__, **names})


def _with_entries(name: str) -> Callable[..., Any]:
    """A function of the step that gives numbers as entries of a vector."""
    return _rebound(globals()[name], {"unbind": lambda x: _Entries(x.clone())})
