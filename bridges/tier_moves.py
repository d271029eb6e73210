"""Parameters that a policy moves between tiers, over all groups of a bridge."""

from collections.abc import Mapping
from typing import Any

import jax
import torch
from torch import Tensor

from chainrule.bridges.group_tree import GroupTree
from chainrule.bridges.in_jax import jax_state, jax_tree, torch_leaves
from chainrule.bridges.param_group import Change, Group
from chainrule.bridges.sharded import is_distributed
from chainrule.bridges.step.tiers import retiered, tiers_of
from chainrule.bridges.step.trace import Struct
from chainrule.bridges.step.vectors import unstack


def between_tiers(
    groups: Mapping[int, Group], leaves: Mapping[int, list[Tensor]], has_loss: bool
) -> dict[int, Change]:
    """Groups whose tiers' policy moved parameters: all groups with tiers, which share one budget.

    Args:
      groups: those that have tiers and a gradient, by their index.
      leaves: of their states.
      has_loss: whether the step that is about to be made has a loss.
    """
    trees: dict[int, Any] = {index: group.tree for index, group in groups.items()}
    states = [jax_state(tree, leaves[index]) for index, tree in trees.items()]
    grads = [jax_tree(tree, _gradients(tree)) for tree in trees.values()]
    params = [jax_tree(tree, tree.params) for tree in trees.values()]
    changes = {}
    for (index, tree), new_state in zip(
        trees.items(), retiered(states, grads, params), strict=True
    ):
        group, tiers = groups[index], tiers_of(new_state)
        if tiers != tree.tiers:
            known = jax.tree.map(lambda x: Struct(x.shape, x.dtype), unstack(new_state))
            tree = group.tree_of(group.members, tiers, known, has_loss)
            group = group.with_tree(tree)._replace(is_initial=False)
        own = leaves[index][-1:] if group.options.rounding else []
        changes[index] = group, [*torch_leaves(tree, new_state), *own]
    return changes


def _gradients(tree: GroupTree) -> list[Tensor | None]:
    """Of all parameters; of a DTensor zeros where this rank has none, since others may, and all of it is asked for."""
    return [
        torch.zeros_like(p) if p.grad is None and is_distributed(p) else p.grad for p in tree.params
    ]


def in_tiers_of(group: Group, leaves: list[Tensor], state: Any) -> Change:
    """The group and the leaves of its state, anew where the parameters of `state`, in JAX, are in other tiers."""
    tree, tiers = group.tree, tiers_of(state)
    if not tree or tiers is None or tiers == tree.tiers or len(tiers) != len(tree.tiers or ()):
        return group, leaves  # what does not fit has its error in `from_jax`
    new = group.tree_of(group.members, tiers)
    made, _ = new.initial_state()
    if group.options.rounding:
        made[-1] = leaves[-1]
    return group.with_tree(new), made
