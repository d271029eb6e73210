r"""Orthogonalises matrices: a quintic polynomial, applied a few times, brings singular values near one.

    X_0 = G / (|G|_F + eps)
    A_k = X_k X_k^H,   P_k = a I + b A_k + c A_k^2,   X_{k+1} = P_k X_k
    u   = s(rows, cols) X_steps

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, and its
repository. Departure: the same iterates are also reached on the small Gram matrix, A_{k+1} = P_k A_k P_k
and X_{k+j} = (P_{k+j-1} ... P_k) X_k. All its matrices are polynomials in A_k, so their products are
Hermitian, and only the upper blocks are computed. A_k knows small singular values less well than X_k
does (its rounding error grows by the square of the steps' slopes a), so X is formed anew in time.
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import check_bounds, check_choice, check_params
from chainrule.transforms._numerics import abs_sq, up
from chainrule.transforms._trees import path_name

Triple = tuple[float, float, float]
Axes = tuple[Sequence[int], Sequence[int]]

COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    # The largest slope at zero for which singular values end in about [0.7, 1.2] (Jordan et al.).
    "keller_jordan": ((3.4445, -4.7750, 2.0315),),
    # Tuned step by step, from a steep slope to a flat one (Ahn et al., "Dion", 2025; also in optax).
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Converges to exactly one, from a slope of 1.875 (Higham, "Functions of Matrices", 2008, section 8.3).
    "classical": ((15 / 8, -10 / 8, 3 / 8),),
}
"""Named coefficients (a, b, c), one triple a step; the last one is repeated."""

_MAX_ERROR = 2.0**-12  # of a singular value, that a Gram matrix kept over several steps may cost
_PANELS = 3  # of rows, of which products compute those blocks on and above the diagonal
_SMALL = 384  # up to this side the products cost less than what surrounds them


def newton_schulz(
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] = "keller_jordan",
    steps: int = 5,
    eps: jax.typing.ArrayLike = 1e-7,
    *,
    eps_scope: str = "added",
    scale: str | None = "spectral",
    scale_factor: jax.typing.ArrayLike = 1.0,
    scale_axes: tuple[int, int] | str = "in_out",
    dims: str | Axes | Callable[[str, tuple[int, ...]], str | Axes] = "batched",
    dtype: Any = None,
    gram: bool | str = "auto",
) -> optax.GradientTransformation:
    r"""Replaces each matrix by a nearby one with orthonormal rows or columns, times a factor of its shape.

    $$X_{k+1} = a X_k + b (X_k X_k^H) X_k + c (X_k X_k^H)^2 X_k, \quad X_0 = G / (\|G\|_F + \epsilon)$$

    A zero matrix stays zero. A NaN or infinite entry makes its whole matrix NaN: put `zero_nonfinite`
    before it if gradients may hold any. Complex matrices work, with the conjugate transpose.

    Args:
      coefficients: a name in `COEFFICIENTS` (`"keller_jordan"`, `"dion"`, `"classical"`), a triple
        (a, b, c), or one triple a step, the last of which is repeated.
      steps: number of steps, an integer in [1, 100).
      eps: keeps the division by the norm finite, at least 0.
      eps_scope: `"added"`, divide by |G| + eps; `"clamped"`, by max(|G|, eps) (torch.optim.Muon).
      scale: s of the shape: `"spectral"`, sqrt(max(1, out / in)) (Jordan et al.); `"rms"`,
        sqrt(max(out, in)), which with `scale_factor=0.2` gives updates the RMS of AdamW's (Liu et al.);
        `None`, 1.
      scale_factor: multiplies s, positive (KerasOptimizers at 00a4bde: 0.2).
      scale_axes: what `out` and `in` are: `"in_out"`, the matrix's columns and rows (kernels of Flax
        and Keras; optax.contrib.muon); `"out_in"`, its rows and columns (torch.nn.Linear;
        torch.optim.Muon); or two axes (out, in) of the leaf as it is, before `dims`: (-2, -1) is
        KerasOptimizers.
      dims: how a leaf of more than two axes is read: `"batched"`, matrices in the last two axes, each
        by itself; `"hwio"`, one matrix (all axes but the last, last), so that an HWIO kernel is
        (kh kw in, out); `"oihw"`, one matrix (first axis, all the others), so that an OIHW kernel is
        (out, in kh kw) (KerasOptimizers does this to HWIO kernels); a pair of sequences of axes
        (rows, columns), the others batched; or a function from the leaf's slash-joined path and shape
        to one of these.
      dtype: dtype of the iteration, default the update's but float32 at least. Complex leaves stay
        complex64 at least.
      gram: `False`, form X in every step; `True`, keep the Gram matrix over all steps, which loses
        small singular values; `"auto"`, the cheapest sequence of steps that loses none.

    Returns:
      A `optax.GradientTransformation`.

    Raises:
      ValueError: an argument outside its range; a leaf of fewer than two axes; axes that a leaf does not have.
      TypeError: a leaf that is not floating point or complex.

    >>> tx = newton_schulz(steps=10, coefficients="classical")
    >>> g = jnp.array([[3.0, 0.0], [0.0, -0.5]])
    >>> print(tx.update(g, tx.init(g))[0].round(3))
    [[ 1.  0.]
     [ 0. -1.]]

    References:
      Jordan et al., https://kellerjordan.github.io/posts/muon/
      Liu et al., "Muon is Scalable for LLM Training", https://arxiv.org/abs/2502.16982
    """
    check_bounds("newton_schulz", steps=steps, eps=eps, scale_factor=scale_factor)
    check_choice("newton_schulz", "eps_scope", eps_scope, ("added", "clamped"))
    check_choice("newton_schulz", "scale", scale, ("spectral", "rms", None))
    check_choice("newton_schulz", "gram", gram, (False, True, "auto"))
    if isinstance(scale_axes, str):
        check_choice("newton_schulz", "scale_axes", scale_axes, ("in_out", "out_in"))
    if isinstance(dims, str):
        check_choice("newton_schulz", "dims", dims, ("batched", "hwio", "oihw"))
    triples = _triples(coefficients, operator.index(steps))

    def shape_factor(shape, rows, cols):
        if scale is None:
            return 1.0
        if isinstance(scale_axes, str):
            out, in_ = (rows, cols) if scale_axes == "out_in" else (cols, rows)
        else:
            out, in_ = (shape[axis] for axis in scale_axes)
        return math.sqrt(max(1.0, out / max(in_, 1)) if scale == "spectral" else max(out, in_))

    def orthogonalized(path, g):
        rows_axes, cols_axes = _matrix_axes(path_name(path), g.shape, dims)
        order = [i for i in range(g.ndim) if i not in (*rows_axes, *cols_axes)]
        batch = [g.shape[i] for i in order]
        order += [*rows_axes, *cols_axes]
        rows, cols = (math.prod(g.shape[i] for i in axes) for axes in (rows_axes, cols_axes))
        x = up(g).transpose(order).reshape(*batch, rows, cols)
        norm = jnp.sqrt(jnp.sum(abs_sq(x), axis=(-2, -1), keepdims=True))
        divisor = norm + eps if eps_scope == "added" else jnp.maximum(norm, eps)
        x = x / jnp.where(norm == 0, 1, divisor)
        if dtype is not None:
            kind = jnp.complex64 if jnp.iscomplexobj(x) else dtype
            x = x.astype(jnp.promote_types(dtype, kind))
        x = _iterate(x, triples, gram)
        x = up(x).reshape([g.shape[i] for i in order])
        x = x.transpose([order.index(i) for i in range(g.ndim)])
        return (x * (shape_factor(g.shape, rows, cols) * scale_factor)).astype(g.dtype)

    def init(params):
        check_params("newton_schulz", params)
        jax.tree_util.tree_map_with_path(
            lambda path, p: _matrix_axes(path_name(path), jnp.shape(p), dims), params
        )
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params
        check_params("newton_schulz", updates)
        return jax.tree_util.tree_map_with_path(orthogonalized, updates), state

    return optax.GradientTransformation(init, update)


def _triples(coefficients: Any, steps: int) -> list[Triple]:
    """The coefficients of each step."""
    if isinstance(coefficients, str):
        check_choice("newton_schulz", "coefficients", coefficients, tuple(COEFFICIENTS))
        coefficients = COEFFICIENTS[coefficients]
    nested = list(coefficients)
    if nested and not isinstance(nested[0], (list, tuple)):
        nested = [nested]
    if not nested or any(len(triple) != 3 for triple in nested):
        raise ValueError(
            "newton_schulz: `coefficients` must be a name, three numbers or a sequence of three "
            f"numbers a step, got {coefficients!r}"
        )
    return [nested[min(step, len(nested) - 1)] for step in range(steps)]


def _matrix_axes(name: str, shape: tuple[int, ...], dims: Any) -> tuple[list[int], list[int]]:
    """The axes of a leaf that are the rows and the columns of its matrices; the others are batched."""
    ndim = len(shape)
    if ndim < 2:
        raise ValueError(
            f"newton_schulz: {name!r} has shape {shape}, expected at least the two axes of a matrix; "
            "send vectors and scalars elsewhere, as `chains.muon`, `optax.partition` or `optax.masked` do"
        )
    if callable(dims):
        dims = dims(name, shape)
    if isinstance(dims, str):
        check_choice("newton_schulz", "dims", dims, ("batched", "hwio", "oihw"))
        axes = list(range(ndim))
        return {
            "batched": (axes[-2:-1], axes[-1:]),
            "hwio": (axes[:-1], axes[-1:]),
            "oihw": (axes[:1], axes[1:]),
        }[dims]
    rows, cols = ([operator.index(axis) for axis in group] for group in dims)
    both = [axis % ndim for axis in (*rows, *cols) if -ndim <= axis < ndim]
    if len(set(both)) != len(rows) + len(cols) or not rows or not cols:
        raise ValueError(
            f"newton_schulz: `dims` must name different axes of {name!r}, of shape {shape}, for rows "
            f"and columns, got {dims!r}"
        )
    return both[: len(rows)], both[len(rows) :]


def _iterate(x: jax.Array, triples: list[Triple], gram: bool | str) -> jax.Array:
    """All steps on matrices (..., rows, cols), in segments that keep one Gram matrix each."""
    if x.size == 0:
        return x
    small, large = sorted(x.shape[-2:])
    done = 0
    for length in _segments(small, large, triples, float(jnp.finfo(x.dtype).eps), gram):
        x = _segment(x, triples[done : done + length])
        done += length
    return x


def _segments(
    small: int, large: int, triples: list[Triple], eps: float, gram: bool | str
) -> tuple[int, ...]:
    """How many steps each Gram matrix serves, for the fewest floating-point operations.

    >>> kj = list(COEFFICIENTS["keller_jordan"]) * 5
    >>> _segments(768, 768, kj, 2**-23, "auto"), _segments(768, 3072, kj, 2**-23, "auto")
    ((1, 1, 1, 1, 1), (3, 2))
    """
    steps = len(triples)
    if gram != "auto" or small <= _SMALL:
        return (steps,) if gram is True else (1,) * steps
    half = (_PANELS + 1) / (2 * _PANELS)  # the part of a Hermitian product that is computed
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for end in range(1, steps + 1):
        options = []
        for start in reversed(range(end)):
            length = end - start
            slope = math.prod(abs(a) for a, _, _ in triples[start:end])
            if length == 1 or slope**2 * eps <= _MAX_ERROR:
                # A Gram matrix, the products of its steps and one with X, in units of small^2.
                cost = half * large + half * small * (4 * length - 3) + large
                options.append((best[start][0] + cost, (*best[start][1], length)))
        best.append(min(options, key=operator.itemgetter(0)))
    return best[steps][1]


def _segment(x: jax.Array, triples: list[Triple]) -> jax.Array:
    """Several steps by way of the Gram matrix of the smaller side, held in panels of rows."""
    tall = x.shape[-2] > x.shape[-1]
    small = x.shape[-1] if tall else x.shape[-2]
    # Multiples of 64, which suit matrix units and vector registers.
    height = -(-small // (64 * _PANELS)) * 64 if small > _SMALL else small
    starts = list(range(0, small, height))
    axis = x.ndim - 1 if tall else x.ndim - 2
    panels = [jax.lax.slice_in_dim(x, s, min(s + height, small), axis=axis) for s in starts]
    a = _hermitian(panels, panels, contract=-2 if tall else -1)
    q: list[jax.Array] = []
    for step, (c0, c1, c2) in enumerate(triples):
        square = _hermitian(a, a)
        p = [
            c0 * jnp.eye(row.shape[-2], small, start, dtype=x.dtype) + c1 * row + c2 * squared
            for start, row, squared in zip(starts, a, square, strict=True)
        ]
        q = _hermitian(p, q) if q else p
        if step < len(triples) - 1:
            a = _hermitian(_hermitian(a, p), p)
    whole = jnp.concatenate(q, axis=-2)
    return _dot(x, whole, -1, -2) if tall else _dot(whole, x, -1, -2)


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
    matrix could not be kept as long as `_segments` says.
    """
    batch = tuple(range(a.ndim - 2))
    dims = (((a.ndim + contract_a,), (b.ndim + contract_b,)), (batch, batch))
    return jax.lax.dot_general(a, b, dims, precision=jax.lax.Precision.HIGHEST)
