"""Where an equation of a jaxpr came from: the link of the chain and the line, for errors and `explain`."""

import os
import re
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.extend import core

Equation: TypeAlias = Any  # a core.JaxprEqn; JAX does not type the avals of its variables


class Place(NamedTuple):
    """Where an equation came from."""

    link: str  # the optax link, "" when no frame of the traceback is one
    source: str  # "file:line" of the innermost frame outside JAX


_JAX_FILES = tuple(os.path.dirname(os.path.abspath(str(m.__file__))) + os.sep for m in (jax, np))
# `scale_by_adam.<locals>.update_fn`, `adaptive_beta1.<locals>.update`, `MultiSteps.update`
_LINK = re.compile(r"(?:^|\.)(\w+)\.(?:<locals>\.)?_?update\w*(?:\.|$)")
_PLACES: dict[Any, Place] = {}


def place_of(eqn: Equation, inside: core.Jaxpr | None = None) -> Place:
    """The innermost optax link, and the innermost line outside JAX, in an equation's traceback.

    Args:
      eqn: the equation.
      inside: the jaxpr of a jitted function that holds it. JAX caches these, and the traceback goes on with the frames
        of the first caller, which are not looked at.
    """
    traceback = eqn.source_info.traceback
    if traceback is None:
        return Place("", "")
    function = None if inside is None else _function_of(inside)
    if (traceback, function) not in _PLACES:
        frames = [f for f in traceback.frames if not f.file_name.startswith(_JAX_FILES)]
        if function is not None:
            names = [(f.file_name, f.function_name.rpartition(".")[2]) for f in frames]
            frames = frames[: names.index(function)] if function in names else []
        found = (_LINK.search(f.function_name) for f in frames)
        link = next((match[1] for match in found if match), "")
        source = ""
        if frames:
            file = frames[0].file_name.replace(os.sep, "/").split("/site-packages/")[-1]
            source = f"{file}:{frames[0].line_num}"
        if len(_PLACES) > 100_000:  # tracebacks keep code objects alive
            _PLACES.clear()
        _PLACES[traceback, function] = Place(link, source)
    return _PLACES[traceback, function]


def _function_of(jaxpr: core.Jaxpr) -> tuple[str, str]:
    """File and name of the function that a jaxpr was traced from."""
    info: Any = jaxpr.debug_info
    return str(info.func_filename), info.func_name
