"""A flat chain as a step on Keras variables, on the JAX backend."""

from typing import Any

import jax
import jax.numpy as jnp

from chainrule.bridges.keras_backends import FlatStep


class JaxStep(FlatStep):
    """Runs the update jitted: a program of its own in an eager loop, inlined where a trainer traces its whole step."""

    def _made(self, name: str, missing: tuple[int, ...], *more: Any) -> Any:
        return jax.jit(self._function(name, missing), inline=True)

    def _like(self, grad: Any, value: Any) -> Any:
        return jnp.asarray(grad, value.dtype)
