r"""Newton-Schulz steps on a matrix, by way of its Gram matrix where that takes fewer operations.

    A_k = X_k X_k^H,   P_k = a I + b A_k + c A_k^2
    one step a Gram matrix:     X_{k+1} = P_k X_k
    several:                    A_{k+1} = P_k A_k P_k,   X_{k+j} = (P_{k+j-1} ... P_k) X_k

A, P and their products are polynomials in one Hermitian matrix: they commute and are Hermitian, so only
the blocks on and above the diagonal are computed. A Gram matrix knows a small singular value s only by
s^2, with an error of eps; a step multiplies s by its slope a, and the error by a^2. So the Gram matrix
is formed anew, from X, before that error can reach `_MAX_ERROR`.

The first Gram matrix also says what brings the norm of X to at most one more tightly than its Frobenius norm does:

    "schatten":   X / |A|_F^(1/2)
    "aol":        row i of X / (sum_j |A_ij|)^(1/2), another matrix than X, with singular vectors of its own
"""

import itertools
import math
import operator
from collections.abc import Callable
from contextvars import ContextVar

import jax
import jax.numpy as jnp

from chainrule.transforms._numerics import abs_sq, root, up
from chainrule.transforms._polar_coefficients import Triple

_MAX_ERROR = 2.0**-12  # that keeping one Gram matrix for several steps may add to a singular value
# With 8 or 11 bits, to round X after every step costs more than what a Gram matrix loses over two.
_SHORT = 2.0**-12
PANELS = 3  # of rows that a Hermitian matrix is held in
TILE = 64  # heights of panels are multiples of it, which suits vector registers and matrix units
WHOLE = 384  # up to this side a Hermitian matrix is one panel: the products cost less than what cuts and joins them
_DIRECT = 64  # up to this side each step forms its own Gram matrix: fewer calls count for more than fewer operations

one_equation: ContextVar[Callable[[jax.Array, list[Triple], bool | str], jax.Array] | None]
one_equation = ContextVar("one_equation", default=None)
"""What takes all steps of real matrices for `iterate`, such as one equation of a jaxpr that has no other form."""

SCALINGS = ("frobenius", "schatten", "aol")
"""What brings norms to at most one: that of X, which it comes with; what its first Gram matrix says."""


def iterate(
    x: jax.Array, triples: list[Triple], gram: bool | str, scaling: str = "frobenius"
) -> jax.Array:
    """A step for each triple, on matrices (..., rows, columns) of which none has a norm above one.

    Args:
      x: the matrices; the arithmetic is in their dtype.
      triples: the coefficients of each step.
      gram: `True`, one Gram matrix for all steps; `False`, one for each; `"auto"`, what is cheapest.
      scaling: one of `SCALINGS`.
    """
    if x.size == 0:
        return x
    bind = one_equation.get()
    if bind is not None and scaling == "frobenius" and jnp.issubdtype(x.dtype, jnp.floating):
        return bind(x, triples, gram)
    small, large = sorted(x.shape[-2:])
    done = 0
    for length in segments(small, large, triples, float(jnp.finfo(x.dtype).eps), gram):
        x = _segment(x, triples[done : done + length], "frobenius" if done else scaling)
        done += length
    return x


def segments(
    small: int, large: int, triples: list[Triple], eps: float, gram: bool | str
) -> tuple[int, ...]:
    """How many steps each Gram matrix serves, for the fewest floating-point operations.

    >>> steps = [(3.4445, -4.7750, 2.0315)] * 5
    >>> segments(768, 768, steps, 2**-23, "auto"), segments(768, 3072, steps, 2**-23, "auto")
    ((1, 1, 1, 1, 1), (3, 2))
    >>> segments(320, 320, steps, 2**-23, "auto"), segments(320, 1280, steps, 2**-23, "auto")
    ((1, 1, 1, 1, 1), (3, 2))
    >>> segments(768, 3072, steps, 2**-7, "auto")
    (2, 2, 1)
    """
    steps = len(triples)
    if gram != "auto" or small <= _DIRECT:
        return (steps,) if gram is True else (1,) * steps
    panels = PANELS if small > WHOLE else 1
    half = (panels + 1) / (2 * panels)  # the part of a Hermitian product that is computed
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for end in range(1, steps + 1):
        options = []
        for start in reversed(range(end)):
            length = end - start
            slope = math.prod(abs(a) for a, _, _ in triples[start:end])
            if length <= (2 if eps > _SHORT else 1) or slope**2 * eps <= _MAX_ERROR:
                # A Gram matrix, the products of its steps and one with X, in units of small^2.
                cost = half * large + half * small * (4 * length - 3) + large
                options.append((best[start][0] + cost, (*best[start][1], length)))
        best.append(min(options, key=operator.itemgetter(0)))
    return best[steps][1]


