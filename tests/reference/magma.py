"""Magma: alignment, draws and their product with any direction (repository, commit 222980f)."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from reference.steps import Step, Tree, descent

Moments = Callable[[Tree], Tree]


def average(beta: float, power: int = 1) -> Moments:
    """An exponential moving average of g^power from zero."""
    averages: Tree = {}

    def moments(grads: Tree) -> Tree:
        for name, g in grads.items():
            averages[name] = beta * averages.get(name, 0.0) + (1 - beta) * g**power
        return averages

    return moments


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel(), b.ravel()
    return float(a @ b / (max(np.linalg.norm(a), 1e-8) * max(np.linalg.norm(b), 1e-8)))


def draws(seed: int, step: int, number: int) -> np.ndarray:
    """The documented source of randomness: number i of threefry's uniforms under the key of the step."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return np.asarray(jax.random.uniform(key, (number,)))


def magma(
    inner: Step,
    mask_prob: float = 0.5,
    tau: float = 2.0,
    alignment_ema: float = 0.9,
    momentum_beta: float = 0.9,
    *,
    moment: str = "mu",
    init_alignment: float = 1.0,
    exclude: str | Callable[[str, Any], bool] | None = None,
    seed: int = 0,
    learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> Step:
    """Around `inner`, whose first moment has the decay 0.9 and whose second has 0.999."""
    moments = {
        "mu": average(0.9),
        "nu": average(0.999, 2),
        "own": average(momentum_beta),
    }[moment]
    alignment: dict[str, float] = {}
    count = 0

    def excluded(name: str) -> bool:
        if callable(exclude):
            return exclude(name, None)
        return exclude is not None and re.search(exclude, name) is not None

    def masked(grads: Tree, params: Tree) -> Tree:
        nonlocal count
        mu, updates = moments(grads), inner(grads, params)
        included = [name for name in grads if not excluded(name)]
        for name, draw in zip(included, draws(seed, count, len(included)), strict=True):
            agreement = 1 / (1 + np.exp(-cosine(mu[name], grads[name]) / tau))
            s = alignment.get(name, init_alignment)
            alignment[name] = alignment_ema * s + (1 - alignment_ema) * agreement
            updates[name] = updates[name] * alignment[name] * (draw < mask_prob)
        count += 1
        return updates

    return masked if learning_rate is None else descent(masked, learning_rate, weight_decay)
