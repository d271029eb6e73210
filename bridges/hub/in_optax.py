"""States of optax's transformations, and of chains whose states have optax's fields."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chainrule.bridges.hub.layouts import Shapes, plain
from chainrule.bridges.hub.quantities import Form, Quantities, Values
from chainrule.transforms._protocols import is_state

_ABSENT = (1,)  # the shape that Adafactor's state has where it keeps nothing


def _walk(node: Any, found: Callable[[Any], Any]) -> Any:
    """`node` with every state inside it replaced by what `found` makes of it."""
    if is_state(node):
        fields = {k: _walk(v, found) for k, v in node._asdict().items()}
        return found(node._replace(**fields))
    if isinstance(node, Mapping):
        return type(node)({k: _walk(v, found) for k, v in node.items()})  # pyright: ignore[reportCallIssue]
    if isinstance(node, (tuple, list)):
        return type(node)([_walk(v, found) for v in node])
    return node


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(plain(jax.tree_util.keystr(p, simple=True, separator=".")), x) for p, x in leaves]


def read(state: Any, form: Form, name: str, source: Shapes | None) -> Quantities:
    """What a state says, by parameter."""
    shapes = source or {}
    values: dict[str, Values] = {quantity: {} for quantity in form.keys}
    counts: list[int] = []

    def look(node: Any) -> Any:
        if not any(field in node._fields for field in form.keys.values()):
            return node
        fields = node._asdict()
        for quantity, field in form.keys.items():
            for label, leaf in _named(fields.get(field)):
                absent = form.family == "adafactor" and np.shape(leaf) == _ABSENT
                if not absent or (quantity == "full" and shapes.get(label) == _ABSENT):
                    values[quantity][label] = np.asarray(
                        leaf, np.float64 if leaf.dtype == jnp.float64 else np.float32
                    )
        if "count" in fields:
            counts.append(int(fields["count"]))
        return node

    _walk(state, look)
    for quantity, field in form.keys.items():
        if quantity not in form.optional and not values[quantity]:
            raise ValueError(
                f"convert_state: the state of {name} has no `{field}`; is it of {name}?"
            )
    values = {quantity: of for quantity, of in values.items() if of}
    if form.family == "adafactor":
        values = _last_two(values, shapes)
    return Quantities(values, counts[0] if counts else None)


def _last_two(values: dict[str, Values], shapes: Shapes) -> dict[str, Values]:
    """`v_row` is over the longer axis, of two alike over the last; `row` is always over the last."""
    found: dict[str, Values] = {quantity: {} for quantity in ("row", "col", "full")}
    found["full"] = dict(values.get("full", {}))
    for label, row in values.get("row", {}).items():
        col = values["col"][label]
        if row.ndim != 1:
            raise ValueError(
                f"convert_state: optax factors {label!r} by its longest axes, others by the last two"
            )
        over_last = shapes[label][0] <= shapes[label][1]
        found["row"][label], found["col"][label] = (row, col) if over_last else (col, row)
    return {quantity: of for quantity, of in found.items() if of}


def _start(found: Quantities, name: str, params: Any) -> Any:
    kind, rate = name.partition(".")[2], found.rate or 1e-3
    make = {
        "sgd": lambda: optax.sgd(rate, momentum=0.9),
        "rmsprop": lambda: optax.rmsprop(
            rate, momentum=0.9 if "trace" in found.values else None, centered="mu" in found.values
        ),
        "muon": lambda: optax.contrib.muon(rate),
    }
    return make.get(kind, lambda: getattr(optax, kind)(rate))().init(params)


def write(found: Quantities, form: Form, name: str, target: Shapes, like: Any, params: Any) -> Any:
    """A state of optax."""
    del target
    like = _start(found, name, jax.tree.map(jnp.asarray, params)) if like is None else like
    values = dict(found.values)
    values = _first_longest(values) if form.family == "adafactor" else values
    used: set[tuple[str, str]] = set()

    def fill(node: Any) -> Any:
        fields: dict[str, Any] = {}
        for quantity, field in form.keys.items():
            if field in node._fields:
                fields[field] = _filled(getattr(node, field), quantity, field, values, used)
        if "count" in node._fields and found.count is not None:
            fields["count"] = jnp.full_like(node.count, found.count)
        return node._replace(**fields)

    def _filled(
        tree: Any, quantity: str, field: str, values: Any, used: set[tuple[str, str]]
    ) -> Any:
        def leaf(path: Any, old: Any) -> Any:
            label = plain(jax.tree_util.keystr(path, simple=True, separator="."))
            if (
                form.family == "adafactor"
                and np.shape(old) == _ABSENT
                and label not in values.get(quantity, {})
            ):
                return old
            new = values.get(quantity, {}).get(label)
            if new is None or np.shape(new) != np.shape(old):
                got = "absent" if new is None else f"of shape {np.shape(new)}"
                raise ValueError(
                    f"convert_state: `{field}` of {label!r} in {name} has shape {np.shape(old)}, in the "
                    f"state it is {got}"
                )
            used.add((quantity, label))
            return jnp.asarray(new, old.dtype)

        return jax.tree_util.tree_map_with_path(leaf, tree)

    new = _walk(like, fill)
    for quantity, of in values.items():
        for label in of:
            if (quantity, label) not in used:
                raise ValueError(f"convert_state: {quantity} of {label!r} has no equal in {name}")
    return new


def _first_longest(values: dict[str, Values]) -> dict[str, Values]:
    """The inverse of `_last_two`: `v_row` is over the longer axis, of two alike over the last."""
    found: dict[str, Values] = {"row": {}, "col": {}, "full": dict(values.get("full", {}))}
    for label, row in values.get("row", {}).items():
        col = values["col"][label]
        if row.ndim != 1:
            raise ValueError(
                f"convert_state: optax factors {label!r} by its longest axes, others by the last two"
            )
        rows, columns = len(row), len(col)
        over_last = rows <= columns
        found["row"][label], found["col"][label] = (row, col) if over_last else (col, row)
    return {quantity: of for quantity, of in found.items() if of}
