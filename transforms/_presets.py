"""Named sets of arguments for a chain."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from chainrule.transforms._checks import check_choice
from chainrule.transforms._words import bind


def presets(
    table: Mapping[str, Mapping[str, Any]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a chain the argument `preset`: arguments by name, for those that the caller does not give.

    Args:
      table: from preset name to arguments.

    Returns:
      A decorator for a function with an argument `preset`.

    >>> @presets({"fast": {"b1": 0.8}})
    ... def chain(b1=0.9, b2=0.99, preset=None):
    ...     return b1, b2
    >>> chain(preset="fast"), chain(b1=0.9, preset="fast")
    ((0.8, 0.99), (0.9, 0.99))
    """

    def decorate(factory: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(factory)

        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> Any:
            given = bind(factory.__name__, signature, args, kwargs).arguments
            name = given.get("preset")
            check_choice(factory.__name__, "preset", name, (None, *table))
            return factory(**{**table.get(name or "", {}), **given})

        return make

    return decorate
