"""CASMO: AGAR, its calibrated confidence, belief moments and trust x focus."""

import numpy as np

from reference.steps import Step, Tree, elementwise


class Calibration:
    """Confidence of samples in the order they come; frozen after the first `steps` finite ones."""

    def __init__(self, steps, center, tau_clip_range, c_min, adapt_c_min):
        self.steps, self.center, self.clip = steps, center, tau_clip_range
        self.c_min, self.adapt = c_min, adapt_c_min
        self.samples: list[float] = []
        self.tau = self.std = np.nan

    def __call__(self, agar: float) -> float:
        if not np.isfinite(agar):
            return self.c_min
        if len(self.samples) < self.steps:
            self.samples.append(agar)
            if len(self.samples) == self.steps:
                self.fit()
        if np.isnan(self.tau):
            return min(max(agar, self.c_min), 1.0)
        return self.c_min + (1 - self.c_min) / (1 + np.exp(-(agar - self.tau) / self.std))

    def fit(self):
        x = np.array(self.samples)
        self.tau = float(np.mean(x) if self.center == "mean" else np.median(x))
        if self.clip is not None:
            self.tau = min(max(self.tau, self.clip[0]), self.clip[1])
        self.std = max(float(np.std(x)), 0.01)
        if self.adapt:
            variation = np.std(x) / (np.mean(x) + 1e-8)
            self.c_min = 0.1 if variation > 0.5 else 0.3 if variation > 0.3 else 0.5


def ratios(m, v, clamp_factor, eps, mean_m, mean_v) -> np.ndarray:
    """s / (s + n + eps) entry by entry; 0 where there never was a gradient."""
    if clamp_factor is not None:
        a, b = clamp_factor * (mean_m + eps), clamp_factor * (mean_v + eps)
        m, v = np.clip(m, -a, a), np.clip(v, 0, b)
    s = m * m
    whole = s + np.maximum(v - s, eps) + eps
    return np.divide(s, whole, out=np.zeros_like(s), where=whole > 0)


def agar_confidence(
    direction: Step,
    tau_init_steps: int | None = None,
    c_min: float = 0.1,
    *,
    b1=0.9,
    b2=0.999,
    source="upstream",
    granularity="group",
    center="mean",
    tau_clip_range=None,
    clamp_factor=None,
    debias=True,
    eps: float | None = None,
    adapt_c_min=False,
    shared_calibration=False,
) -> Step:
    """`direction` scaled by one confidence, or one a tensor. Every source of moments comes to the same."""
    del source
    steps = max(500, round(50 / (1 - b1))) if tau_init_steps is None else tau_init_steps
    mu: Tree = {}
    nu: Tree = {}
    maps: dict[str, Calibration] = {}
    t = 0

    def confidence(key: str, agar: float) -> float:
        one = granularity == "group" or shared_calibration
        made = Calibration(steps, center, tau_clip_range, c_min, adapt_c_min)
        return maps.setdefault("" if one else key, made)(agar)

    def step(grads: Tree, params: Tree) -> Tree:
        nonlocal t
        t += 1
        c1, c2 = (1 - b1**t, 1 - b2**t) if debias else (1.0, 1.0)
        for name, g in grads.items():
            mu[name] = b1 * mu.get(name, 0.0) + (1 - b1) * g
            nu[name] = b2 * nu.get(name, 0.0) + (1 - b2) * g * g
        names = list(grads)
        pools = [names] if granularity == "group" else [[name] for name in names]
        updates = direction(grads, params)
        out: Tree = {}
        for pool in pools:
            m = np.concatenate([np.ravel(mu[name] / c1) for name in pool])
            v = np.concatenate([np.ravel(nu[name] / c2) for name in pool])
            a = ratios(m, v, clamp_factor, eps or 0.0, np.mean(np.abs(m)), np.mean(v))
            factor = confidence(pool[0], float(np.mean(a)))
            out |= {name: factor * updates[name] for name in pool}
        return out

    return step


class Belief:
    """A tensor's mean and variance after every gradient, bias-corrected."""

    def __init__(self, b1=0.9, b2=0.999, deviation="unbiased"):
        self.b1, self.b2, self.unbiased = b1, b2, deviation == "unbiased"
        self.t, self.m, self.s = 0, np.zeros(()), np.zeros(())

    def __call__(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        b1, b2 = self.b1, self.b2
        seen = self.t  # deviations before this one that count, with "unbiased"
        if not self.unbiased:
            self.s = b2 * self.s + (1 - b2) * (g - self.m) ** 2
        elif seen > 0:
            self.s = b2 * self.s + (1 - b2) * (g - self.m / (1 - b1**seen)) ** 2
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        weight = 1 - b2 ** (max(seen, 1) if self.unbiased else self.t)
        return self.m / (1 - b1**self.t), self.s / weight + np.zeros_like(g)


def belief(
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    deviation="unbiased",
    confidence: tuple[float, float, float, float] | None = None,
) -> Step:
    """The direction on belief moments, times trust x focus if `confidence` is (robustness, c_min, rel_floor, eps)."""

    def tensor():
        moments = Belief(b1, b2, deviation)

        def step(g, _):
            mean, variance = moments(g)
            whole = mean**2 + variance
            direction = mean / (np.sqrt(whole) + eps)
            if confidence is None:
                return direction
            robustness, c_min, rel_floor, least = confidence
            share = np.divide(mean**2, whole, out=np.zeros_like(whole), where=whole > 0)
            average = np.mean(share)
            trust = (c_min + (1 - c_min) * average) ** robustness
            return trust * np.clip(share / (average + least), rel_floor, 1) * direction

        return step

    return elementwise(tensor)
