"""Atoms around any optimizer of Keras: what they make of its gradients, or of the step that it makes."""

from typing import Any

import keras

from chainrule.bridges.described import Described
from chainrule.bridges.keras_optimizer import KerasBridge


class Around(KerasBridge):
    """An optimizer of Keras that hands another one its gradients.

    The other's step count, learning rate and schedule, weight decay, clipping and moving average go on working, and
    are read and set through this one. Subclasses say which atoms, and on which side.

    Args:
      optimizer: any optimizer of Keras, also one of these, or its name.
      given: the atoms.
      name: the optimizer's name.
      **keras_arguments: as of `keras.optimizers.Optimizer`, for what happens before the atoms.

    Raises:
      TypeError: `optimizer` is none.
      ValueError: it accumulates gradients or scales the loss, which the outermost one does; weight decay in both.
    """

    _scaled = False
    _after = (
        False  # whether the atoms are given the step that the other has made, else its gradients
    )

    def __init__(
        self, optimizer: Any, given: Described, name: str | None = None, **keras_arguments: Any
    ):
        kind = type(self).__name__
        if isinstance(optimizer, str):
            optimizer = keras.optimizers.get(optimizer)
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise TypeError(
                f"{kind}: `optimizer` must be an optimizer of Keras or its name, got {type(optimizer).__name__}; wrap "
                "a chain with `chainrule.chains` before it goes into a KerasBridge"
            )
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(f"{kind}: put LossScaleOptimizer around {kind}, not inside it")
        if optimizer.gradient_accumulation_steps:
            raise ValueError(
                f"{kind}: give `gradient_accumulation_steps` to {kind}, so that it sees whole gradients, not to the "
                f"{type(optimizer).__name__} inside it"
            )
        if optimizer.weight_decay and keras_arguments.get("weight_decay"):
            raise ValueError(
                f"{kind}: `weight_decay` is given to {kind} and to the {type(optimizer).__name__} inside it; give it "
                "once"
            )
        if optimizer.loss_scale_factor is not None:  # the outermost one scales the loss
            keras_arguments.setdefault("loss_scale_factor", optimizer.loss_scale_factor)
            optimizer.loss_scale_factor = None
        super().__init__(given, 1.0, name, **keras_arguments)
        self.optimizer = optimizer

    def _build(self, variables: list[Any]) -> None:
        super()._build(variables)
        self.optimizer.build(variables)

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        parts = self._parts
        ordered, missing = self._ordered(grads, trainable_variables)
        given = [v for i, v in enumerate(parts.params) if i not in missing]
        old = [keras.ops.copy(v.value) if self._after else v.value for v in parts.params]
        one = keras.ops.ones((), "float32")
        if not self._after:
            filtered = parts.step.direction(old, ordered, parts.stored, one, missing)
            self.optimizer.apply(filtered, given)
            return
        self.optimizer.apply(ordered, given)
        before = [value for i, value in enumerate(old) if i not in missing]
        moved = [keras.ops.subtract(v.value, b) for v, b in zip(given, before, strict=True)]
        updates = parts.step.direction(old, ordered, parts.stored, one, missing, moved)
        for variable, value, update in zip(given, before, updates, strict=True):
            variable.assign(keras.ops.add(value, update))

    @property
    def variables(self) -> list[Any]:
        """This optimizer's variables, then those of the one inside."""
        return [*self._variables, *self.optimizer.variables]

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the optimizer inside."""
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.optimizer.learning_rate = value

    @property
    def iterations(self) -> Any:
        """The step count of the optimizer inside."""
        return self.optimizer.iterations

    def finalize_variable_values(self, var_list: Any) -> None:
        """Ends the moving averages of both."""
        self.optimizer.finalize_variable_values(var_list)
        super().finalize_variable_values(var_list)
