"""Which parameters have one program: found by tracing a chain for example lists of many shapes.

Parameters are told apart by what usually decides: first numbers, vectors, tensors and large ones, and where programs
still differ the number of axes and which of two axes is longer. Kinds that turn out alike are joined again. A threshold
on a size shows in lists with one large parameter; larger ones than were found alike are refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from chainrule.bridges.export.errors import CannotExport, Unlike
from chainrule.bridges.export.examples import Example, example
from chainrule.bridges.export.generalise import generalise
from chainrule.bridges.export.generic import Generic
from chainrule.bridges.export.sorts import (
    Parameters,
    Sort,
    Sorting,
    coarse_sort,
    fine_sort,
    lists_of,
)
from chainrule.bridges.step.description import describe
from chainrule.bridges.step.trace import Struct


class Found(NamedTuple):
    """The programs of a chain, and which parameters they are for.

    Attributes:
      generic: the programs.
      example: the first that was traced.
      sorting: what tells parameters apart, by dtype and shape.
      kinds: the kind of each sort.
      limit: axes must be shorter than this; None: as long as they like.
    """

    generic: Generic
    example: Example
    sorting: Sorting
    kinds: dict[Sort, int]
    limit: int | None


_LARGE = 20
"""The binary logarithm of the longest axis that is tried."""


_NAMES = ("kernel", "embedding", "lm_head", "bias", "norm")


def goes_by_name(chain: Any, dtype: str) -> bool:
    """Whether the program of a matrix depends on what it is called, of names that chains commonly look for."""

    def program(name: str) -> str:
        return str(describe(chain, {name: Struct((8, 8), jnp.dtype(dtype))}).trace(True).jaxpr)

    return len(set(map(program, _NAMES))) > 1


def kinds_of(chain: Any, dtypes: Sequence[str]) -> Found:
    """The programs of a chain for parameters of some dtypes.

    Raises:
      CannotExport: they are not the same for all lists of parameters, or hold what no file can.
    """
    reason = ""
    for sorting in (coarse_sort, fine_sort):
        for given_up in _GIVEN_UP:
            try:
                study = _Study(chain, sorting, lists_of(sorting, dtypes, given_up))
                generic, kinds = study.joined()
            except CannotExport:
                raise
            except (Unlike, ValueError, IndexError, ArithmeticError) as error:
                reason = str(error)
                continue
            return Found(generic, study.examples[0], sorting, kinds, study.limit(kinds))
    raise CannotExport(
        f"export: this chain has no one program for parameters of any shape. {reason}"
    )


_GIVEN_UP = ((), (0,), (0, 1))
"""Axes of length 0, then 1 too, are given up where they cannot be generalised: such parameters are refused."""


class _Study:
    """A chain for some lists of parameters."""

    def __init__(self, chain: Any, sorting: Sorting, lists: Sequence[Parameters]):
        self.chain, self.sorting, self.lists = chain, sorting, lists
        self.examples = [self.example(own) for own in lists]
        if self.examples[0].described.tiers is not None:
            raise CannotExport(
                "export: tiered_state moves parameters between tiers, whose states have other shapes; run the chain in "
                "a TorchBridge"
            )

    def example(self, parameters: Parameters) -> Example:
        return example(self.chain, [Struct(s, jnp.dtype(dtype)) for dtype, s in parameters])

    def generic(self, kinds: Mapping[Sort, int], more: Parameters | None = None) -> Generic:
        """The programs where parameters of a kind have one; `more`: of one more list."""
        examples, lists = list(self.examples), list(self.lists)
        if more is not None:
            examples.append(self.example(more))
            lists.append(more)
        return generalise(examples, [[kinds[self.sorting(*p)] for p in own] for own in lists])

    def joined(self) -> tuple[Generic, dict[Sort, int]]:
        """As few kinds as there are programs."""
        kinds = {s: k for k, s in enumerate(dict.fromkeys(self.sorting(*p) for p in self.lists[0]))}
        self.generic(kinds)
        done: list[int] = []
        for kind in list(kinds.values()):
            for other in done:
                trial = {s: other if k == kind else k for s, k in kinds.items()}
                try:
                    self.generic(trial)
                except Unlike:
                    continue
                kinds = trial
                break
            else:
                done.append(kind)
        kinds = {s: done.index(k) for s, k in kinds.items()}
        return self.generic(kinds), kinds

    def limit(self, kinds: Mapping[Sort, int]) -> int | None:
        """The least power of two for which a parameter with a longer axis has another program than smaller ones."""
        dtype = self.lists[0][0][0]

        def alike(logarithm: int) -> bool:
            n = 1 << logarithm
            known = [(dtype, s) for s in ((n, 64), (n,)) if self.sorting(dtype, s) in kinds]
            try:
                self.generic(kinds, [*self.lists[0], *known])
            except Unlike:
                return False
            return True

        if alike(_LARGE):
            return None
        low, high = 4, _LARGE
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if alike(middle) else (low, middle)
        return 1 << high
