"""Named sets of arguments for a chain."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from chainrule.transforms._checks import check_choice
from chainrule.transforms._words import bind


def presets(
    table: Mapping[str, Mapping[str, Any]], *, same: Mapping[str, Mapping[str, str]] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a chain the argument `preset`: arguments by name, for those that the caller does not give.

    Args:
      table: from preset name to arguments.
      same: from preset name to arguments that take the value of another one, by its name, unless that is `None`.

    Returns:
      A decorator for a function with an argument `preset`. What it makes has both tables as `presets`, merged: a
      value of `same` is the other argument's name in backquotes.

    >>> @presets({"fast": {"b1": 0.8}})
    ... def chain(b1=0.9, b2=0.99, preset=None):
    ...     return b1, b2
    >>> chain(preset="fast"), chain(b1=0.9, preset="fast")
    ((0.8, 0.99), (0.9, 0.99))
    >>> chain.presets
    {'fast': {'b1': 0.8}}
    """
    linked = same or {}

    def decorate(factory: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(factory)

        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> Any:
            given = bind(factory.__name__, signature, args, kwargs).arguments
            name = given.get("preset")
            check_choice(factory.__name__, "preset", name, (None, *table))
            chosen = {**table.get(name or "", {}), **given}
            for argument, other in linked.get(name or "", {}).items():
                value = chosen.get(other, signature.parameters[other].default)
                if value is not None:
                    chosen.setdefault(argument, value)
            return factory(**chosen)

        shown = {
            name: {**arguments, **{a: f"`{other}`" for a, other in linked.get(name, {}).items()}}
            for name, arguments in table.items()
        }
        setattr(make, "presets", shown)  # noqa: B010 -- for `chainrule show`; functions declare no attributes
        return make

    return decorate
