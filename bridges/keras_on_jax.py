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
        self._programs: dict[tuple[int, ...], Any] = {}  # by the parameters without a gradient
        self._direction = jax.jit(flat.direction, inline=True)

    def _program(self, missing: tuple[int, ...]) -> Any:
        if missing not in self._programs:
            step = functools.partial(self._flat.step, missing=missing)
            self._programs[missing] = jax.jit(step, inline=True)
        return self._programs[missing]

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
        given = [v for i, v in enumerate(values) if i not in missing]
        grads = [jnp.asarray(g, v.dtype) for g, v in zip(grads, given, strict=True)]
        new_params, new = self._program(missing)(values, grads, [v.value for v in stored], rate)
        for variable, value in zip((*params, *stored), (*new_params, *new), strict=True):
            variable.assign(value)

    def direction(
        self, params: Sequence[Any], grads: Sequence[Any], stored: Sequence[Any], rate: Any
    ) -> list[Any]:
        """The updates for values of parameters and gradients; writes the state into the variables `stored`."""
        updates, new = self._direction(params, grads, [v.value for v in stored], rate)
        for variable, value in zip(stored, new, strict=True):
            variable.assign(value)
        return updates
