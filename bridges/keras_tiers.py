"""Moving parameters between COSMIC's tiers under `fit`: a callback, since a move changes the shapes of the state."""

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import keras

import chainrule
from chainrule.bridges.flat_chain import FlatChain
from chainrule.bridges.keras_optimizer import KerasBridge
from chainrule.bridges.probing import in_tiers
from chainrule.bridges.step.tiers import tiered_states


def retier(optimizer: KerasBridge, grads: Sequence[Any]) -> bool:
    """Moves parameters between tiers, if a reassignment is due; between steps.

    Args:
      optimizer: its chain has tiers, and it is built.
      grads: arrays, one for each variable that the optimizer updates, in their order.

    Returns:
      Whether something moved. The optimizer then has other variables: whatever was compiled with the old ones must be
      compiled again (`model.make_train_function(force=True)`).

    Raises:
      ValueError: the chain has no tiers, or several.
    """
    parts, state = optimizer._ready("retier"), optimizer.state()
    old = tiered_states(state)
    if len(old) != 1:
        raise ValueError(
            f"{optimizer.name}: `retier` needs a chain with one tiered state, this one has {len(old)}"
        )
    names = parts.flat.names
    values = [jnp.asarray(keras.ops.convert_to_numpy(v.value)) for v in parts.params]
    params = dict(zip(names, values, strict=True))
    new = chainrule.retier(state, dict(zip(names, map(jnp.asarray, grads), strict=True)), params)
    tiers = tiered_states(new)[0].assignment.tiers
    if jax.tree.structure(new) == jax.tree.structure(state):
        for variable, value in zip(parts.stored, parts.flat.values_of(new), strict=True):
            variable.assign(value)
        return False
    flat = FlatChain(in_tiers(parts.given.chain, tiers), names, parts.flat.structs)
    for variable in parts.stored:
        optimizer._untrack_variable(variable)
    parts.tiers = tiers
    optimizer._adopt(flat, flat.values_of(new))
    return True


class Retier(keras.callbacks.Callback):
    """Reassigns COSMIC's tiers where its policy says, from the gradients of one batch.

    COSMIC itself takes the gradients of the step that is due; under `fit` these are inside a compiled step. Give a
    batch that stands for the data. Without this callback the tiers stay what they are.

    Args:
      x: inputs of a batch.
      y: its targets.

    >>> import numpy as np
    >>> from chainrule.transforms import TierPolicy
    >>> model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    >>> policy = TierPolicy({2: 0.5}, reassignment_interval=2, min_tier_steps=0)
    >>> model.compile(chainrule.KerasBridge(chainrule.chains.cosmic(policy=policy)), loss="mse")
    >>> x, y = np.ones((8, 3)), np.ones((8, 2))
    >>> history = model.fit(x, y, batch_size=2, verbose=0, callbacks=[Retier(x[:4], y[:4])])
    >>> model.optimizer.metrics()["tier_occupancy"]
    {0: 1, 2: 1}
    """

    def __init__(self, x: Any, y: Any):
        super().__init__()
        self.x, self.y = x, y
        self._made = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Finds how many steps were made."""
        optimizer = self._optimizer()
        self._made = (
            int(cast(Any, keras.ops.convert_to_numpy(optimizer.iterations)))
            if optimizer.built
            else 0
        )

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Reassigns, if the step that comes is due."""
        optimizer, model = self._optimizer(), cast(Any, self.model)
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        (tiered,) = tiered_states(
            jax.tree.unflatten(optimizer._parts.flat.structure, optimizer._parts.flat.avals)
        )
        self._made += 1
        if self._made % tiered.assignment.policy.reassignment_interval:
            return
        if keras.backend.backend() == "jax":
            model.jax_state_sync()
        if retier(optimizer, loss_gradients(model, self.x, self.y)):
            model.make_train_function(force=True)

    def _optimizer(self) -> Any:
        optimizer = cast(Any, self.model).optimizer
        return getattr(optimizer, "inner_optimizer", optimizer)


def loss_gradients(model: Any, x: Any, y: Any) -> list[Any]:
    """The gradients of a compiled model's loss on one batch, as arrays; nothing is written."""
    x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
    variables = model.trainable_variables
    backend = keras.backend.backend()
    if backend == "jax":
        others = [v.value for v in model.non_trainable_variables]

        def loss(values: Any) -> Any:
            state = zip(
                (*variables, *model.non_trainable_variables), (*values, *others), strict=True
            )
            with keras.StatelessScope(list(state)):
                return model.compute_loss(x, y, model(x, training=True))

        return jax.jit(jax.grad(loss))([v.value for v in variables])
    if backend == "tensorflow":
        from chainrule.bridges.keras_on_tensorflow import loss_gradients as gradients
    else:
        from chainrule.bridges.keras_on_torch import loss_gradients as gradients
    return [keras.ops.convert_to_numpy(g) for g in gradients(model, x, y)]
