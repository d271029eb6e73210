"""The live hyperparameters of an optimizer of Keras as a mapping."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, cast

import keras
import numpy as np

from chainrule.bridges.probing import RATE
from chainrule.transforms._checks import check_bounds


def number_in(value: Any) -> float:
    """The number in a tensor of Keras, with as few digits as float32 needs."""
    return float(str(np.float32(cast(Any, keras.ops.convert_to_numpy(value)))))


class Hyperparams(MutableMapping[str, float]):
    """Name -> number; setting an entry writes the optimizer's variable.

    Args:
      optimizer: whose learning rate is the entry `"learning_rate"`.
      variables: the other hyperparameters' variables by name.
    """

    def __init__(self, optimizer: Any, variables: Mapping[str, Any]):
        self._optimizer, self._variables = optimizer, variables

    def __getitem__(self, name: str) -> float:
        value = self._optimizer.learning_rate if name == RATE else self._variable(name).value
        return number_in(value)

    def __setitem__(self, name: str, value: float) -> None:
        check_bounds(self._optimizer.name, **{name.rpartition(".")[2]: value})
        if name == RATE:
            self._optimizer.learning_rate = value
        else:
            self._variable(name).assign(value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{self._optimizer.name}: hyperparameters cannot be removed, got {name!r}")

    def __iter__(self) -> Iterator[str]:
        return iter([RATE, *self._variables])

    def __len__(self) -> int:
        return 1 + len(self._variables)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _variable(self, name: str) -> Any:
        if name not in self._variables:
            raise KeyError(
                f"{self._optimizer.name}: no hyperparameter {name!r}; it has {sorted(self)}"
            )
        return self._variables[name]
