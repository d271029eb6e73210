"""Which class runs a flat chain on the backend that Keras has."""

from typing import Any

import keras


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
