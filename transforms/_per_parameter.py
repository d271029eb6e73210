"""One number for each parameter, all of them in one array of the state.

A scalar array for each would be as many arguments and results of every jitted step: on a model of many
small tensors JAX spends more time on those than on the arithmetic.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from chainrule.transforms._trees import ANY, is_masked, is_placeholder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerParameter:
    """Numbers in the order of `jax.tree.leaves(params)`.

    >>> b1 = PerParameter.full(0.9, {"bias": jnp.zeros(3), "kernel": jnp.zeros((4, 3))})
    >>> b1.values.shape, sorted(b1.tree())
    ((2,), ['bias', 'kernel'])
    """

    values: jax.Array
    """One for each leaf, (leaves,); under `vmap`, or stacked, with leading axes."""
    structure: Any = dataclasses.field(metadata={"static": True})
    """The tree structure of the parameters."""

    @classmethod
    def full(cls, value: Any, params: Any, dtype: Any = jnp.float32) -> "PerParameter":
        """The same number for each leaf of `params`."""
        structure = jax.tree.structure(params)
        values = jnp.full((structure.num_leaves,), value, dtype)
        return cls(values, ANY if is_placeholder(params) else structure)

    def tree(self) -> Any:
        """A tree of scalars like the parameters."""
        return jax.tree.unflatten(
            self.structure, [self.values[..., i] for i in range(self.structure.num_leaves)]
        )

    def replace(self, values: jax.Array) -> "PerParameter":
        """Other numbers, in the dtype of these."""
        return dataclasses.replace(self, values=values.astype(self.values.dtype))

    def match(self, owner: str, updates: Any) -> list[bool]:
        """For each leaf of `updates`, masked ones too, whether there is a number for it.

        The leaves of `updates` may lack the boxes that those of the parameters had: `flax.nnx.Optimizer` gives
        `nnx.Param` to `init` and arrays to `update`.

        Raises:
          ValueError: `updates` has not the structure of the parameters.
        """
        parameters = jax.tree.unflatten(self.structure, range(self.structure.num_leaves))
        own, theirs = (
            jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)[0]
            for tree in (parameters, updates)
        )
        if len(own) != len(theirs) or any(
            path[: len(bare)] != bare for (path, _), (bare, _) in zip(own, theirs, strict=True)
        ):
            raise ValueError(
                f"{owner}: the updates must have the structure of the parameters, {self.structure}, got "
                f"{jax.tree.structure(updates)}"
            )
        return [not is_masked(leaf) for _, leaf in own]


def stacked(scalars: Sequence[jax.Array]) -> jax.Array:
    """Scalars as a vector, none as an empty one.

    >>> stacked([jnp.float32(1), jnp.float32(2)]).tolist(), stacked([]).shape
    ([1.0, 2.0], (0,))
    """
    return jnp.stack(scalars) if scalars else jnp.zeros((0,), jnp.float32)


def unstacked(vector: Any) -> list[jax.Array]:
    """The entries of a vector as scalars.

    >>> [x.item() for x in unstacked(jnp.arange(2))]
    [0, 1]
    """
    return [vector[i] for i in range(len(vector))]
