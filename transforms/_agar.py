"""AGAR, the share of the gradient that is signal: the mean of m^2 / max(v, m^2), over all tensors or for each."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chainrule.transforms._numerics import own_scalar, share, up
from chainrule.transforms._per_parameter import stacked
from chainrule.transforms._sums import sums


def signal_share(
    ms: Sequence[jax.Array], vs: Sequence[jax.Array], scale: Any, eps: Any, by_group: bool
) -> tuple[jax.Array, np.ndarray]:
    """AGAR of tensors, and whether each has entries.

    Args:
      ms: first moments.
      vs: second moments.
      scale: what these are multiplied by.
      eps: least noise, and added to the denominator; `None`: no such number.
      by_group: whether all entries have one mean, a vector of one entry; else each tensor has its own.
    """
    sizes = np.array([m.size for m in ms], np.int64)
    if eps is None:
        (shares,) = sums("square_share", ms, vs, scale)
    else:
        shares = stacked([_share_sum(m, v, scale, eps) for m, v in zip(ms, vs, strict=True)])
    if by_group:
        # As floats: int32, which JAX makes of integers, ends at 2^31.
        return jnp.sum(shares, keepdims=True) / float(max(sizes.sum(), 1)), np.array([sizes.any()])
    return shares / np.maximum(sizes, 1).astype(shares.dtype), sizes > 0


def _share_sum(m: jax.Array, v: jax.Array, scale: Any, eps: Any) -> jax.Array:
    """The sum of s / (s + n + eps), where s = m^2 and the noise n = max(scale v - s, eps)."""
    s, scale, eps = up(m) * up(m), own_scalar(scale, m), own_scalar(eps, m)
    return jnp.sum(share(s, jnp.maximum(scale * up(v), s + eps) + eps))


def clamped(
    ms: Sequence[jax.Array], vs: Sequence[jax.Array], factor: Any, eps: Any, by_group: bool
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Moments of at most `factor` times their mean magnitude, that of all tensors or of each."""
    total = max(sum(m.size for m in ms), 1)

    def bounds(magnitudes: list[jax.Array]) -> list[jax.Array]:
        means = [jnp.sum(x) / max(x.size, 1) for x in magnitudes]
        if by_group:
            pooled = sum(m * x.size for m, x in zip(means, magnitudes, strict=True)) / total
            means = [jnp.asarray(pooled)] * len(means)
        return [factor * (mean + (0 if eps is None else eps)) for mean in means]

    first, second = bounds([jnp.abs(up(m)) for m in ms]), bounds([up(v) for v in vs])
    return (
        [jnp.clip(up(m), -a, a) for m, a in zip(ms, first, strict=True)],
        [jnp.minimum(up(v), b) for v, b in zip(vs, second, strict=True)],
    )
