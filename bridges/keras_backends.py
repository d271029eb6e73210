"""A flat chain as a step on Keras variables: what the backends share, and which class is that of a backend."""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from chainrule.bridges.flat_chain import FlatChain


class FlatStep(abc.ABC):
    """Runs a flat chain on Keras variables. A backend says how in `_made`, `_run`, `_values`, `_like` and `_assign`."""

    def __init__(self, flat: FlatChain, compile: bool):
        self._flat, self._compile = flat, compile
        self._programs: dict[Any, Any] = {}

    def __call__(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        stored: Sequence[Any],
        rate: Any,
        missing: tuple[int, ...],
    ) -> None:
        """Writes new parameters and state into the variables `params` and `stored`."""
        values, state = self._values(params), self._values(stored)
        grads = self._all_like(grads, values, missing)
        new_params, new = self._run("step", missing, values, grads, state, rate)
        self._assign((*params, *stored), (*new_params, *new))

    def direction(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        stored: Sequence[Any],
        rate: Any,
        missing: tuple[int, ...],
        moved: Sequence[Any] | None = None,
    ) -> list[Any]:
        """The updates for values of parameters and gradients; writes the state into the variables `stored`."""
        grads, state = self._all_like(grads, params, missing), self._values(stored)
        more = [] if moved is None else [list(moved)]
        updates, new = self._run("direction", missing, list(params), grads, state, rate, *more)
        self._assign(stored, new)
        return list(updates)

    def _all_like(
        self, grads: Sequence[Any], values: Sequence[Any], missing: tuple[int, ...]
    ) -> list[Any]:
        """The gradients in the dtypes of their parameters."""
        given = [v for i, v in enumerate(values) if i not in missing]
        return [self._like(g, v) for g, v in zip(grads, given, strict=True)]

    def _function(self, name: str, missing: tuple[int, ...]) -> Callable[..., Any]:
        """`FlatChain.step` or `.direction`, for the parameters without a gradient."""
        return functools.partial(getattr(self._flat, name), missing=missing)

    def _program(self, name: str, missing: tuple[int, ...], *more: Any) -> Any:
        """What the backend makes of the function, once."""
        key = (name, missing, *more)
        if key not in self._programs:
            self._programs[key] = self._made(name, missing, *more)
        return self._programs[key]

    @abc.abstractmethod
    def _made(self, name: str, missing: tuple[int, ...], *more: Any) -> Any:
        """The function as the backend's program."""

    def _run(self, name: str, missing: tuple[int, ...], *arguments: Any) -> tuple[Any, Any]:
        """The program on values: lists of parameters, gradients and state, the rate, and `moved` if there is one."""
        return self._program(name, missing)(*arguments)

    def _values(self, variables: Sequence[Any]) -> list[Any]:
        """What the variables hold."""
        return [v.value for v in variables]

    @abc.abstractmethod
    def _like(self, grad: Any, value: Any) -> Any:
        """A gradient in the dtype of `value`."""

    def _assign(self, variables: Sequence[Any], values: Sequence[Any]) -> None:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


def step_class() -> Any:
    """The class that runs a flat chain on the backend."""
    backend = keras.backend.backend()
    if backend == "jax":
        from chainrule.bridges.keras_on_jax import JaxStep as Step
    elif backend == "torch":
        from chainrule.bridges.keras_on_torch import TorchStep as Step
    elif backend == "tensorflow":
        from chainrule.bridges.keras_on_tensorflow import TensorFlowStep as Step
    else:
        raise NotImplementedError(
            f"KerasBridge: no step for the backend {backend!r}; it runs on jax, torch and tensorflow"
        )
    return Step
