"""What every oracle here is: float64 NumPy, written from the formulas, a step of gradients and parameters to updates.

A tree is a flat dict from a leaf's path to its array. A reference is made once a run and remembers what it must.
"""

from collections.abc import Callable, Mapping

import numpy as np

Tree = dict[str, np.ndarray]
Step = Callable[[Tree, Tree], Tree]


def elementwise(make: Callable[[], Callable[[np.ndarray, np.ndarray], np.ndarray]]) -> Step:
    """A step over trees from a factory of steps over one tensor, each with its own memory."""
    tensors: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {}

    def step(grads: Tree, params: Tree) -> Tree:
        return {
            name: tensors.setdefault(name, make())(g, params[name]) for name, g in grads.items()
        }

    return step


def descent(
    direction: Step, learning_rate: float | Callable[[int], float], weight_decay: float | None = 0.0
) -> Step:
    """-learning_rate (direction + weight_decay p); a schedule is called with the number of steps made before."""
    count = 0

    def step(grads: Tree, params: Tree) -> Tree:
        nonlocal count
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        count += 1
        directions = direction(grads, params)
        return {
            name: -rate * (u + (weight_decay or 0.0) * params[name])
            for name, u in directions.items()
        }

    return step


def as_float64(tree: Mapping[str, np.ndarray]) -> Tree:
    return {name: np.asarray(leaf).astype(np.float64) for name, leaf in tree.items()}
