"""Which parameter of a bridge a tensor among a chain's arguments means, as in `exclude=set(embedding.parameters())`.

A chain is made before its bridge and sees no tensors of torch while it is traced, only names or positions. So the
bridge says, while it traces, which leaf each of its parameters is: those that it was made with, and those that took
their place (in a copy of the bridge, or when a group was changed by hand).
"""

import functools
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import optax
from torch import Tensor

from chainrule.bridges.step.function import Assigning
from chainrule.transforms._selection import Selections, naming


class Meant:
    """What the tensors among a chain's arguments mean in one bridge, and which of them mean nothing in it."""

    def __init__(self):
        self._heirs: dict[int, Tensor] = {}  # the id of a tensor -> the parameter in its place
        self._found: set[tuple[str, Hashable]] = set()
        self._missed: dict[tuple[str, Hashable], ValueError] = {}

    def replaced(self, origin: Mapping[Tensor, Tensor]) -> None:
        """Takes note that each parameter, a key, is in the place of another, its value."""
        heir = {q: p for p, q in origin.items()}
        for key, q in self._heirs.items():
            self._heirs[key] = heir.get(q, q)
        self._heirs |= {id(q): p for p, q in origin.items() if p is not q}

    def told(
        self, chain: optax.GradientTransformation | Assigning, names: Mapping[Tensor, str]
    ) -> Any:
        """`chain` that knows which leaves of its tree are meant.

        Args:
          chain: a gradient transformation.
          names: the parameters in its tree, with the name of each in it.
        """
        known = {key: names[p] for key, p in self._heirs.items() if p in names}
        known |= {id(p): name for p, name in names.items()}
        selections = Selections(known, self._found, self._missed)

        def within(function: Any) -> Any:
            @functools.wraps(function)  # a bridge reads in the signature what `update` takes
            def told(*args: Any, **kwargs: Any) -> Any:
                with naming(selections):
                    return function(*args, **kwargs)

            return told

        kind = Assigning if isinstance(chain, Assigning) else optax.GradientTransformation
        return kind(within(chain.init), within(chain.update))

    def check(self, params: Iterable[Tensor]) -> None:
        """Raises `ValueError` if an argument of the chain selects nothing in any group.

        Args:
          params: all parameters of the bridge; those that are frozen may be in no tree yet.
        """
        waiting = set(map(id, params))
        for key, error in self._missed.items():
            if key not in self._found and key[1] not in waiting:
                raise error

    def __deepcopy__(self, memo: dict[int, Any]) -> "Meant":
        new = Meant()
        new._heirs = {key: memo.get(id(p), p) for key, p in self._heirs.items()}
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {}  # ids mean nothing in another process; the chain is pickled with the very parameters

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
