"""How far two ways of rounding a program that nobody knows may be apart: measured, where `bounds.py` has no row.

They differ by what a change of the inputs by some units in the last place would do, and by the rounding of the results
themselves. How much the change does is seen in `PROBES` runs on inputs of which every entry has moved by up to `MOVED`
units: `spreads`. The largest change in a leaf counts for all its entries, since a chain can be discontinuous (a sign, a
clip). Allowed are `FACTOR` times as much, for the operations inside, and `UNITS` units of the largest entry.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PROBES = 6
MOVED = 4
FACTOR = 8
UNITS = 32


def moved(tree: Any, seed: int) -> Any:
    """`tree` with every floating-point entry moved by up to `MOVED` units of its last place."""
    rng = np.random.default_rng(seed)

    def move(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        by = 1 + float(jnp.finfo(x.dtype).eps) * rng.integers(-MOVED, MOVED + 1, x.shape)
        return jnp.asarray(np.asarray(x, np.float64) * by, x.dtype)

    return jax.tree.map(move, tree)


def numbers(x: Any) -> np.ndarray:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x, np.float64)


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """The largest difference where both are finite."""
    both = np.isfinite(x) & np.isfinite(y)
    return float(np.max(np.abs(x[both] - y[both]), initial=0.0))


def half(eps: float) -> bool:
    return eps > float(jnp.finfo(jnp.float32).eps)


def spreads(want: Any, probes: list[Any]) -> list[float]:
    """For every leaf of `want` how far a probe is away from it, infinite where one is finite and the other not."""

    def spread(x: Any, *others: Any) -> float:
        x = numbers(x)
        far = 0.0
        for other in map(numbers, others):
            if not np.array_equal(np.isfinite(x), np.isfinite(other)):
                return np.inf
            far = max(far, distance(x, other))
        return far

    return [
        spread(*leaves)
        for leaves in zip(*(jax.tree.leaves(tree) for tree in (want, *probes)), strict=True)
    ]


def too_far(got: Any, want: Any, spread: list[float], eps: float) -> dict[str, float]:
    """The leaves of `got` that are further from `want` than allowed, and how many times as far."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    found = {}
    for (path, y), x, far in zip(
        jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), spread, strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert (x.shape, x.dtype) == (y.shape, y.dtype), f"{where}: {x} is not like {y}"
        if np.isinf(far):
            continue
        unit = eps if jnp.issubdtype(y.dtype, jnp.floating) else 0.0
        x, y = numbers(x), numbers(y)
        lost, gained = np.isfinite(y) & ~np.isfinite(x), np.isfinite(x) & ~np.isfinite(y)
        # XLA divides by a small constant by multiplying with its reciprocal, infinite in half precision.
        if lost.any() or (gained.any() and not half(eps)):
            found[where] = np.inf
            continue
        size = distance(y, np.zeros_like(y))
        difference = distance(x, y)
        allowed = FACTOR * far + UNITS * unit * size
        if difference > allowed:
            found[where] = difference / allowed if allowed else np.inf
    return found
