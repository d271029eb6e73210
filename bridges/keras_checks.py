"""What an optimizer of Keras looks at before anything is written: its variables, its rate, its decay."""

from collections.abc import Sequence
from typing import Any

import keras

from chainrule.bridges.probing import starting_rate
from chainrule.transforms import hyperparams


def rate_of(chain: Any) -> float:
    try:
        rate = starting_rate(chain)
    except Exception as error:
        raise ValueError(
            "KerasBridge: the chain cannot be asked for its learning rate before there are variables; give "
            "`learning_rate` (1.0 leaves the chain's updates as they are)"
        ) from error
    return 1.0 if rate is None else rate


TWICE = (
    "KerasBridge: `weight_decay` is given to Keras, and the chain decays weights too; give it once: "
    "`weight_decay=None` here or in the chain"
)


def check_decay_once(chain: Any, weight_decay: Any) -> None:
    if not weight_decay:
        return
    live = hyperparams(chain.init({}))
    if any(name.endswith("weight_decay") and float(value) != 0 for name, value in live.items()):
        raise ValueError(TWICE)


def check_floating(name: str, variables: Sequence[Any]) -> None:
    for v in variables:
        dtype = keras.backend.standardize_dtype(v.dtype)
        if not keras.backend.is_float_dtype(dtype):
            raise TypeError(
                f"{name}: {path_of(v)!r} has dtype {dtype}, and a chain updates floating-point variables; a quantized "
                "model trains only what its dtype policy keeps in floating point: set `trainable = False` on the rest"
            )


def path_of(variable: Any) -> str:
    return getattr(variable, "path", None) or variable.name


def unique(paths: Sequence[str]) -> list[str]:
    """The paths, numbered from the second of a name on.

    >>> unique(["a", "b", "a"])
    ['a', 'b', 'a#2']
    """
    seen: dict[str, int] = {}
    unique = []
    for path in paths:
        seen[path] = seen.get(path, 0) + 1
        unique.append(path if seen[path] == 1 else f"{path}#{seen[path]}")
    return unique


def value_of(name: str, variable: Any) -> Any:
    """What a variable holds, for a chain whose state starts from it."""
    if keras.backend.backend() == "tensorflow":
        from chainrule.bridges.keras_on_tensorflow import initialised

        if not initialised(variable):
            raise ValueError(
                f"{name}: the chain's state starts from the parameters, and {path_of(variable)!r} has no value yet; "
                "build the model before it trains (`model.build(shape)`, or an `Input` layer)"
            )
    return (
        variable.value
        if keras.backend.backend() == "jax"
        else keras.ops.convert_to_numpy(variable.value)
    )
