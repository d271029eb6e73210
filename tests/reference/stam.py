"""STAM and STAMLite: the directions, and b1 tensor by tensor."""

from typing import Any

import numpy as np

from reference.steps import Step, Tree, elementwise


def _safe(g: np.ndarray, max_abs: float | None) -> np.ndarray:
    g = np.where(np.isfinite(g), g, 0.0)
    return g if max_abs is None else np.clip(g, -max_abs, max_abs)


def safe(max_abs: float | None = 2.0**48) -> Step:
    def step(grads: Tree, _: Tree) -> Tree:
        return {name: _safe(g, max_abs) for name, g in grads.items()}

    return step


class Moment:
    """A tensor's first moment under the decay that its residual or its two moments choose."""

    def __init__(
        self,
        b1_base=0.9,
        adapt_strength=0.2,
        *,
        signal="residual",
        b2=0.999,
        tau_decay=0.99,
        fallback_threshold=100.0,
        moment_decay=0.99,
        eps=1e-8,
        b1_update_interval=1,
        debias=True,
        debias_eps=0.0,
    ):
        vars(self).update(locals())
        self.t, self.first, self.second, self.prod = 0, 0.0, 0.0, 1.0
        self.b1, self.mu = b1_base, np.zeros(())

    def step(self, g: np.ndarray) -> np.ndarray:
        """The bias-corrected moment after seeing `g`."""
        self.t += 1
        residual = self.signal == "residual"
        d1, d2 = (self.tau_decay, self.b2) if residual else (self.moment_decay, self.moment_decay)
        x = g - self.mu if residual else g
        self.first = d1 * self.first + (1 - d1) * np.mean(np.abs(x) if residual else x)
        self.second = d2 * self.second + (1 - d2) * np.mean(x * x)
        first, second = self.first, self.second
        if self.debias:
            first = first / (1 - d1**self.t + self.debias_eps)
            second = second / (1 - d2**self.t + self.debias_eps)
        if (self.t - 1) % self.b1_update_interval == 0:
            if residual:
                q = first**2 + 1e-8
                z, fallback = second / q, second >= self.fallback_threshold * q
            else:
                z, fallback = max(second - first**2, 0.0) / (second + self.eps), False
            adapted = self.b1_base * (1 - self.adapt_strength * z / (1 + z))
            lowest = max(0.5, self.b1_base * (1 - self.adapt_strength))
            self.b1 = self.b1_base if fallback else min(max(adapted, lowest), self.b1_base)
        self.mu = self.b1 * self.mu + (1 - self.b1) * g
        self.prod *= self.b1
        return self.mu / (1 - self.prod + self.debias_eps)


def adam_over(moment: dict[str, Any], b2=0.999, eps=1e-8, max_abs=None, debias_eps=0.0) -> Step:
    """Adam's second moment under the adaptive first one that `moment` describes."""

    def tensor():
        first, nu, t = Moment(**moment), np.zeros(()), 0

        def step(g, _):
            nonlocal nu, t
            g, t = _safe(g, max_abs), t + 1
            mu = first.step(g) * (1 - first.prod)
            nu = b2 * nu + (1 - b2) * g * g
            return (
                mu / (1 - first.prod + debias_eps) / (np.sqrt(nu / (1 - b2**t + debias_eps)) + eps)
            )

        return step

    return elementwise(tensor)


def stam_direction(
    b2=0.999, eps=1e-8, max_abs: float | None = 2.0**48, debias_eps=0.0, **moment
) -> Step:
    return adam_over({"b2": b2, **moment}, b2, eps, max_abs, debias_eps)


def tensor_rms(decay=0.99, eps=1e-8, debias_eps=0.0) -> Step:
    def tensor():
        square, t = 0.0, 0

        def step(g, _):
            nonlocal square, t
            t += 1
            square = decay * square + (1 - decay) * np.mean(g * g)
            return g / (np.sqrt(square / (1 - decay**t + debias_eps)) + eps)

        return step

    return elementwise(tensor)


def stam_lite_direction(
    moment_decay=0.99, eps=1e-8, max_abs: float | None = 2.0**48, debias_eps=0.0, **moment
) -> Step:
    """One root mean square a tensor under the adaptive first moment."""

    def tensor():
        first = Moment(
            signal="moments", moment_decay=moment_decay, eps=eps, debias_eps=debias_eps, **moment
        )

        def step(g, _):
            mu_hat = first.step(_safe(g, max_abs))
            square = first.second / (1 - moment_decay**first.t + debias_eps)
            return mu_hat / (np.sqrt(square) + eps)

        return step

    return elementwise(tensor)
