"""What the native kernel computes, tensor by tensor, in float64 NumPy from the equations of its headers."""

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Tier2(NamedTuple):
    update: Array
    mu: Array
    mu_long: Array
    nu: Array


def step(
    direction: Array, parameter: Array | float, *, learning_rate: float, weight_decay: float = 0.0
) -> Array:
    """u = -rate (d + wd p)."""
    return -learning_rate * (direction + weight_decay * parameter)


def tier2(
    g: Array,
    mu: Array,
    nu: Array | float = 0.0,
    mu_long: Array | float = 0.0,
    *,
    b1: float,
    b2: float = 0.0,
    eps: float = 0.0,
    b1_long: float = 0.0,
    blend: float = 1.0,
    mu_correction: float = 1.0,
    nu_correction: float = 1.0,
    denominator: str = "root",
) -> Tier2:
    """The direction (as `update`) and the moments after it."""
    mu = b1 * mu + (1 - b1) * g
    mu_long = b1_long * mu_long + (1 - b1_long) * g
    nu = b2 * nu + (1 - b2) * g**2
    momentum = (blend * mu + (1 - blend) * mu_long) / mu_correction
    below = {
        "root": np.sqrt(nu / nu_correction) + eps,
        "magnitude": np.abs(g) + eps,
        "none": np.ones_like(g),
    }[denominator]
    return Tier2(momentum / below, mu, mu_long, nu)


def statistics(g: Array) -> Array:
    """mean |g|, mean g^2, variance, max |g|."""
    if g.size == 0:
        return np.zeros(4)
    return np.array([np.abs(g).mean(), (g**2).mean(), g.var(), np.abs(g).max()])


def sums(kind: str, x: Array, y: Array | None = None, c: float = 1.0) -> list[float]:
    """The terms of `include/chainrule/sums.hpp`, added up."""
    other = np.zeros_like(x) if y is None else y
    below = x**2 + c * other, np.maximum(x**2, c * other)
    terms = {
        "moments": [x, x**2],
        "residual": [np.abs(x - other), (x - other) ** 2],
        "alignment": [x * other, x**2, other**2],
        "variance_share": [np.where(below[0] > 0, x**2 / np.where(below[0] > 0, below[0], 1), 0)],
        "square_share": [np.where(below[1] > 0, x**2 / np.where(below[1] > 0, below[1], 1), 0)],
        "magnitude": [np.abs(x[np.isfinite(x)])],
    }
    return [float(term.sum()) for term in terms[kind]]


class Quantized(NamedTuple):
    packed: Array
    scales: Array
    values: Array  # decoded


def quantize(x: Array, *, block: int, bits: int, uniform: Array | None = None) -> Quantized:
    """Codes, scales and decoded values of float32 x; `uniform` in [0, 1) rounds stochastically."""
    levels = 7 if bits == 4 else 127
    blocks = -(-x.size // block)
    whole = np.zeros((blocks, block))
    whole.reshape(-1)[: x.size] = x
    exact = np.abs(whole).max(axis=1, initial=0.0, keepdims=True) / levels
    exact[exact.astype(np.float32) == 0] = 1.0
    scales = exact.astype(np.float32)
    if uniform is None:
        nearest = np.rint(whole / exact)  # half to even
    else:
        shift = np.zeros((blocks, block), np.float32)
        shift.reshape(-1)[: x.size] = uniform
        nearest = np.floor(whole.astype(np.float32) / scales + shift)
    clipped = np.clip(nearest, -levels, levels)
    codes, values = (a.reshape(-1)[: x.size] for a in (clipped, clipped * scales))
    stored = (codes + levels + 1).astype(np.uint8)
    if bits == 4:
        stored = np.append(stored, np.zeros(x.size % 2, np.uint8))
        stored = stored[0::2] | stored[1::2] << 4
    return Quantized(stored, scales[:, 0], values)
