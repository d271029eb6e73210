"""Chains as classes of Keras: Keras' names for arguments, Keras' own weight decay, configurations for model files."""

import inspect
from typing import Any, ClassVar

import keras

from chainrule import chains
from chainrule.bridges.described import made
from chainrule.bridges.keras_around import Around
from chainrule.bridges.keras_optimizer import KerasBridge
from chainrule.transforms._words import suggestion

KERAS_NAMES = {"b1": "beta_1", "b2": "beta_2", "eps": "epsilon"}
"""A chain's name for an argument -> Keras'."""

_LEFT_OUT = {
    "learning_rate",
    "weight_decay",
    "inner",
    "mask",
    "decay_mask",
}  # Keras has these itself
_OF_KERAS: dict[str, Any] = {
    **dict.fromkeys(("weight_decay", "clipnorm", "clipvalue", "global_clipnorm")),
    "use_ema": False,
    "ema_momentum": 0.99,
    **dict.fromkeys(
        ("ema_overwrite_frequency", "loss_scale_factor", "gradient_accumulation_steps")
    ),
    "name": None,
    "compile": False,
}
"""Keras' own arguments, and the bridge's."""
_OTHER_WORDS = {
    "lr": "learning_rate",
    "b1": "beta_1",
    "b2": "beta_2",
    "eps": "epsilon",
    "momentum": "muon_beta",
    "beta": "muon_beta",
    "adam_b1": "adam_beta_1",
    "adam_b2": "adam_beta_2",
    "adam_epsilon": "epsilon",
    "adam_weight_decay": "weight_decay",
    "rms_rate": "scale_factor",
    "exclude": "exclude_layers",
    "inner": "optimizer",
    "base_optimizer": "optimizer",
    "inner_optimizer": "optimizer",
    "use_caution": "caution",
    "jit_compile": "compile",
}


class Arguments:
    """The arguments of a class: those of its chain by Keras' names, then Keras' own."""

    chain_name: ClassVar[str]
    """Of `chainrule.chains`."""
    first: ClassVar[str] = "learning_rate"
    defaults: ClassVar[dict[str, Any]] = {}
    """What differs from the chain's own, or is not its own, by Keras' names."""
    left_out: ClassVar[frozenset[str]] = frozenset()
    """The chain's arguments that the class decides."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "chain_name"):
            cls.__signature__ = cls._signature()  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def _own(cls) -> dict[str, Any]:
        """The arguments of the chain, by Keras' names, with their defaults."""
        own = {
            KERAS_NAMES.get(name, name): p.default
            for name, p in inspect.signature(getattr(chains, cls.chain_name)).parameters.items()
            if name not in _LEFT_OUT | cls.left_out
        }
        return {**own, **{k: v for k, v in cls.defaults.items() if k not in _LEFT_OUT}}

    @classmethod
    def _signature(cls) -> inspect.Signature:
        given = inspect.signature(getattr(chains, cls.chain_name)).parameters
        first = inspect.Parameter(cls.first, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        decay = None
        if cls.first == "learning_rate":
            first = first.replace(
                default=cls.defaults.get("learning_rate", given["learning_rate"].default)
            )
            decay = cls.defaults.get("weight_decay", given["weight_decay"].default) or None
        keywords = {**cls._own(), **_OF_KERAS, "weight_decay": decay}
        return inspect.Signature(
            [first]
            + [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
                for name, default in keywords.items()
            ]
        )

    @classmethod
    def _bound(
        cls, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """The first argument, the chain's, and Keras'."""
        signature = cls._signature()
        names = list(signature.parameters)
        for word in kwargs.keys() - set(names):
            meant = _OTHER_WORDS.get(word)
            close = (meant,) if meant in names else suggestion(word, names)
            hint = (
                f"did you mean {' and '.join(map(repr, close))}?"
                if close
                else f"it has {', '.join(names)}"
            )
            raise TypeError(f"{cls.__name__}: unexpected argument {word!r}; {hint}")
        bound = signature.bind(*args, **kwargs)
        chosen = {**bound.arguments, **dict.fromkeys(cls.defaults)}
        bound.apply_defaults()
        given = dict(bound.arguments)
        own = {name: given.pop(name) for name in cls._own()}
        if own.get("preset") is not None:  # it is for what is not given
            own = {name: value for name, value in own.items() if name in chosen}
        first = given.pop(cls.first)
        given["weight_decay"] = given["weight_decay"] or None
        return first, own, given

    @classmethod
    def chain_arguments(cls, own: dict[str, Any]) -> dict[str, Any]:
        """The chain's arguments, by its own names, from those of the class."""
        back = {keras_name: name for name, keras_name in KERAS_NAMES.items()}
        return {back.get(name, name): value for name, value in own.items()}


class Named(Arguments, KerasBridge):
    """A chain as a class; see `chainrule.keras_optimizers`."""

    def __init__(self, *args: Any, **kwargs: Any):
        rate, own, of_keras = self._bound(args, kwargs)
        arguments = {"weight_decay": None, **self.chain_arguments(own)}
        super().__init__(_chain(self.chain_name, arguments), rate, **of_keras)
        self._parts.own = own

    def get_config(self) -> dict[str, Any]:
        """The configuration, for `from_config` and model files."""
        config = super().get_config()
        del config["chain"]
        return {**config, **self._parts.own}


class NamedAround(Arguments, Around):
    """The links of a chain around an optimizer, as a class; see `chainrule.keras_optimizers`."""

    first: ClassVar[str] = "optimizer"

    def __init__(self, *args: Any, **kwargs: Any):
        optimizer, own, of_keras = self._bound(args, kwargs)
        arguments = {"inner": {"factory": "optax:identity"}, **self.chain_arguments(own)}
        super().__init__(optimizer, _chain(self.chain_name, arguments), **of_keras)
        self._parts.own = own

    def get_config(self) -> dict[str, Any]:
        """The configuration, with that of the optimizer inside."""
        config = super().get_config()
        del config["chain"], config["learning_rate"]
        inside = keras.saving.serialize_keras_object(self.optimizer)
        return {**config, **self._parts.own, "optimizer": inside}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """The optimizer of a configuration."""
        inside = keras.saving.deserialize_keras_object(
            config["optimizer"], custom_objects=custom_objects
        )
        return cls(**{**config, "optimizer": inside})


def _chain(name: str, arguments: dict[str, Any]) -> Any:
    return made(f"chainrule.chains:{name}", arguments, keras.saving.get_registered_object)
