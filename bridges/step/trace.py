"""Functions of trees traced by JAX, once each; every engine works from the same jaxpr."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval

from chainrule.native.dtypes import x64_if_wide

Struct = jax.ShapeDtypeStruct


class Trace(NamedTuple):
    """A pure function of trees as a jaxpr of their leaves.

    Attributes:
      jaxpr: the function, of flat arrays.
      inputs: its arguments, a tuple of trees of structs.
      outputs: its result, a tree of structs.
    """

    jaxpr: ClosedJaxpr
    inputs: Any
    outputs: Any

    def used(self) -> list[bool]:
        """Whether each flat input has a part in the result."""
        return self._needed_for([True] * len(self.jaxpr.jaxpr.outvars))[1]

    def constants(self, positions: Iterable[int]) -> list[jax.Array]:
        """The values of those flat outputs that depend on no input.

        Raises:
          ValueError: an output depends on an input.
        """
        wanted = dict.fromkeys(positions)
        outputs = [i in wanted for i in range(len(self.jaxpr.jaxpr.outvars))]
        jaxpr, used = self._needed_for(outputs)
        if any(used):
            raise ValueError("the outputs depend on the inputs")
        with x64_if_wide(self.inputs):
            values = jaxpr_as_fun(ClosedJaxpr(jaxpr, self.jaxpr.consts))()
        found = dict(zip(sorted(wanted), values, strict=True))
        return [found[i] for i in wanted]

    def _needed_for(self, outputs: list[bool]) -> tuple[Any, list[bool]]:
        return partial_eval.dce_jaxpr(self.jaxpr.jaxpr, outputs)


def trace(function: Callable[..., Any], *structs: Any) -> Trace:
    """`function` traced for arguments of these shapes and dtypes; with 64 bits if one of them has."""
    with x64_if_wide(structs):
        jaxpr, outputs = jax.make_jaxpr(function, return_shape=True)(*structs)
    return Trace(jaxpr, structs, outputs)
