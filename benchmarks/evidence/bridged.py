"""Runs through the torch bridge: parameters and state in torch, every step `TorchBridge`'s, for any experiment.

Gradients and metrics are those of the task, in JAX, so that what differs from `Trainer` is the optimizer alone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from chainrule import TorchBridge
from chainrule.evidence.experiment import Arm, Point, Setting, Task
from chainrule.evidence.training import Outcome


class BridgeTrainer:
    """Trains runs one by one; `Trainer` without measures."""

    def __init__(self, task: Task, setting: Setting) -> None:
        self._task, self._setting = task, setting
        self._gradient = jax.jit(task.gradient or jax.value_and_grad(task.loss))
        self._evaluate = jax.jit(task.evaluate)

    def train(
        self,
        arm: Arm,
        runs: Sequence[tuple[Point, int]],
        advance: Callable[[int], None] = lambda evaluations: None,
    ) -> Iterator[list[Outcome]]:
        """Yields the outcome of each run; a block is a run."""
        for point, seed in runs:
            yield [self._train_one(arm, point, seed, advance)]

    def _train_one(self, arm: Arm, point: Point, seed: int, advance: Any) -> Outcome:
        first, drawn = self._task.draw(seed)
        paths, structure = jax.tree_util.tree_flatten_with_path(first)
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
        held = [torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for _, leaf in paths]
        chain = arm.make({**point, "seed": seed, "steps": self._setting.steps})
        optimizer = TorchBridge(chain, list(zip(names, held, strict=True)))

        def params() -> Any:
            # Copies: the bridge writes in place.
            return jax.tree.unflatten(structure, [jnp.array(p.detach().numpy()) for p in held])

        def step(index: int) -> float:
            loss, grads = self._gradient(params(), self._task.data, drawn, np.int32(index))
            for p, g in zip(held, jax.tree.leaves(grads), strict=True):
                p.grad = torch.tensor(np.asarray(g))
            optimizer.step(lambda: torch.tensor(float(loss)))
            return float(loss)

        curves: list[dict[str, Any]] = []
        length = self._setting.steps // self._setting.evaluations
        for start in range(0, self._setting.steps, length):
            losses = [step(index) for index in range(start, start + length)]
            seen = jax.device_get(self._evaluate(params(), self._task.data, drawn))
            curves.append({**seen, "train_loss": np.mean(losses)})
            advance(1)
        found = {name: np.array([each[name] for each in curves]) for name in curves[0]}
        return Outcome(point, seed, found, {})
