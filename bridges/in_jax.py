"""The parameters and the state of a group in JAX, and back; of DTensors all, so every rank must call these."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from torch import Tensor

from chainrule.bridges.group_tree import GroupTree
from chainrule.bridges.lowering import to_jax, to_torch
from chainrule.bridges.sharded import gathered, laid_out
from chainrule.bridges.step.vectors import stack, unstack


def jax_state(tree: GroupTree, leaves: Sequence[Tensor]) -> Any:
    """The chain's state."""
    with jax.enable_x64(True):
        avals = zip(map(gathered, leaves), tree.state_avals, strict=True)
        return stack(tree.state([to_jax(leaf, aval) for leaf, aval in avals]))


def jax_tree(tree: GroupTree, tensors: Sequence[Tensor | None]) -> Any:
    """Tensors like the parameters as the chain's tree, zeros for None."""
    structs, structure = jax.tree.flatten(tree.described.params)
    with jax.enable_x64(True):
        arrays = [
            jnp.zeros(aval.shape, aval.dtype) if t is None else to_jax(gathered(t), aval)
            for t, aval in zip(tensors, structs, strict=True)
        ]
    return jax.tree.unflatten(structure, arrays)


def torch_leaves(tree: GroupTree, state: Any) -> list[Tensor]:
    """The leaves of the chain's state in torch, in the dtypes of the program."""
    leaves = [to_torch(leaf, tree.device) for leaf in jax.tree.leaves(unstack(state))]
    return list(map(laid_out, tree.in_their_dtypes(leaves), tree.likes()))
