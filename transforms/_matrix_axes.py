"""How a leaf of two axes or more is read as matrices, and how matrices become the leaf again."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax

from chainrule.transforms._checks import check_choice
from chainrule.transforms._numerics import up


def matrix_axes(name: str, shape: tuple[int, ...], dims: Any) -> tuple[list[int], list[int]]:
    """The axes of a leaf that are the rows and the columns of its matrices; the others are batched."""
    ndim = len(shape)
    if ndim < 2:
        raise ValueError(
            f"newton_schulz: {name!r} has shape {shape}, expected at least the two axes of a matrix; "
            "send vectors and scalars elsewhere, as `chains.muon`, `optax.partition` or `optax.masked` do"
        )
    if callable(dims):
        dims = dims(name, shape)
    if isinstance(dims, str):
        check_choice("newton_schulz", "dims", dims, ("batched", "hwio", "oihw"))
        axes = list(range(ndim))
        return {
            "batched": (axes[-2:-1], axes[-1:]),
            "hwio": (axes[:-1], axes[-1:]),
            "oihw": (axes[:1], axes[1:]),
        }[dims]
    rows, cols = ([operator.index(axis) for axis in group] for group in dims)
    both = [axis % ndim for axis in (*rows, *cols) if -ndim <= axis < ndim]
    if len(set(both)) != len(rows) + len(cols) or not rows or not cols:
        raise ValueError(
            f"newton_schulz: `dims` must name different axes of {name!r}, of shape {shape}, for rows "
            f"and columns, got {dims!r}"
        )
    return both[: len(rows)], both[len(rows) :]


def _order(g: jax.Array, rows: Sequence[int], cols: Sequence[int]) -> list[int]:
    return [axis for axis in range(g.ndim) if axis not in (*rows, *cols)] + [*rows, *cols]


def matrices_of(g: jax.Array, rows: Sequence[int], cols: Sequence[int]) -> jax.Array:
    """The matrices of a leaf, (..., rows, columns)."""
    order = _order(g, rows, cols)
    sizes = [math.prod(g.shape[axis] for axis in group) for group in (rows, cols)]
    batch = [g.shape[axis] for axis in order[: -len(rows) - len(cols)]]
    return up(g).transpose(order).reshape(*batch, *sizes)


def as_leaf(x: jax.Array, g: jax.Array, rows: Sequence[int], cols: Sequence[int]) -> jax.Array:
    """Its matrices as the leaf `g` has them."""
    order = _order(g, rows, cols)
    back = [order.index(axis) for axis in range(g.ndim)]
    return x.reshape([g.shape[axis] for axis in order]).transpose(back).astype(g.dtype)
