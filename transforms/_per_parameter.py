"""One number for each parameter, all of them in one array of the state.

A scalar array for each would be as many arguments and results of every jitted step: on a model of many
small tensors JAX spends more time on those than on the arithmetic.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


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
        return cls(jnp.full((structure.num_leaves,), value, dtype), structure)

    def tree(self) -> Any:
        """A tree of scalars like the parameters."""
        return jax.tree.unflatten(
            self.structure, [self.values[..., i] for i in range(self.structure.num_leaves)]
        )

    def replace(self, values: jax.Array) -> "PerParameter":
        """Other numbers, in the dtype of these."""
        return dataclasses.replace(self, values=values.astype(self.values.dtype))

    def check(self, owner: str, structure: Any) -> None:
        """Raises `ValueError` if `structure` is not that of the parameters."""
        if structure != self.structure:
            raise ValueError(
                f"{owner}: the updates must have the structure of the parameters, {self.structure}, got {structure}"
            )


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
