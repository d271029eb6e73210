"""A flat chain as a step on Keras variables, on the TensorFlow backend: one XLA call made by `jax2tf`."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from jax.experimental import jax2tf

from chainrule.bridges.flat_chain import FlatChain
from chainrule.native.dtypes import x64_if_wide as wide


class TensorFlowStep:
    """Runs the update as one operation, `XlaCallModule`: eagerly, in a graph, or in a graph that XLA compiles."""

    def __init__(self, flat: FlatChain, compile: bool):
        self._flat = flat
        self._programs: dict[tuple[str, tuple[int, ...]], Any] = {}

    def _program(self, name: str, missing: tuple[int, ...]) -> Any:
        """`FlatChain.step` or `.direction`, for the parameters without a gradient."""
        if (name, missing) not in self._programs:
            platforms = ("cpu", "cuda") if tf.config.list_physical_devices("GPU") else ("cpu",)
            converted = jax2tf.convert(
                functools.partial(getattr(self._flat, name), missing=missing),
                with_gradient=False,
                native_serialization_platforms=platforms,
            )
            self._programs[name, missing] = tf.function(converted, autograph=False)
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
        values, state = _values(params), _values(stored)
        grads = _dense(grads, values, missing)
        with wide(self._flat.structs):
            new_params, new = self._program("step", missing)(values, grads, state, rate)
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
        given = [list(params), _dense(grads, params, missing), _values(stored), rate]
        if moved is not None:
            given.append(list(moved))
        with wide(self._flat.structs):
            updates, new = self._program("direction", missing)(*given)
        _assign(stored, new)
        return list(updates)


def _values(variables: Sequence[Any]) -> list[Any]:
    return [tf.convert_to_tensor(v.value) for v in variables]


def _dense(grads: Sequence[Any], values: Sequence[Any], missing: tuple[int, ...]) -> list[Any]:
    """The gradients as tensors in the dtypes of their parameters; an embedding's may be rows with their indices."""
    given = [v for i, v in enumerate(values) if i not in missing]
    return [tf.cast(tf.convert_to_tensor(g), v.dtype) for g, v in zip(grads, given, strict=True)]


def _assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.value.assign(value)


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


def loss_gradients(model: Any, x: Any, y: Any) -> list[Any]:
    """The gradients of a compiled model's loss on one batch."""
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True))
    grads = tape.gradient(loss, [v.value for v in model.trainable_variables])
    return [tf.convert_to_tensor(g) for g in grads]
