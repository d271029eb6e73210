"""A chain as data: which factory makes it, and from which arguments; what a model file holds of a chain.

    {"factory": "chainrule.chains:stam", "arguments": {"b2": 0.99}}

Arguments may be numbers, strings, lists, dicts, and descriptions in turn (an inner chain, a schedule, a routing). A
file must not run code: a factory is a public name of chainrule or optax, or one that is registered with Keras and
called by its registered name, `"package>name"`.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import optax

from chainrule.bridges.step.function import as_transformation

MODULES = (
    *("chainrule", "chainrule.chains", "chainrule.transforms"),
    *(
        "optax",
        "optax.contrib",
        "optax.losses",
        "optax.projections",
        "optax.schedules",
        "optax.transforms",
    ),
)
"""Whose public functions a description may name."""

Lookup = Callable[[str], Any]
"""What is registered under a name, or None."""


@dataclasses.dataclass(frozen=True, eq=False)
class Described:
    """A chain, and how a file describes it."""

    chain: optax.GradientTransformation
    description: dict[str, Any] | None
    """None: the chain was given as an object."""


def described(chain: Any, registered: Lookup = lambda name: None) -> Described:
    """The chain that `chain` is or describes.

    Args:
      chain: a gradient transformation, a function without arguments that makes one, or a description.
      registered: finds a factory outside chainrule and optax by its name.

    Raises:
      ValueError: a description with other keys, or a factory that is not to be had by name.
      TypeError: neither a chain nor a description.

    >>> described({"factory": "optax:sgd", "arguments": {"learning_rate": 0.1}}).chain.init({})
    (EmptyState(), EmptyState())
    >>> described({"factory": "os:system", "arguments": {"command": "true"}})
    Traceback (most recent call last):
      ...
    ValueError: KerasBridge: the factory 'os:system' is not of chainrule or optax, and a model file must not run code...
    """
    if isinstance(chain, Mapping):
        description = _plain(chain)
        return Described(as_transformation(_made(description, registered)), description)
    return Described(as_transformation(chain), None)


def made(factory: str, arguments: dict[str, Any], registered: Lookup) -> Described:
    """The chain that a factory makes; without a description where an argument is an object of another kind."""
    description = {"factory": factory, "arguments": arguments}
    chain = as_transformation(_made(description, registered))
    return Described(chain, _plain(description) if _is_plain(description) else None)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    """A description in dicts, lists, numbers and strings of its own."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(
        f"KerasBridge: a description holds numbers, strings, lists and dicts, got {type(value).__name__}; describe it "
        'in turn by a "factory", or give the chain as an object, which trains but cannot be saved'
    )


def _made(value: Any, registered: Lookup) -> Any:
    """What a description makes; a dict without a factory, or a list, of what its entries make."""
    if isinstance(value, list):
        return [_made(v, registered) for v in value]
    if not isinstance(value, dict):
        return value
    if "factory" not in value:
        if value.keys() & {"arguments"}:
            raise ValueError(
                f'KerasBridge: a description needs a "factory", got the keys {sorted(value)}'
            )
        return {key: _made(v, registered) for key, v in value.items()}
    unknown = value.keys() - {"factory", "arguments"}
    if unknown:
        raise ValueError(
            f'KerasBridge: a description has the keys "factory" and "arguments", got {sorted(unknown)} too'
        )
    arguments = _made(value.get("arguments", {}), registered)
    factory = _factory(value["factory"], registered)
    if isinstance(arguments, list):  # the links of a chain
        return factory(*arguments)
    return factory(**arguments)


def _factory(name: Any, registered: Lookup) -> Callable[..., Any]:
    if not isinstance(name, str):
        raise ValueError(f"KerasBridge: a factory is given by its name, got {name!r}")
    found = registered(name)
    if found is not None:
        return found
    module, _, attribute = name.partition(":")
    if module not in MODULES:
        raise ValueError(
            f"KerasBridge: the factory {name!r} is not of chainrule or optax, and a model file must not run code that "
            f"it names; write it as one of {', '.join(f'{m}:...' for m in MODULES[:4])}, ... or register yours with "
            "`keras.saving.register_keras_serializable(package=...)` and call it 'package>name'"
        )
    home = importlib.import_module(module)
    public = getattr(home, "__all__", None) or [n for n in dir(home) if not n.startswith("_")]
    factory = getattr(home, attribute, None) if attribute in public else None
    owner = str(getattr(factory, "__module__", "")).partition(".")[0]
    if not callable(factory) or owner not in ("chainrule", "optax"):
        close = difflib.get_close_matches(attribute, public, 1)
        hint = f"; did you mean {module}:{close[0]}?" if close else ""
        raise ValueError(f"KerasBridge: {module} has no factory {attribute!r}{hint}")
    return factory
