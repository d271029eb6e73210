"""COSMIC's links: two EMAs over a root, a mean magnitude, a gate, and tensors of fixed tiers."""

from collections.abc import Mapping, Sequence

import numpy as np

from reference.steps import Step, Tree, elementwise


def dual_ema(
    b1=0.9,
    b1_long=0.99,
    b2: float | None = 0.999,
    eps=1e-8,
    blend=1.0,
    start="zero",
    debias="both",
    keep_long=False,
) -> Step:
    del keep_long  # memory, not arithmetic

    def tensor():
        short, long, nu, t = np.zeros(()), np.zeros(()), np.zeros(()), 0

        def step(g, _):
            nonlocal short, long, nu, t
            t += 1
            first = start == "gradient" and t == 1
            short = g if first else b1 * short + (1 - b1) * g
            long = g if first else b1_long * long + (1 - b1_long) * g
            both = debias == "both" and start == "zero"
            c_short, c_long = (1 - b1**t, 1 - b1_long**t) if both else (1.0, 1.0)
            u = blend * short / c_short + (1 - blend) * long / c_long
            if b2 is None:
                return u
            nu = b2 * nu + (1 - b2) * g * g
            return u / (np.sqrt(nu / (1 - b2**t)) + eps)

        return step

    return elementwise(tensor)


def sign(grads: Tree, _: Tree) -> Tree:
    return {name: np.sign(g) for name, g in grads.items()}


def sign_times_magnitude(decay=0.99) -> Step:
    def tensor():
        magnitude = None

        def step(g, _):
            nonlocal magnitude
            mean = np.mean(np.abs(g))
            magnitude = mean if magnitude is None else decay * magnitude + (1 - decay) * mean
            return magnitude * np.sign(g)

        return step

    return elementwise(tensor)


def tiered(tiers: Sequence[int], transforms: Mapping[int, Step]) -> Step:
    """Each tensor by the transform of its tier; the tiers are given in turn."""

    def step(grads: Tree, params: Tree) -> Tree:
        of = {name: tiers[i % len(tiers)] for i, name in enumerate(grads)}
        updates: Tree = {}
        for tier, transform in transforms.items():
            updates |= transform({k: g for k, g in grads.items() if of[k] == tier}, params)
        return {name: updates[name] for name in grads}

    return step


class Gate:
    """The factor of each step from all gradients."""

    def __init__(self, min_scale=0.2, warmup_steps=200, update_interval=10):
        self.settings = (min_scale, warmup_steps, update_interval)
        self.t, self.raw = 0, 1.0
        self.signal: float | None = None

    def factor(self, grads: list[np.ndarray]) -> float:
        min_scale, warmup, interval = self.settings
        self.t += 1
        if self.t % interval == 0 or self.signal is None:
            means = [np.mean(np.abs(g)) for g in grads]
            magnitude = float(np.mean(means))
            ratio = np.mean([np.var(g) / (m**2 + 1e-12) for g, m in zip(grads, means, strict=True)])
            self.signal = magnitude if self.signal is None else 0.9 * self.signal + 0.1 * magnitude
            change = abs(magnitude - self.signal) / (self.signal + 1e-12)
            self.raw = min(
                1 - np.clip((x - low) / (high - low), 0, 1) * (1 - min_scale)
                for x, low, high in ((change, 0.5, 1.0), (ratio, 4.0, 8.0))
            )
        ramp = 1.0 if warmup == 0 else np.clip((self.t - warmup) / warmup, 0, 1)
        return 1 - ramp * (1 - self.raw)


def gated(
    direction: Step,
    tier_max=0,
    *,
    tier_scale=(1.0, 1.0, 1.0),
    min_lr_scale=0.1,
    tiers: Sequence[int] = (0,),
    **gate,
) -> Step:
    state = Gate(**gate)

    def step(grads: Tree, params: Tree) -> Tree:
        of = {name: tiers[i % len(tiers)] for i, name in enumerate(grads)}
        measured = [g for name, g in grads.items() if of[name] <= tier_max]
        scale = state.factor(measured) if measured else 1.0
        updates = direction(grads, params)
        for name, u in updates.items():
            factor = scale if of[name] <= tier_max else 1.0
            updates[name] = u * max(factor * tier_scale[of[name]], min_lr_scale)
        return updates

    return step
