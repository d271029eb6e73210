"""Parameters by name and shape, which is which on two sides, and how their axes lie."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from chainrule.bridges.hub.quantities import Quantities, Values

Shapes = dict[str, tuple[int, ...]]
"""Name -> shape, in the order of the library that they come from."""
_SEPARATED = "/"


def plain(name: str) -> str:
    """A parameter's name with dots: `layer/kernel` of JAX and Keras is `layer.kernel`."""
    return name.replace(_SEPARATED, ".")


def shapes_of(params: Any) -> Shapes:
    """Names and shapes of parameters: a module of torch, named parameters, variables of Keras, or any tree.

    Raises:
      ValueError: two have one name.
    """
    if hasattr(params, "named_parameters"):
        params = dict(params.named_parameters())
    if not isinstance(params, Mapping) and isinstance(params, Sequence):
        names = [getattr(p, "path", None) for p in params]
        if names and all(isinstance(name, str) for name in names):
            params = dict(zip(names, params, strict=True))
    if isinstance(params, Mapping) and not any(
        isinstance(v, (Mapping, list, tuple)) for v in params.values()
    ):
        pairs = list(params.items())  # in their own order, not sorted as a tree of JAX
    else:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        pairs = [
            (jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves
        ]
    found = {plain(str(name)): tuple(np.shape(value)) for name, value in pairs}
    if len(found) != len(pairs):
        raise ValueError("convert_state: two of `params` have one name")
    return found


def matched(
    target: Shapes, source: Sequence[str], names: Mapping[str, str] | Callable[[str], str] | None
) -> dict[str, str]:
    """Parameter of the target -> of the source.

    Raises:
      ValueError: one has no counterpart.
    """
    given = names if callable(names) else {plain(k): plain(v) for k, v in (names or {}).items()}.get
    found: dict[str, str] = {}
    for name in target:
        other = plain(given(name) or name)
        if other not in source:
            known = ", ".join(list(source)[:8])
            raise ValueError(
                f"convert_state: the state has no parameter {other!r} for {name!r}; it has {known}; say which is which "
                "with `names={target: source}`"
            )
        found[name] = other
    rest = [name for name in source if name not in found.values()]
    if rest:
        raise ValueError(f"convert_state: the state has {rest[0]!r}, which `params` has not")
    return found


def permutation(target: str, source: str, ndim: int, layout: Mapping[str, Any]) -> tuple[int, ...]:
    """The axes of the source's array in the order of the target's.

    A `kernel` of Keras or Flax is (*window, in, out), a `weight` of torch (out, in, *window).
    """
    if target in layout:
        return tuple(layout[target])
    kernels = [name.rpartition(".")[2] == "kernel" for name in (target, source)]
    if ndim < 2 or kernels[0] == kernels[1]:
        return tuple(range(ndim))
    if kernels[0]:
        return (*range(2, ndim), 1, 0)
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def laid_out(
    found: Quantities, target: Shapes, pairs: Mapping[str, str], layout: Mapping[str, Any]
) -> Quantities:
    """Quantities by the target's names, in its layouts.

    Raises:
      ValueError: a shape that does not fit.
    """
    values: dict[str, Values] = {quantity: {} for quantity in found.values}
    for name, other in pairs.items():
        shape = target[name]
        axes = permutation(name, other, len(shape), layout)
        for quantity, of in found.values.items():
            if other not in of:
                continue
            array, expected, kept = of[other], shape, quantity
            if quantity in ("row", "col"):
                kept, array, expected = _factor(quantity, array, axes, shape, name)
            elif array.ndim == len(axes):
                array = array.transpose(axes)
            if array.shape != expected:
                raise ValueError(
                    f"convert_state: {quantity} of {other!r} has shape {of[other].shape}, which does not fit {name!r} "
                    f"of shape {shape}; say with `layout={{{name!r}: axes}}` how its axes lie"
                )
            values[kept][name] = np.ascontiguousarray(array)
    return Quantities(values, found.count, found.rate, found.numbers)


def _factor(
    quantity: str,
    array: np.ndarray[Any, Any],
    axes: Sequence[int],
    shape: tuple[int, ...],
    name: str,
) -> tuple[str, np.ndarray[Any, Any], tuple[int, ...]]:
    """One of Adafactor's two averages, which change places where a matrix is transposed."""
    ndim = len(shape)
    if tuple(axes) == (1, 0):
        quantity = "col" if quantity == "row" else "row"
    elif tuple(axes) != tuple(range(ndim)):
        raise ValueError(
            f"convert_state: the factored averages of {name!r} are of other axes in the target"
        )
    expected = shape[:-1] if quantity == "row" else (*shape[:-2], shape[-1])
    return quantity, array, expected