def _segment(x: jax.Array, triples: list[Triple], scaling: str) -> jax.Array:
    """Several steps by way of the Gram matrix of the smaller side, held in panels of rows."""
    tall = x.shape[-2] > x.shape[-1]
    small = x.shape[-1] if tall else x.shape[-2]
    height = -(-small // (TILE * PANELS)) * TILE if small > WHOLE else small
    starts = list(range(0, small, height))
    source, axis = x, x.ndim - 1 if tall else x.ndim - 2
    if tall and float(jnp.finfo(x.dtype).eps) > _SHORT:
        # XLA:CPU sums bfloat16 products over the first axes two to five times as slowly as over the last ones, and
        # would fold a transposition into the product but for the barrier.
        source, axis = jax.lax.optimization_barrier(x.mT), x.ndim - 2
    panels = [jax.lax.slice_in_dim(source, s, min(s + height, small), axis=axis) for s in starts]

    def apply(hermitian: list[jax.Array]) -> jax.Array:
        whole = jnp.concatenate(hermitian, axis=-2)
        return _dot(x, whole, -1, -2) if tall else _dot(whole, x, -1, -2)

    a = _hermitian(panels, panels, contract=-2 if axis == x.ndim - 1 else -1)
    if scaling != "frobenius":
        x, a = _scaled(x, a, scaling, tall)
    q: list[jax.Array] = []
    for step, (c0, c1, c2) in enumerate(triples):
        square = _hermitian(a, a)
        p = [c1 * row + c2 * squared for row, squared in zip(a, square, strict=True)]
        if len(triples) == 1:
            return c0 * x + apply(p)
        p = [
            c0 * jnp.eye(row.shape[-2], small, start, dtype=x.dtype) + row
            for start, row in zip(starts, p, strict=True)
        ]
        q = _hermitian(p, q) if q else p
        if step < len(triples) - 1:
            a = _hermitian(_hermitian(a, p), p)
    return apply(q)


def _scaled(
    x: jax.Array, a: list[jax.Array], scaling: str, tall: bool
) -> tuple[jax.Array, list[jax.Array]]:
    """X and its Gram matrix, scaled so that the norm of X is at most one; zeros stay."""
    if scaling == "schatten":
        square = sum(jnp.sum(abs_sq(row), axis=(-2, -1), keepdims=True) for row in a)
        sums = [jnp.broadcast_to(root(square), (*row.shape[:-1], 1)) for row in a]
    else:
        sums = [jnp.sum(up(jnp.abs(row)), axis=-1, keepdims=True) for row in a]
    factors = [(1 / root(jnp.where(s == 0, 1, s))).astype(a[0].real.dtype) for s in sums]
    column = jnp.concatenate(factors, axis=-2)
    scaled = [f * row * column.mT for f, row in zip(factors, a, strict=True)]
    return x * (column.mT if tall else column), scaled


def _hermitian(a: list[jax.Array], b: list[jax.Array], contract: int = -1) -> list[jax.Array]:
    """The product a b^H (`contract` -2: a^H b) of panels, which is known to be Hermitian, in panels of rows.

    Panels of rows of Hermitian matrices that commute, or the panels of one matrix, have such a product.
    """
    upper: dict[tuple[int, int], jax.Array] = {}
    for i, j in itertools.combinations_with_replacement(range(len(a)), 2):
        left, right = (a[i], b[j].conj()) if contract == -1 else (a[i].conj(), b[j])
        upper[i, j] = _dot(left, right, contract, contract)
    return [
        jnp.concatenate(
            [upper[j, i].conj().mT for j in range(i)] + [upper[i, j] for j in range(i, len(a))],
            axis=-1,
        )
        for i in range(len(a))
    ]


def _dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """Product over one axis of each, with leading axes batched.

    `HIGHEST`: by default an accelerator may round float32 factors to fewer digits, for which a Gram
    matrix could not be kept as long as `segments` says. Half-precision factors have a float32 product,
    which is then rounded: so XLA:CPU takes it in the processor's bfloat16 units, twice as fast.
    """
    batch = tuple(range(a.ndim - 2))
    dims = (((a.ndim + contract_a,), (b.ndim + contract_b,)), (batch, batch))
    wide = jnp.promote_types(a.dtype, jnp.float32)
    product = jax.lax.dot_general(
        a, b, dims, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide
    )
    return product.astype(a.dtype)
