"""Links that measure other links: what a mechanism-off arm is made from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ProbedState(NamedTuple):
    """State of `probed`."""

    inner: Any
    """The state of the link."""
    ratio: jax.Array
    """float32 scalar: the length of the last updates after the link, over that before it."""


def probed(link: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`link`, and by how much it scales the whole update."""
    link = optax.with_extra_args_support(link)

    def update(updates, state, params=None, **extra):
        new, inner = link.update(updates, state.inner, params, **extra)
        before, after = optax.tree.norm(updates), optax.tree.norm(new)
        return new, ProbedState(inner, after / jnp.maximum(before, jnp.finfo(before.dtype).tiny))

    return optax.GradientTransformationExtraArgs(
        lambda params: ProbedState(link.init(params), jnp.float32(1)), update
    )


def ratio(state: Any) -> dict[str, jax.Array]:
    """`Arm.measure`: the ratio of the only probe in a chain's state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, ProbedState))
    (probe,) = [node for node in nodes if isinstance(node, ProbedState)]
    return {"ratio": probe.ratio}
