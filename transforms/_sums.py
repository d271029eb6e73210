"""Sums over each of many tensors, or pairs of tensors, that an update must know before it can begin.

On the CPU the compiled kernel takes them in one pass over all tensors, where XLA makes a pass, and a call, for each
sum of each tensor; so it does in a bridge that runs op by op. Elsewhere, without the kernel and in dtypes that it
has not, XLA reduces, or the bridge's compiler.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chainrule.native import chosen_for_sums, for_cpu, xla
from chainrule.transforms._numerics import inner, own_scalar, square_norm, up

Tensors = Sequence[jax.Array]


def _variance_share(x: jax.Array, y: jax.Array, c: Any) -> jax.Array:
    signal = up(x) * up(x)
    return jnp.sum(signal / (signal + (own_scalar(c, x) * up(y) + own_scalar(0, x))))


def _square_share(x: jax.Array, y: jax.Array, c: Any) -> jax.Array:
    # min(x^2 / y, c) / c: a product with c in the sum would keep XLA:CPU from fusing it.
    shares = jnp.minimum(up(x) * up(x) / jnp.maximum(up(y), own_scalar(0, x)), own_scalar(c, x))
    return jnp.sum(shares) / c


# XLA:CPU fuses each difference into its own reduction only if the two are not one expression: a shared
# difference is written to memory, at four times the cost of both reductions. Hence x - y and y - x.
_TERMS: dict[str, tuple[Callable[[Any, Any, Any], jax.Array], ...]] = {
    "moments": (lambda x, *_: jnp.sum(up(x)), lambda x, *_: jnp.sum(jnp.square(up(x)))),
    "residual": (
        lambda x, y, _: jnp.sum(jnp.abs(up(y) - up(x))),
        lambda x, y, _: jnp.sum(jnp.square(up(x) - up(y))),
    ),
    "alignment": (
        lambda x, y, _: inner(x, y),
        lambda x, *_: square_norm(x),
        lambda _, y, c: square_norm(y),
    ),
    "variance_share": (_variance_share,),
    "square_share": (_square_share,),
}


def sums(kind: str, xs: Tensors, ys: Tensors | None = None, c: Any = 1.0) -> tuple[jax.Array, ...]:
    """The sums of each tensor, or pair of tensors, each sum of all tensors as a vector.

    Args:
      kind: `"moments"`, the sums of x and x^2; `"residual"`, of |x - y| and (x - y)^2; `"alignment"`, the inner product
        of x and y as real vectors, |x|^2 and |y|^2; `"variance_share"`, the sum of x^2 / (x^2 + c y); `"square_share"`,
        of x^2 / max(x^2, c y). In the last two a term is 0 where x and y are.
      xs: the tensors; real, but for the alignment.
      ys: as many of the same shapes, or scalars; `None` for the moments.
      c: a positive number for all tensors, read for the shares.

    >>> [v.tolist() for v in sums("alignment", [jnp.ones(2)], [jnp.array([3.0, 0.0])])]
    [[3.0], [2.0], [9.0]]
    """
    xs, ys, c = tuple(xs), tuple(xs if ys is None else ys), jnp.asarray(c, jnp.float32)
    if not xs:
        return tuple(jnp.zeros((0,), jnp.float32) for _ in _TERMS[kind])
    alike = all(map(operator.eq, map(jnp.shape, xs), map(jnp.shape, ys)))
    dtypes = [jnp.result_type(t) for t in (*xs, *ys)]
    everywhere = alike and chosen_for_sums(dtypes)
    if everywhere or (alike and for_cpu(dtypes)):
        return _in_kernel(kind, everywhere, xs, ys, c)
    return _in_xla(kind, xs, ys, c)


def means(kind: str, xs: Tensors, ys: Tensors | None = None, c: Any = 1.0) -> tuple[jax.Array, ...]:
    """`sums` divided by the number of entries; 0 for a tensor without any.

    >>> [v.tolist() for v in means("moments", [jnp.array([1.0, 3.0]), jnp.zeros(0)])]
    [[2.0, 0.0], [5.0, 0.0]]
    """
    sizes = np.array([max(jnp.size(x), 1) for x in xs], np.float32)
    return tuple(total / sizes for total in sums(kind, xs, ys, c))


def _in_xla(kind: str, xs: Tensors, ys: Tensors, c: jax.Array) -> tuple[jax.Array, ...]:
    pairs = list(zip(xs, ys, strict=True))
    return tuple(jnp.stack([term(x, y, c) for x, y in pairs]) for term in _TERMS[kind])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _in_kernel(kind: str, everywhere: bool, *operands: Any) -> tuple[jax.Array, ...]:
    """Sums in the kernel, on the CPU alone if not `everywhere`."""

    def in_kernel(xs, ys, c):
        table = xla.sums(kind, xs, None if kind == "moments" else ys, c)
        return tuple(table[:, k] for k in range(table.shape[1]))

    if everywhere:
        return in_kernel(*operands)
    in_xla = functools.partial(_in_xla, kind)
    return jax.lax.platform_dependent(*operands, cpu=in_kernel, default=in_xla)


@_in_kernel.defjvp
def _(kind, everywhere, primals, tangents):
    del everywhere
    return jax.jvp(functools.partial(_in_xla, kind), primals, tangents)
