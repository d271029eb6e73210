"""What a state knows about the training run."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._protocols import HasMetrics, is_state


def state_bytes(state: Any) -> int:
    """Bytes of all arrays in `state`.

    >>> state_bytes(optax.scale_by_adam().init(jnp.zeros(100)))
    804
    """
    return sum(
        jnp.asarray(leaf).nbytes if not hasattr(leaf, "nbytes") else leaf.nbytes
        for leaf in jax.tree.leaves(state)
    )


def metrics(state: optax.OptState) -> dict[str, Any]:
    """What the links of a chain know of the run: AGAR and confidence, b1, alignment and mask rate,
    tiers, gate scale.

    Each atom's state names the fields worth showing in its class attribute `metric_fields`. What is
    kept in one array for all parameters is shown as the tree that it has a method `tree` for.

    Args:
      state: the state of any gradient transformation.

    Returns:
      A dict from metric name to a scalar, or to a tree of scalars (one a parameter), and
      `"state_bytes"`, an int. A name
      that two links share is numbered from the second on (`"b1_2"`). Works under `jit`.

    >>> import chainrule
    >>> tx = chainrule.chains.stam()
    >>> params = {"w": jnp.ones(4)}
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> sorted(metrics(state))
    ['b1', 'nonfinite', 'state_bytes']
    """
    found: dict[str, Any] = {}
    uses: dict[str, int] = {}

    def visit(node: Any) -> None:
        if is_state(node):
            shown = node.metric_fields if isinstance(node, HasMetrics) else ()
            for name in shown:
                uses[name] = uses.get(name, 0) + 1
                key = name if uses[name] == 1 else f"{name}_{uses[name]}"
                value = getattr(node, name)
                found[key] = value.tree() if hasattr(value, "tree") else value
            for name, child in node._asdict().items():
                if name not in shown:
                    visit(child)
        elif isinstance(node, Mapping):
            for child in node.values():
                visit(child)
        elif isinstance(node, (tuple, list)):
            for child in node:
                visit(child)

    visit(state)
    return {**found, "state_bytes": state_bytes(state)}
