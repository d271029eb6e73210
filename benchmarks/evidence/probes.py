"""What a mechanism-off arm is made from: links that measure other links, and what follows from their measures."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import chainrule
from chainrule import transforms
from chainrule.evidence.experiment import Curves, Point


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


def snr(**settings: Any) -> Callable[[Point], optax.GradientTransformation]:
    """`Arm.make`: `chains.casmo_snr` with a probe of its confidence."""

    def make(h: Point) -> optax.GradientTransformation:
        return chainrule.chain(
            transforms.scale_by_belief(),
            probed(transforms.snr_confidence(**settings)),
            transforms.decoupled_weight_decay(h["weight_decay"]),
            optax.scale_by_learning_rate(h["learning_rate"]),
        )

    return make


def ratio(state: Any) -> dict[str, jax.Array]:
    """`Arm.measure`: the ratio of the only probe in a chain's state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, ProbedState))
    (probe,) = [node for node in nodes if isinstance(node, ProbedState)]
    return {"ratio": probe.ratio}


def mean_metric(name: str) -> Callable[[Any], dict[str, jax.Array]]:
    """`Arm.measure`: a metric of the chain (`chainrule.metrics`), with one a tensor their mean."""

    def measure(state: Any) -> dict[str, jax.Array]:
        return {name: jnp.mean(jnp.stack(jax.tree.leaves(chainrule.metrics(state)[name])))}

    return measure


def folded(name: str) -> Callable[[Point, Curves], Point]:
    """`Arm.match`: the mean of a measure goes into the rate, and the decay of a step, rate x weight_decay, stays."""

    def match(point: Point, measured: Curves) -> Point:
        factor = float(np.mean(measured[name]))
        return {
            "learning_rate": point["learning_rate"] * factor,
            "weight_decay": point["weight_decay"] / factor,
        }

    return match
