"""One training function for all arms: a jitted scan, vectorised over runs (grid point x seed), in blocks.

Hyperparameters are traced, so that an arm is compiled once. The same seed has the same parameters, data and batches in
every arm. Between two evaluations the program returns, so that a progress bar can move.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chainrule.evidence.experiment import Arm, Point, Setting, Task


class Outcome(NamedTuple):
    """What one run did."""

    point: Point
    seed: int
    curves: dict[str, np.ndarray]
    """(evaluations,) by metric."""
    measured: dict[str, np.ndarray]
    """(evaluations,) by measure of the arm: means since the last evaluation."""


class Trainer:
    """Trains the runs of a task's arms, `setting.block` at a time."""

    def __init__(self, task: Task, setting: Setting) -> None:
        self._task, self._setting = task, setting
        self._drawn: dict[int, Any] = {}
        self._programs: dict[str, tuple[Any, Any]] = {}

    def train(
        self,
        arm: Arm,
        runs: Sequence[tuple[Point, int]],
        advance: Callable[[int], None] = lambda evaluations: None,
        evaluations: int | None = None,
    ) -> Iterator[list[Outcome]]:
        """Yields the outcomes of `runs` block by block; calls `advance` after each evaluation of a block.

        With `evaluations` it stops after so many: the first part of the run, not a shorter one.
        """
        size = self._setting.block
        for start in range(0, len(runs), size):
            block = list(runs[start : start + size])
            filled = block + [block[-1]] * (size - len(block))  # one shape, so one program
            yield self._train_block(arm, filled, advance, evaluations)[: len(block)]

    def _train_block(
        self, arm: Arm, runs: list[tuple[Point, int]], advance: Any, evaluations: int | None
    ) -> list[Outcome]:
        init, chunk = self._compiled(arm)
        data = self._task.data
        hyper: dict[str, Any] = {
            name: np.asarray([point[name] for point, _ in runs], np.float32) for name in runs[0][0]
        }
        hyper["seed"] = np.asarray([seed for _, seed in runs], np.int32)
        params, drawn = jax.tree.map(
            lambda *leaves: jnp.asarray(np.stack(leaves)), *(self._draw(seed) for _, seed in runs)
        )
        state, history = init(hyper, params), []
        length = self._setting.steps // self._setting.evaluations
        for start in range(0, length * (evaluations or self._setting.evaluations), length):
            params, state, *seen = chunk(hyper, params, state, drawn, data, start)
            history.append(jax.device_get(seen))
            advance(1)
        curves, measured = jax.tree.map(lambda *values: np.stack(values, -1), *history)
        return [
            Outcome(
                point,
                seed,
                {name: values[i] for name, values in curves.items()},
                {name: values[i] for name, values in measured.items()},
            )
            for i, (point, seed) in enumerate(runs)
        ]

    def close(self) -> None:
        """Holds nothing that another process would miss."""

    def _draw(self, seed: int) -> Any:
        if seed not in self._drawn:
            self._drawn[seed] = self._task.draw(seed)
        return self._drawn[seed]

    def _compiled(self, arm: Arm) -> tuple[Any, Any]:
        if arm.name not in self._programs:
            init, chunk = programs(self._task, arm, self._setting)
            self._programs[arm.name] = (
                jax.jit(jax.vmap(init)),
                jax.jit(jax.vmap(chunk, (0, 0, 0, 0, None, None)), donate_argnums=(1, 2)),
            )
        return self._programs[arm.name]


def programs(
    task: Task, arm: Arm, setting: Setting
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """For one run: `init(hyper, params)` to a state, and the steps from one evaluation to the next."""
    length = setting.steps // setting.evaluations
    gradient = task.gradient or jax.value_and_grad(task.loss)

    def chain(hyper):
        return optax.with_extra_args_support(arm.make({**hyper, "steps": setting.steps}))

    def init(hyper, params):
        return chain(hyper).init(params)

    def chunk(hyper, params, state, drawn, data, start):
        tx = chain(hyper)

        def step(carry, index):
            params, state = carry
            loss, grads = gradient(params, data, drawn, index)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), (loss, dict(arm.measure(state)))

        carry, (losses, measured) = jax.lax.scan(
            step, (params, state), start + jnp.arange(length, dtype=jnp.int32)
        )
        curves = {**task.evaluate(carry[0], data, drawn), "train_loss": jnp.mean(losses)}
        return *carry, curves, jax.tree.map(lambda value: jnp.mean(value, 0), measured)

    return init, chunk
