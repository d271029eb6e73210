"""Any chain as an optimizer of Keras, on its JAX, torch and TensorFlow backends."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from chainrule.bridges.described import Described, described
from chainrule.bridges.flat_chain import FlatChain, Stored
from chainrule.bridges.keras_backends import step_class
from chainrule.bridges.keras_checks import (
    TWICE,
    check_decay_once,
    check_floating,
    path_of,
    rate_of,
    unique,
    value_of,
)
from chainrule.bridges.keras_hyperparams import Hyperparams, number_in
from chainrule.bridges.probing import RATE, decays, in_tiers
from chainrule.bridges.step.trace import Struct
from chainrule.transforms import metrics

PACKAGE = "chainrule"


class _Parts:
    """What a bridge has beside variables; Keras tracks every list and dict that is an optimizer's own attribute."""

    def __init__(self, given: Described, compile: bool):
        self.given, self.compile = given, compile
        self.flat: FlatChain | None = None
        self.step: Any = None
        self.params: list[Any] = []
        self.stored: list[Any] = []
        self.position: dict[Any, int] = {}
        self.tiers: tuple[int, ...] | None = (
            None  # of the parameters, where they are not the first ones
        )
        self.own: dict[str, Any] = {}  # the arguments of a class with names of its own


@keras.saving.register_keras_serializable(PACKAGE)
class KerasBridge(keras.optimizers.Optimizer):
    """Any chain, ours or optax's, as an optimizer of Keras.

    Keras unscales, accumulates and clips gradients and decays weights as for any optimizer; the chain then makes the
    update; Keras' moving average of the weights comes after it. The chain sees the variables as a dict by
    `variable.path` (a path that occurs again ends in `#2`), so it can route by name. Its state is kept in Keras
    variables: in `model.save`, checkpoints and `set_weights`, bit for bit. On JAX the update is jitted; on torch it
    is lowered to torch and runs in place; on TensorFlow it is one XLA operation. All three are the same function.

    Args:
      chain: a gradient transformation, which trains but cannot be saved in a model file, or its description:
        `{"factory": "chainrule.chains:stam", "arguments": {"b2": 0.99}}`. A factory is a public name of `chainrule`,
        `chainrule.chains`, `chainrule.transforms` or `optax`, or `"package>name"` of a function that is registered
        with Keras; arguments may be descriptions in turn.
      learning_rate: a float, a `keras.optimizers.schedules.LearningRateSchedule` or a function. It is fed to the
        chain at every step, so schedules, `ReduceLROnPlateau` and `optimizer.learning_rate = x` work. If the chain
        has no live learning rate (those of optax) its updates are multiplied by it: `optax.adam(1.0)` with a rate here.
        Default: what the chain was made with, or 1.0.
      name: the optimizer's name.
      compile: on the torch backend, whether the update runs through Inductor. JAX and TensorFlow always compile.
      **keras_arguments: as of `keras.optimizers.Optimizer`: `weight_decay`, `clipnorm`, `clipvalue`,
        `global_clipnorm`, `use_ema`, `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor`,
        `gradient_accumulation_steps`. Keras multiplies its weight decay by the learning rate that it knows, so give
        that here and not to a chain of optax.

    Raises:
      TypeError: no chain; when it is built, a chain that reads the loss, or variables that are not floating point.
      ValueError: weight decay both here and in the chain; a description that names no factory; when it is built, a
        pattern that matches no variable.
      NotImplementedError: several replicas of TensorFlow.

    >>> import chainrule
    >>> optimizer = chainrule.KerasBridge(chainrule.chains.stam(learning_rate=0.5), clipnorm=1.0)
    >>> weights = keras.Variable([1.0, 2.0], name="weights")
    >>> optimizer.apply([keras.ops.ones(2)], [weights])
    >>> optimizer.hyperparams["b2"] = 0.99
    >>> optimizer.learning_rate = 0.1
    >>> print(optimizer.explain().splitlines()[0])
    1 variables, 2 elements, Keras on ...
    """

    _scaled = (
        True  # whether the learning rate multiplies the updates of a chain that has none of its own
    )

    def __init__(
        self,
        chain: Any,
        learning_rate: Any = None,
        name: str | None = None,
        *,
        compile: bool = False,
        **keras_arguments: Any,
    ):
        known = isinstance(chain, Described)
        given = chain if known else described(chain, keras.saving.get_registered_object)
        if learning_rate is None:
            learning_rate = rate_of(given.chain)
        if isinstance(learning_rate, (int, np.floating)) and not isinstance(learning_rate, bool):
            learning_rate = float(learning_rate)
        check_decay_once(given.chain, keras_arguments.get("weight_decay"))
        super().__init__(learning_rate=learning_rate, name=name, **keras_arguments)
        self._parts = _Parts(given, bool(compile))

    # ---- building --------------------------------------------------------------------------

    def build(self, variables: Any) -> None:
        """Traces the chain and makes the variables of its state.

        Raises:
          ValueError: it was built for other variables; the chain's initial state depends on values that do not exist
            yet.
        """
        variables = list(variables)
        if self.built:
            if [id(v) for v in variables] != [id(v) for v in self._trainable_variables]:
                raise ValueError(
                    f"{self.name}: it was built for {len(self._trainable_variables)} variables and cannot be built "
                    f"again for these {len(variables)}; make a new optimizer"
                )
            return
        if keras.backend.backend() == "tensorflow":
            from chainrule.bridges.keras_on_tensorflow import outside_graphs

            with outside_graphs(self.name):
                self._build(variables)
        else:
            self._build(variables)

    def _build(self, variables: list[Any]) -> None:
        params = [v for v in variables if not self._overwrite_variable_with_gradient(v)]
        check_floating(self.name, params)
        structs = [
            Struct(tuple(v.shape), jnp.dtype(keras.backend.standardize_dtype(v.dtype)))
            for v in params
        ]
        parts = self._parts
        names = unique([path_of(v) for v in params])
        chain = in_tiers(parts.given.chain, parts.tiers)
        flat = FlatChain(chain, names, structs, self._scaled)
        if self.weight_decay and decays(flat.chain, dict(zip(names, structs, strict=True))):
            raise ValueError(TWICE)
        values = [value_of(self.name, v) for v in params] if flat.init_reads_values else None
        initial = flat.initial(values)
        # Nothing was written up to here.
        super().build(variables)
        parts.params = params
        parts.position = {self._var_key(v): i for i, v in enumerate(params)}
        self._adopt(flat, initial)

    def _adopt(self, flat: FlatChain, values: Sequence[np.ndarray]) -> None:
        """Makes the variables of the state, and the step that runs on them."""
        parts = self._parts
        parts.flat, parts.step = flat, step_class()(flat, parts.compile)
        parts.stored = [
            self._state_variable(kept, value, parts.params)
            for kept, value in zip(flat.stored, values, strict=True)
        ]

    def _state_variable(self, kept: Stored, value: np.ndarray, params: Sequence[Any]) -> Any:
        owner = None if kept.slot.owner is None else params[kept.slot.owner]
        alike = owner is not None and tuple(owner.shape) == kept.shape
        name = kept.slot.name if owner is None else f"{path_of(owner)}_{kept.slot.name}"
        initializer: Any = (lambda shape, dtype: value) if value.any() else "zeros"
        return self.add_variable(
            shape=kept.shape,
            initializer=initializer,
            dtype=kept.dtype,
            layout=getattr(owner, "_layout", None) if alike else None,
            name=re.sub(r"[^A-Za-z0-9_.\-]", "_", name),
        )

    # ---- the step --------------------------------------------------------------------------

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        parts = self._parts
        ordered, missing = self._ordered(grads, trainable_variables)
        rate = keras.ops.cast(learning_rate, "float32")
        parts.step(parts.params, ordered, parts.stored, rate, missing)

    def _ordered(self, grads: Any, variables: Any) -> tuple[list[Any], tuple[int, ...]]:
        """The gradients in the order of the chain's parameters, and the positions of those that have none."""
        parts = self._parts
        pairs = zip(grads, variables, strict=True)
        given = {parts.position[self._var_key(v)]: g for g, v in pairs}
        missing = tuple(i for i in range(len(parts.params)) if i not in given)
        return [given[i] for i in sorted(given)], missing

    # ---- looking inside --------------------------------------------------------------------

    @property
    def chain(self) -> Any:
        """The gradient transformation."""
        return self._parts.given.chain

    @property
    def hyperparams(self) -> Hyperparams:
        """The live hyperparameters by name: read and set as in a dict, between steps, without another trace."""
        parts = self._ready("hyperparams")
        return Hyperparams(self, {name: parts.stored[i] for name, i in parts.flat.live.items()})

    def state(self) -> Any:
        """The chain's state as a JAX pytree, with the values that it has now."""
        parts = self._ready("state")
        with jax.enable_x64(
            any(k.dtype in ("float64", "int64", "uint64") for k in parts.flat.stored)
        ):
            values = [
                jnp.asarray(keras.ops.convert_to_numpy(v.value), kept.dtype)
                for v, kept in zip(parts.stored, parts.flat.stored, strict=True)
            ]
            return parts.flat.state(values, number_in(self.learning_rate))

    def metrics(self) -> dict[str, Any]:
        """What the chain knows of its run: see `chainrule.metrics`."""
        return metrics(self.state())

    def explain(self) -> str:
        """What the chain became in Keras, as text: its hyperparameters, and its state with the memory it takes."""
        parts = self._ready("explain")
        elements = sum(math.prod(s.shape) for s in parts.flat.structs)
        lines = [
            f"{len(parts.params)} variables, {elements:,} elements, Keras on {keras.backend.backend()}",
            f"  hyperparameters: {', '.join([RATE, *parts.flat.live])}"
            + ("" if parts.flat.feeds_rate else " (the learning rate multiplies the updates)"),
            f"  {'state':40}{'variables':>12}{'bytes':>16}",
        ]
        fields: dict[str, list[int]] = {}
        for kept in parts.flat.stored:
            size = math.prod(kept.shape) * jnp.dtype(kept.dtype).itemsize
            fields.setdefault(kept.slot.name, []).append(size)
        lines += [
            f"  {name:40}{len(sizes):>12,}{sum(sizes):>16,}" for name, sizes in fields.items()
        ]
        return "\n".join(
            [*lines, f"  {'total':40}{len(parts.stored):>12,}{parts.flat.state_bytes:>16,}"]
        )

    def _ready(self, what: str) -> Any:
        if not self.built:
            raise RuntimeError(
                f"{self.name}: `{what}` needs the optimizer's variables; call `build(model.trainable_variables)`, or "
                "train a step, before it"
            )
        return self._parts

    # ---- files -----------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The configuration, for `from_config` and model files.

        Raises:
          TypeError: the chain was given as an object.
        """
        given = self._parts.given
        if given.description is None:
            raise TypeError(
                f"{self.name}: a chain that was given as an object has no description for a model file; give "
                'KerasBridge({"factory": "chainrule.chains:...", "arguments": {...}}), or a class of '
                "`chainrule.keras_optimizers`; weights alone are saved by `model.save_weights`"
            )
        config = {
            **super().get_config(),
            "chain": given.description,
            "compile": self._parts.compile,
        }
        return {**config, "tiers": list(self._parts.tiers)} if self._parts.tiers else config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """The optimizer of a configuration."""
        config = dict(config)
        tiers = config.pop("tiers", None)
        optimizer = super().from_config(config, custom_objects)
        optimizer._parts.tiers = tiers and tuple(tiers)
        return optimizer

    def load_own_variables(self, store: Any) -> None:
        """Loads the state; shapes are compared before anything is written."""
        for i, variable in enumerate(self.variables):
            if str(i) in store.keys() and tuple(store[str(i)].shape) != tuple(variable.shape):  # noqa: SIM118
                raise ValueError(
                    f"{self.name}: the saved {variable.path!r} has shape {tuple(store[str(i)].shape)}, here it has "
                    f"{tuple(variable.shape)}; the chain and the model must be those that were saved"
                )
        super().load_own_variables(store)
