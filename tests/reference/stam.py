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
        nonfinite="skip",
        max_abs: float | None = 2.0**48,
    ):
        self.settings = locals()
        self.t, self.first, self.second, self.prod = 0, 0.0, 0.0, 1.0
        self.b1, self.mu = b1_base, np.zeros(())
        self.grad = self.mu
        """The gradient that is handed on."""
        self.noise = NoiseAndDrift(moment_decay) if signal == "noise" else None

    def step(self, raw: np.ndarray) -> np.ndarray:
        """The moment after seeing the gradient `raw`, before bias correction."""
        has = self.settings
        self.t += 1
        g = self.grad = _safe(raw, has["max_abs"])
        seen = g if has["nonfinite"] == "zero" else raw
        whole = np.all(np.isfinite(seen))
        if whole and self.noise:
            self.noise.take_in(seen, self.mu / (1 - self.prod) if self.t > 1 else self.mu)
            adapted = self._within(self.noise.b1(has["b1_base"]))
        elif whole:
            adapted = self._take_in(seen)
        else:
            adapted = has["b1_base"]
        if (self.t - 1) % has["b1_update_interval"] == 0:
            self.b1 = adapted
        self.mu = self.b1 * self.mu + (1 - self.b1) * g
        self.prod *= self.b1
        if self.noise:
            self.noise.step((1 - self.b1) / (1 - self.prod))
        return self.mu

    def _take_in(self, g: np.ndarray) -> float:
        has = self.settings
        residual = has["signal"] == "residual"
        d1, d2 = (has["tau_decay"], has["b2"]) if residual else (has["moment_decay"],) * 2
        x = g - self.mu if residual else g
        self.first = d1 * self.first + (1 - d1) * np.mean(np.abs(x) if residual else x)
        self.second = d2 * self.second + (1 - d2) * np.mean(x * x)
        first, second = self.first, self.second
        if has["debias"]:
            first = first / (1 - d1**self.t + has["debias_eps"])
            second = second / (1 - d2**self.t + has["debias_eps"])
        base, strength = has["b1_base"], has["adapt_strength"]
        if residual:
            q = first**2 + 1e-8
            if second >= has["fallback_threshold"] * q:
                return base
            z = second / q
        else:
            z = max(second - first**2, 0.0) / (second + has["eps"])
        return self._within(base * (1 - strength * z / (1 + z)))

    def _within(self, b1: float) -> float:
        base, strength = self.settings["b1_base"], self.settings["adapt_strength"]
        return min(max(b1, 0.5, base * (1 - strength)), base)


class NoiseAndDrift:
    """Noise and drift of one tensor from two squared differences, as lists of what was seen."""

    def __init__(self, decay: float):
        self.decay = decay
        self.rows: list[tuple[float, ...]] = []
        """Of every step: both mean squares, and what multiplies s^2 and d^2 in the second."""
        self.n = self.l = 0.0
        self.last: np.ndarray | None = None

    def take_in(self, g: np.ndarray, moment: np.ndarray) -> None:
        if self.last is not None:
            steps, residual = (float(np.mean((g - other) ** 2)) for other in (self.last, moment))
            self.rows.append((steps, residual, 1 + self.n, 1 + self.l))
        self.last = g

    def step(self, k: float) -> None:
        self.n = (1 - k) ** 2 * self.n + k**2
        self.l = (1 - k) ** 2 * (self.l + 1)

    def b1(self, unknown: float) -> float:
        if len(self.rows) < 2:
            return unknown
        weights = self.decay ** np.arange(len(self.rows))[::-1]
        steps, residual, noise_factor, drift_factor = np.average(self.rows, axis=0, weights=weights)
        equations = np.array([[2.0, 1.0], [noise_factor, drift_factor]])
        s2 = max(np.linalg.solve(equations, [steps, residual])[0], 0.0)
        d2 = max(steps - 2 * s2, 0.0)
        if s2 == d2 == 0:
            return unknown
        return 1 - 2 * np.sqrt(d2) / (np.sqrt(d2) + np.sqrt(d2 + 4 * s2))


def adam_over(moment: dict[str, Any], b2=0.999, eps=1e-8, debias_eps=0.0) -> Step:
    """Adam's second moment under the adaptive first one that `moment` describes."""

    def tensor():
        first, nu, t = Moment(**moment), np.zeros(()), 0

        def step(g, _):
            nonlocal nu, t
            t += 1
            mu = first.step(g)
            nu = b2 * nu + (1 - b2) * first.grad**2
            nu_hat = nu / (1 - b2**t + debias_eps)
            return mu / (1 - first.prod + debias_eps) / (np.sqrt(nu_hat) + eps)

        return step

    return elementwise(tensor)


def stam_direction(b2=0.999, eps=1e-8, debias_eps=0.0, **moment) -> Step:
    return adam_over({"b2": b2, **moment}, b2, eps, debias_eps)


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


def stam_lite_direction(moment_decay=0.99, eps=1e-8, debias_eps=0.0, **moment) -> Step:
    """One root mean square a tensor, of the gradients that the moment's statistics saw, under that moment."""

    def tensor():
        first = Moment(
            signal="moments", moment_decay=moment_decay, eps=eps, debias_eps=debias_eps, **moment
        )

        def step(g, _):
            mu_hat = first.step(g) / (1 - first.prod + debias_eps)
            square = first.second / (1 - moment_decay**first.t + debias_eps)
            return mu_hat / (np.sqrt(square) + eps) if square > 0 else np.zeros_like(g)

        return step

    return elementwise(tensor)
