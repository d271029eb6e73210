"""States of Keras' optimizers: `optimizer.variables`, or what `save_own_variables` writes of them."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from chainrule.bridges.hub.layouts import Shapes
from chainrule.bridges.hub.quantities import Form, Quantities, Values, product_of_decays

Place = tuple[str, str]
"""A quantity and a parameter."""


def _places(form: Form, shapes: Shapes, kept: set[str]) -> Iterator[tuple[Place, tuple[int, ...]]]:
    """What Keras keeps, in the order of its variables, after the step count and the rate."""
    if form.family == "adafactor":
        for name, shape in shapes.items():
            if len(shape) >= 2:
                yield ("row", name), shape[:-1]
                yield ("col", name), (*shape[:-2], shape[-1])
            yield ("full", name), shape
    elif form.family == "rmsprop":
        for quantity in ("nu", "trace", "mu"):
            for name, shape in shapes.items() if quantity in kept else ():
                yield (quantity, name), shape
    else:
        for name, shape in shapes.items():
            for quantity in form.keys:
                if quantity in kept and (form.family != "muon" or quantity == "mu"):
                    yield (quantity, name), shape


def _arrays(state: Any, name: str) -> list[np.ndarray[Any, Any]]:
    values = getattr(state, "variables", state)
    if isinstance(values, Mapping):
        count = len(values)
        if set(values) != {str(i) for i in range(count)}:
            raise ValueError(
                f"convert_state: the state of {name} must have the keys '0' to '{count - 1}', as `save_own_variables` "
                f"writes them, got {sorted(map(str, values))[:6]}"
            )
        values = [values[str(i)] for i in range(count)]
    return [np.asarray(v.numpy() if hasattr(v, "numpy") else v) for v in values]


def _layout(
    form: Form, name: str, shapes: Shapes, arrays: list[np.ndarray[Any, Any]]
) -> tuple[list[Place], int]:
    """The places of a state's arrays, and how many come before them: the count, and a rate that is no schedule."""
    tries = [set(form.keys) - set(left) for left in _left_out(form)]
    for kept in tries:
        places = list(_places(form, shapes, kept))
        first = len(arrays) - len(places) - bool(form.product)
        if first in (1, 2) and all(
            arrays[first + i].shape == shape for i, (_, shape) in enumerate(places)
        ):
            return [place for place, _ in places], first
    raise ValueError(
        f"convert_state: the state of {name} has {len(arrays)} variables of shapes {[a.shape for a in arrays][:6]}, ..."
        f", which do not fit the {len(shapes)} parameters; amsgrad, moving averages of weights and parameters that "
        "Muon leaves to Adam have no equal elsewhere"
    )


def _left_out(form: Form) -> list[tuple[str, ...]]:
    if form.family == "rmsprop":
        return [(), ("mu",), ("trace",), ("mu", "trace")]
    return [()]


def read(state: Any, form: Form, name: str, source: Shapes | None) -> Quantities:
    """What a state says, by parameter."""
    assert source is not None
    arrays = _arrays(state, name)
    places, first = _layout(form, name, source, arrays)
    values: dict[str, Values] = {}
    for (quantity, label), array in zip(places, arrays[first:], strict=False):
        if not (form.family == "adafactor" and quantity == "full" and array.ndim >= 2):
            values.setdefault(quantity, {})[label] = (
                array  # of matrices the two averages alone count
            )
    return Quantities(values, int(arrays[0]), float(arrays[1]) if first == 2 else None)


def write(found: Quantities, form: Form, name: str, target: Shapes, like: Any) -> dict[str, Any]:
    """A mapping for `load_own_variables`."""
    kept = {q for q in form.keys if q in found.values or q not in form.optional}
    if like is not None:
        own = _arrays(like, name)
        places, first = _layout(form, name, target, own)
        head = own[:first]
    else:
        places = [place for place, _ in _places(form, target, kept)]
        if found.rate is None:
            raise ValueError(
                f"convert_state: a state of {name} holds the learning rate; give `learning_rate` or `like=optimizer`"
            )
        head = [np.zeros((), np.int64), np.asarray(found.rate, np.float32)]
    if found.count is None:
        raise ValueError(
            f"convert_state: {name} keeps the number of steps, which this state does not say; give `count`"
        )
    arrays = [np.asarray(found.count, head[0].dtype), *head[1:]]
    for quantity, label in places:
        array = found.values.get(quantity, {}).get(label)
        if array is None and form.family == "adafactor" and quantity == "full":
            row, col = (found.values[q][label] for q in ("row", "col"))
            array = (row / row.mean(-1, keepdims=True))[..., None] * col[..., None, :]
        if array is None:
            raise ValueError(
                f"convert_state: {name} keeps `{form.keys[quantity]}` of {label!r}, which the state has not"
            )
        arrays.append(array)
    for quantity, of in found.values.items():
        for label in of:
            if (quantity, label) not in places:
                raise ValueError(f"convert_state: {quantity} of {label!r} has no equal in {name}")
    if form.product:
        arrays.append(_product(found, name, like))
    return {str(i): array for i, array in enumerate(arrays)}


def _product(found: Quantities, name: str, like: Any) -> np.ndarray[Any, Any]:
    betas = found.numbers.get("betas")
    b1 = getattr(like, "beta_1", None if betas is None else betas[0])
    if b1 is None:
        raise ValueError(
            f"convert_state: {name} keeps the product of its decays, which `beta_1` says; give `like=optimizer`"
        )
    return np.asarray(product_of_decays(float(b1), 1.0, found.count or 0), np.float32)
