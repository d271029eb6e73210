"""Caution (Liang et al. 2024), Grokfast (Lee et al. 2024, algorithms 1 and 2) and OrthoGrad (Prieto et al. 2025)."""

from collections import deque

import numpy as np

from reference.steps import Step, Tree, elementwise


def cautious(
    direction: Step,
    normalizer: str | None = "clamped_mean",
    mean_floor: float = 1e-3,
    eps: float = 1e-8,
    negated: bool = False,
) -> Step:
    def scale(mask: np.ndarray) -> float:
        if normalizer is None or normalizer == "none" or not mask.any():
            return 1.0
        if normalizer == "clamped_mean":
            return 1 / max(mask.mean(), mean_floor)
        return 1 / (mask.mean() + eps) if normalizer == "mean" else mask.size / (mask.sum() + 1)

    def step(grads: Tree, params: Tree) -> Tree:
        updates = direction(grads, params)
        for name, u in updates.items():
            agrees = u * grads[name] < 0 if negated else u * grads[name] > 0
            mask = np.ones(u.shape) if normalizer is None else agrees
            updates[name] = u * mask * scale(mask)
        return updates

    return step


def grokfast_ema(alpha: float = 0.98, lamb: float = 2.0, start: str = "first") -> Step:
    def tensor():
        average = None if start == "first" else 0.0

        def step(g, _):
            nonlocal average
            average = g if average is None else alpha * average + (1 - alpha) * g
            return g + lamb * average

        return step

    return elementwise(tensor)


def grokfast_ma(window_size: int = 100, lamb: float = 5.0, warmup: bool = True) -> Step:
    def tensor():
        window = deque(maxlen=window_size)

        def step(g, _):
            window.append(g)
            if warmup and len(window) < window_size:
                return g
            return g + lamb * sum(window) / len(window)

        return step

    return elementwise(tensor)


def orthograd(eps: float = 1e-30, rtol: float = 1e-6) -> Step:
    def project(g, p):
        if g.size <= 1:
            return g
        rest = g - np.sum(p * g) / (np.sum(p * p) + eps) * p
        length, residue = np.linalg.norm(g), np.linalg.norm(rest)
        return np.zeros_like(g) if residue <= rtol * length else rest * length / (residue + eps)

    return elementwise(lambda: project)


def then(first: Step, second: Step) -> Step:
    """`second` on what `first` makes of the gradients."""
    return lambda grads, params: second(first(grads, params), params)
