"""XLA's reductions, running sums, sorting, products and factorisations."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def reduce_prod(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Product over several axes, in x's own dtype."""
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, dtype=x.dtype)
    return x


def reduce_xor(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Parity of a bool tensor over axes."""
    return torch.sum(x, tuple(axes), dtype=torch.int64) % 2 == 1


def _cumulative(
    function: Callable[[Tensor], Tensor], x: Tensor, axis: int, reverse: bool
) -> Tensor:
    if x.shape[axis] == 0:
        return torch.clone(x)
    y = function(torch.flip(x, (axis,)) if reverse else x)
    return torch.flip(y, (axis,)) if reverse else y


def cumsum(x: Tensor, axis: int, reverse: bool) -> Tensor:
    """Running sum in x's own dtype, from the end when ``reverse``."""
    return _cumulative(lambda y: torch.cumsum(y, axis, dtype=y.dtype), x, axis, reverse)


def cumprod(x: Tensor, axis: int, reverse: bool) -> Tensor:
    """Running product in x's own dtype, from the end when ``reverse``."""
    return _cumulative(lambda y: torch.cumprod(y, axis, dtype=y.dtype), x, axis, reverse)


def cummax(x: Tensor, axis: int, reverse: bool) -> Tensor:
    """Running maximum, from the end when ``reverse``."""
    return _cumulative(lambda y: torch.cummax(y, axis).values, x, axis, reverse)


def cummin(x: Tensor, axis: int, reverse: bool) -> Tensor:
    """Running minimum, from the end when ``reverse``."""
    return _cumulative(lambda y: torch.cummin(y, axis).values, x, axis, reverse)


def cumlogsumexp(x: Tensor, axis: int, reverse: bool) -> Tensor:
    """Running log of a sum of exponentials, from the end when ``reverse``."""
    return _cumulative(lambda y: torch.logcumsumexp(y, axis), x, axis, reverse)


def sort(operands: Sequence[Tensor], axis: int, num_keys: int) -> tuple[Tensor, ...]:
    """Sort all operands stably by the first ``num_keys`` of them, lexicographically."""
    operands = tuple(operands)
    for key in reversed(range(num_keys)):
        order = torch.sort(operands[key], dim=axis, stable=True).indices
        operands = tuple(torch.gather(x, axis, order) for x in operands)
    return operands


def top_k(x: Tensor, k: int, axis: int, index_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The k largest along an axis; among equals the lower index comes first."""
    values, order = torch.sort(x, dim=axis, stable=True, descending=True)
    return values.narrow(axis, 0, k), order.narrow(axis, 0, k).to(index_dtype)


# ---- linear algebra ----------------------------------------------------------------------


def dot_general(
    x: Tensor,
    y: Tensor,
    contract: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    dtype: torch.dtype,
) -> Tensor:
    """Contract and batch the given axes; the result's axes are batch, x's rest, y's rest."""
    x, y = x.to(dtype), y.to(dtype)
    x_rest = [d for d in range(x.ndim) if d not in contract[0] and d not in batch[0]]
    y_rest = [d for d in range(y.ndim) if d not in contract[1] and d not in batch[1]]
    shape = [x.shape[d] for d in (*batch[0], *x_rest)] + [y.shape[d] for d in y_rest]
    b = math.prod(x.shape[d] for d in batch[0])
    k = math.prod(x.shape[d] for d in contract[0])
    x = x.permute([*batch[0], *x_rest, *contract[0]]).reshape(b, -1 if k and b else 0, k)
    y = y.permute([*batch[1], *contract[1], *y_rest]).reshape(b, k, -1 if k and b else 0)
    if not (k and b):
        return torch.zeros(shape, dtype=dtype, device=x.device)
    if b == 1 and not batch[0]:
        return torch.mm(x[0], y[0]).reshape(shape)
    return torch.bmm(x, y).reshape(shape)


def wide_mm(x: Tensor, y: Tensor, narrow: torch.dtype, wide: torch.dtype) -> Tensor:
    """The product of matrices of dtype ``narrow`` in dtype ``wide``."""
    del narrow  # `simplify` reads it
    return torch.mm(x.to(wide), y.to(wide))


def triangular_solve(
    a: Tensor, b: Tensor, left: bool, lower: bool, transpose: bool, conjugate: bool, unit: bool
) -> Tensor:
    """Solve op(a) x = b, or x op(a) = b when not ``left``."""
    if transpose:
        a, lower = a.mT, not lower
    if conjugate:
        a = a.conj()
    return torch.linalg.solve_triangular(a, b, upper=not lower, left=left, unitriangular=unit)


def cholesky(a: Tensor) -> Tensor:
    """Lower Cholesky factor; all NaN where the matrix is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(a)
    return torch.where((info == 0)[..., None, None], factor, math.nan)


def _finite(a: Tensor) -> Tensor:
    """Whether all entries of each matrix are finite, with axes of one for those of the matrix."""
    return torch.isfinite(a).all(-1, keepdim=True).all(-2, keepdim=True)


def svd(a: Tensor, full: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values, left vectors, right vectors transposed; NaN for a matrix that is not finite."""
    finite = _finite(a)
    u, s, vt = torch.linalg.svd(torch.where(finite, a, 0.0), full_matrices=full)
    u, vt = (torch.where(finite, x, math.nan) for x in (u, vt))
    return torch.where(finite[..., 0], s, math.nan), u, vt


def singular_values(a: Tensor) -> Tensor:
    """Singular values, largest first; NaN for a matrix that is not finite."""
    finite = _finite(a)
    found = torch.linalg.svdvals(torch.where(finite, a, 0.0))
    return torch.where(finite[..., 0], found, math.nan)


def eigh(a: Tensor, lower: bool) -> tuple[Tensor, Tensor]:
    """Eigenvectors and ascending eigenvalues; NaN for a matrix that is not finite."""
    finite = _finite(a)
    w, v = torch.linalg.eigh(torch.where(finite, a, 0.0), UPLO="L" if lower else "U")
    return torch.where(finite, v, math.nan), torch.where(finite[..., 0], w, math.nan)
