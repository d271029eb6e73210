"""A flat chain as a step on Keras variables, on the TensorFlow backend: one XLA call made by `jax2tf`."""

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import tensorflow as tf
from jax.experimental import jax2tf

from chainrule.bridges.keras_backends import FlatStep
from chainrule.native.dtypes import x64_if_wide as wide


class TensorFlowStep(FlatStep):
    """Runs the update as one operation, `XlaCallModule`: eagerly, in a graph, or in a graph that XLA compiles."""

    def _made(self, name: str, missing: tuple[int, ...], *more: Any) -> Any:
        platforms = ("cpu", "cuda") if tf.config.list_physical_devices("GPU") else ("cpu",)
        converted = jax2tf.convert(
            self._function(name, missing),
            with_gradient=False,
            native_serialization_platforms=platforms,
        )
        return tf.function(converted, autograph=False)

    def _run(self, name: str, missing: tuple[int, ...], *arguments: Any) -> tuple[Any, Any]:
        with wide(self._flat.structs):
            return super()._run(name, missing, *arguments)

    def _values(self, variables: Sequence[Any]) -> list[Any]:
        return [tf.convert_to_tensor(v.value) for v in variables]

    def _like(self, grad: Any, value: Any) -> Any:
        """An embedding's gradient may be rows with their indices."""
        return tf.cast(tf.convert_to_tensor(grad), value.dtype)

    def _assign(self, variables: Sequence[Any], values: Sequence[Any]) -> None:
        for variable, value in zip(variables, values, strict=True):
            variable.value.assign(value)


@contextlib.contextmanager
def outside_graphs(name: str) -> Generator[None]:
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
