"""A flat chain as a step on Keras variables, on the JAX backend."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from chainrule.bridges.flat_chain import FlatChain


class JaxStep:
    """Runs the update jitted: a program of its own in an eager loop, inlined where a trainer traces its whole step."""

    def __init__(self, flat: FlatChain, compile: bool):
        self._flat = flat
        self._programs: dict[tuple[str, tuple[int, ...]], Any] = {}

    def _program(self, name: str, missing: tuple[int, ...]) -> Any:
        """`FlatChain.step` or `.direction`, for the parameters without a gradient."""
        if (name, missing) not in self._programs:
            function = functools.partial(getattr(self._flat, name), missing=missing)
            self._programs[name, missing] = jax.jit(function, inline=True)
        return self._programs[name, missing]

    def __call__(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        stored: Sequence[Any],
        rate: Any,
        missing: tuple[int, ...],
    ) -> None:
        """Writes new parameters and state into the variables `params` and `stored`."""
        values = [v.value for v in params]
        grads = _alike(grads, values, missing)
        step = self._program("step", missing)
        new_params, new = step(values, grads, [v.value for v in stored], rate)
        _assign((*params, *stored), (*new_params, *new))

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
        grads = _alike(grads, params, missing)
        values = [v.value for v in stored]
        updates, new = self._program("direction", missing)(params, grads, values, rate, moved)
        _assign(stored, new)
        return updates


def _alike(grads: Sequence[Any], values: Sequence[Any], missing: tuple[int, ...]) -> list[Any]:
    """The gradients in the dtypes of their parameters."""
    given = [v for i, v in enumerate(values) if i not in missing]
    return [jnp.asarray(g, v.dtype) for g, v in zip(grads, given, strict=True)]


def _assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
