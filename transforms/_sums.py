"""Sums over each of many tensors, or pairs of tensors, that an update must know before it can begin."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chainrule.native import forms

Tensors = Sequence[jax.Array]


def sums(kind: str, xs: Tensors, ys: Tensors | None = None, c: Any = 1.0) -> list[jax.Array]:
    """The sums of each tensor, or pair of tensors, each sum of all tensors as a vector.

    Args:
      kind: `"moments"`, the sums of x and x^2; `"magnitude"`, of |x| where x is finite; `"residual"`, of |x - y| and
        (x - y)^2; `"alignment"`, the inner product of x and y as real vectors, |x|^2 and |y|^2; `"variance_share"`,
        the sum of x^2 / (x^2 + c y); `"square_share"`, of x^2 / max(x^2, c y). In the last two a term is 0 where x
        and y are.
      xs: the tensors; real, but for the alignment and the magnitude.
      ys: as many of the same shapes, or scalars; `None` for the moments and the magnitude.
      c: a positive number for all tensors, read for the shares.

    >>> [v.tolist() for v in sums("alignment", [jnp.ones(2)], [jnp.array([3.0, 0.0])])]
    [[3.0], [2.0], [9.0]]
    """
    from chainrule.native import primitives  # whose import takes as long as optax's

    if not xs:
        return [jnp.zeros((0,), jnp.float32) for _ in forms.SUMS[kind]]
    tensors = [jnp.asarray(x) for x in (*xs, *(ys or ()))]
    c = jnp.asarray(c, jnp.float32)
    return list(primitives.sums.bind(c, *tensors, kind=kind, batch=0, kernel="auto"))


def means(kind: str, xs: Tensors, ys: Tensors | None = None, c: Any = 1.0) -> list[jax.Array]:
    """`sums` divided by the number of entries; 0 for a tensor without any.

    >>> [v.tolist() for v in means("moments", [jnp.array([1.0, 3.0]), jnp.zeros(0)])]
    [[2.0, 0.0], [5.0, 0.0]]
    """
    sizes = np.array([max(jnp.size(x), 1) for x in xs], np.float32)
    return [total / sizes for total in sums(kind, xs, ys, c)]
