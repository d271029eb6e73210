"""A flat chain as a step on Keras variables, on the TensorFlow backend: one XLA call made by `jax2tf`."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from jax.experimental import jax2tf

from chainrule.bridges.flat_chain import FlatChain
from chainrule.bridges.probing import wide


class TensorFlowStep:
    """Runs the update as one operation, `XlaCallModule`: eagerly, in a graph, or in a graph that XLA compiles."""

    def __init__(self, flat: FlatChain, compile: bool):
        self._flat = flat
        self._programs: dict[tuple[int, ...], Any] = {}  # by the parameters without a gradient

    def _converted(self, function: Any) -> Any:
        platforms = ("cpu", "cuda") if tf.config.list_physical_devices("GPU") else ("cpu",)
        converted = jax2tf.convert(
            function, with_gradient=False, native_serialization_platforms=platforms
        )
        return tf.function(converted, autograph=False)

    def _program(self, missing: tuple[int, ...]) -> Any:
        if missing not in self._programs:
            step = functools.partial(self._flat.step, missing=missing)
            self._programs[missing] = self._converted(step)
        return self._programs[missing]

    @functools.cached_property
    def _direction(self) -> Any:
        return self._converted(self._flat.direction)

    def __call__(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        stored: Sequence[Any],
        rate: Any,
        missing: tuple[int, ...],
    ) -> None:
        """Writes new parameters and state into the variables `params` and `stored`."""
        values = [tf.convert_to_tensor(v.value) for v in params]
        given = [v for i, v in enumerate(values) if i not in missing]
        grads = [_dense(g, v.dtype) for g, v in zip(grads, given, strict=True)]
        state = [tf.convert_to_tensor(v.value) for v in stored]
        with wide(self._flat.structs):
            new_params, new = self._program(missing)(values, grads, state, rate)
        for variable, value in zip((*params, *stored), (*new_params, *new), strict=True):
            variable.value.assign(value)

    def direction(
        self, params: Sequence[Any], grads: Sequence[Any], stored: Sequence[Any], rate: Any
    ) -> list[Any]:
        """The updates for values of parameters and gradients; writes the state into the variables `stored`."""
        state = [tf.convert_to_tensor(v.value) for v in stored]
        grads = [_dense(g, p.dtype) for g, p in zip(grads, params, strict=True)]
        with wide(self._flat.structs):
            updates, new = self._direction(list(params), grads, state, rate)
        for variable, value in zip(stored, new, strict=True):
            variable.value.assign(value)
        return updates


def _dense(grad: Any, dtype: Any) -> Any:
    return tf.cast(tf.convert_to_tensor(grad), dtype)


@contextlib.contextmanager
def outside_graphs(name: str) -> Iterator[None]:
    """Where an optimizer makes its variables: eagerly, also while the first step is traced.

    Raises:
      NotImplementedError: several replicas; each would make the update from its own gradients, in silence.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas > 1:
        raise NotImplementedError(
            f"{name}: a tf.distribute strategy with {replicas} replicas is not supported; train on one, or on the "
            "JAX backend with `keras.distribution.DataParallel`"
        )
    with tf.init_scope():
        yield


def initialised(variable: Any) -> bool:
    """Whether a variable has a value; one that was made while a step is traced gets it when that step first runs."""
    return bool(getattr(variable, "value", variable).is_initialized())
