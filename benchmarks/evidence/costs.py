"""What a step of each arm costs: warmed and interleaved, with compilation apart, and the bytes of its state."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chainrule.evidence.experiment import Arm, Point


class Cost(NamedTuple):
    """Of the optimizer alone: no gradient is computed."""

    first_seconds: float
    """Tracing, compiling and the first step."""
    step_microseconds: float
    """Median over rounds."""
    state_bytes: int


def measure(
    arms: Sequence[Arm], points: Sequence[Point], params: Any, rounds: int = 30, steps: int = 10
) -> dict[str, dict[str, float]]:
    """Times `update` and the addition to the parameters, in one jitted step, round by round over all arms.

    Args:
      arms: what is timed.
      points: the hyperparameters of each.
      params: what is updated; the gradients are normal numbers.
      rounds: each arm is timed once a round, so that what slows the machine for a while slows all.
      steps: of each arm in each round.
    """
    random = np.random.default_rng(0)
    params = jax.tree.map(jnp.asarray, params)
    grads = jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape), p.dtype), params)
    running, first, times = [], [], [[] for _ in arms]
    for arm, point in zip(arms, points, strict=True):
        tx = optax.with_extra_args_support(arm.make({**point, "seed": 0, "steps": rounds * steps}))

        @jax.jit
        def step(params, state, tx=tx):
            updates, state = tx.update(grads, state, params, value=jnp.float32(1))
            return optax.apply_updates(params, updates), state

        state = jax.jit(tx.init)(params)
        start = time.perf_counter()
        running.append((step, jax.block_until_ready(step(params, state))))
        first.append(time.perf_counter() - start)
    for _ in range(rounds):
        for i, (step, carry) in enumerate(running):
            start = time.perf_counter()
            for _ in range(steps):
                carry = step(*carry)
            running[i] = (step, jax.block_until_ready(carry))
            times[i].append((time.perf_counter() - start) / steps)
    return {
        arm.name: Cost(first[i], 1e6 * float(np.median(times[i])), size(running[i][1][1]))._asdict()
        for i, arm in enumerate(arms)
    }


def size(state: Any) -> int:
    """Bytes of the arrays of a state."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))
