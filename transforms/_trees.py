"""Trees of which a part is masked: what `optax.masked` and `optax.partition` hand to their links."""

from collections.abc import Callable
from typing import Any

import jax
import optax


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def map_unmasked(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` that keeps the masked leaves of `tree`, whatever `rest` holds in their place.

    Inside `optax.partition` the updates are masked while the raw gradient among the extra arguments is whole.

    >>> masked = {"a": 1.0, "b": optax.MaskedNode()}
    >>> map_unmasked(lambda u, g: u + g, masked, {"a": 2.0, "b": 3.0})
    {'a': 3.0, 'b': MaskedNode()}
    """
    return jax.tree.map(
        lambda x, *others: x if _is_masked(x) else f(x, *others), tree, *rest, is_leaf=_is_masked
    )
