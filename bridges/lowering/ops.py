"""XLA's semantics as torch functions, where one torch function does not already have them.

The lowered graph calls these by ``call_function``; make_fx, AOTAutograd and Inductor trace
through them. None synchronises with the host except ``branch`` and ``while_loop``, whose
control flow depends on data.

Unsigned integers are held in a wider signed dtype (see ``convert``); ``mask`` arguments say how
many bits are real.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# ---- elementwise -------------------------------------------------------------------------


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1, and NaN for NaN (torch.sign gives 0)."""
    return torch.where(torch.isnan(x), x, torch.sign(x))


def cbrt(x: Tensor) -> Tensor:
    """Cube root: a power, then one Newton step where it is finite."""
    y = torch.pow(torch.abs(x), 1.0 / 3.0)
    refined = y - (y * y * y - torch.abs(x)) / (3.0 * y * y)
    return torch.copysign(torch.where(torch.isfinite(refined), refined, y), x)


def erf_inv(x: Tensor) -> Tensor:
    """Giles' single-precision polynomial, the one XLA uses; torch's own for float64."""
    if x.dtype == torch.float64:
        return torch.erfinv(x)
    y = x.to(torch.float32)
    w = -torch.log1p(-y * y)
    small = w < 5.0
    w = torch.where(small, w - 2.5, torch.sqrt(w) - 3.0)
    p = torch.where(small, _GILES[0][0], _GILES[0][1])
    for centre, tail in _GILES[1:]:
        p = torch.where(small, centre, tail) + p * w
    return torch.where(torch.abs(y) == 1.0, y * math.inf, p * y).to(x.dtype)


# (|x| small, tail) coefficients, highest power first; M. Giles, "Approximating the erfinv
# function", GPU Computing Gems, 2011, table 1.
_GILES = (
    (2.81022636e-08, -0.000200214257),
    (3.43273939e-07, 0.000100950558),
    (-3.5233877e-06, 0.00134934322),
    (-4.39150654e-06, -0.00367342844),
    (0.00021858087, 0.00573950773),
    (-0.00125372503, -0.0076224613),
    (-0.00417768164, 0.00943887047),
    (0.246640727, 1.00167406),
    (1.50140941, 2.83297682),
)


def round_away(x: Tensor) -> Tensor:
    """Round half away from zero."""
    whole = torch.trunc(x)
    return torch.where(torch.abs(x - whole) >= 0.5, whole + torch.sign(x), whole)


def int_div(x: Tensor, y: Tensor) -> Tensor:
    """Integer division toward zero; -1 by a zero divisor, as XLA defines it."""
    zero = y == 0
    safe = torch.where(zero, torch.ones_like(y), y)
    if x.dtype.is_signed:  # lowest / -1 wraps in XLA; some devices trap on it
        quotient = torch.where(
            safe == -1, -x, torch.div(x, torch.where(safe == -1, 1, safe), rounding_mode="trunc")
        )
    else:
        quotient = torch.div(x, safe, rounding_mode="trunc")
    return torch.where(zero, torch.full_like(quotient, -1), quotient)


def int_rem(x: Tensor, y: Tensor) -> Tensor:
    """Integer remainder with the dividend's sign; the dividend itself by a zero divisor."""
    trivial = (y == 0) | (y == -1) if y.dtype.is_signed else y == 0
    remainder = torch.fmod(x, torch.where(trivial, torch.ones_like(y), y))
    return torch.where(y == 0, x, remainder)


def shift_left(x: Tensor, n: Tensor, bits: int) -> Tensor:
    """x << n, and 0 for n outside 0 .. bits-1."""
    inside = (n >= 0) & (n < bits)
    return torch.where(inside, x << torch.where(inside, n, 0), torch.zeros_like(x))


def shift_right_arithmetic(x: Tensor, n: Tensor, bits: int) -> Tensor:
    """x >> n with the sign bit carried in; n outside 0 .. bits-1 counts as bits-1."""
    inside = (n >= 0) & (n < bits)
    return x >> torch.where(inside, n, bits - 1)


def shift_right_logical(x: Tensor, n: Tensor, bits: int) -> Tensor:
    """x >> n with zeros carried in, and 0 for n outside 0 .. bits-1."""
    inside = (n >= 0) & (n < bits)
    amount = torch.where(inside, n, 0)
    if x.dtype.is_signed:  # clear the copies of the sign bit; n = 0 keeps every bit
        keep = ~((-torch.ones_like(x) << (bits - 1 - amount)) << 1)
        shifted = torch.where(amount == 0, x, (x >> amount) & keep)
    else:
        shifted = x >> amount
    return torch.where(inside, shifted, torch.zeros_like(x))


def population_count(x: Tensor, bits: int) -> Tensor:
    """The number of set bits."""
    count = torch.zeros_like(x)
    for i in range(bits):
        count = count + ((x >> i) & 1)
    return count


def float_to_int(x: Tensor, dtype: torch.dtype, low: int, high: int) -> Tensor:
    """Toward zero, saturating at low and high, 0 for NaN: XLA's conversion."""
    wide = torch.nan_to_num(x.to(torch.float64), nan=0.0)
    if high < 2**53:
        return torch.clamp(wide, float(low), float(high)).to(dtype)
    # 2^63 - 1 is no float64: convert below it and fill in what saturates
    below = torch.clamp(wide, float(low), 2.0**63 - 1024).to(dtype)
    return torch.where(wide >= 2.0**63, high, below)


def reduce_precision(x: Tensor, mantissa_bits: int) -> Tensor:
    """A float32 rounded, half to even, to fewer mantissa bits under float32's exponent."""
    drop = 23 - mantissa_bits
    bits = x.view(torch.int32)
    odd = (bits >> drop) & 1
    rounded = (bits + ((1 << (drop - 1)) - 1) + odd) & ~((1 << drop) - 1)
    return torch.where(torch.isnan(x), x, rounded.view(torch.float32))


def half_precision(x: Tensor) -> Tensor:
    """Rounded to float16's exponent and mantissa, its subnormals flushed to zero."""
    y = x.to(torch.float16).to(x.dtype)
    return torch.where(torch.abs(y) < 2.0**-14, torch.copysign(torch.zeros_like(x), x), y)


# ---- randomness --------------------------------------------------------------------------

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_WORD = 0xFFFF_FFFF


def threefry2x32(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """The 20-round Threefry-2x32 block cipher on uint32 words held in int64.

    J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11.
    """
    keys = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    x0, x1 = (x0 + k0) & _WORD, (x1 + k1) & _WORD
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x0 = (x0 + x1) & _WORD
            x1 = (((x1 << rotation) & _WORD) | (x1 >> (32 - rotation))) ^ x0
        x0 = (x0 + keys[(i + 1) % 3]) & _WORD
        x1 = (x1 + keys[(i + 2) % 3] + (i + 1)) & _WORD
    return x0, x1


def iota_2x32(shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The high and low 32-bit words of 0 .. n-1 in the given shape."""
    counts = torch.arange(math.prod(shape), dtype=torch.int64, device=device).reshape(tuple(shape))
    return counts >> 32, counts & _WORD


# ---- reductions, sorting -----------------------------------------------------------------


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


# ---- indexing ----------------------------------------------------------------------------


def pad(x: Tensor, value: Tensor | float, config: Sequence[tuple[int, int, int]]) -> Tensor:
    """Pad each axis by (low, high, interior) elements of ``value``; negative ones cut."""
    spread = [n + max(n - 1, 0) * inner for n, (_, _, inner) in zip(x.shape, config, strict=True)]
    sizes = [n + max(lo, 0) + max(hi, 0) for n, (lo, hi, _) in zip(spread, config, strict=True)]
    fill = value.to(x.dtype) if isinstance(value, Tensor) else value
    out = torch.zeros(sizes, dtype=x.dtype, device=x.device) + fill
    if x.numel():
        inside = tuple(
            slice(max(lo, 0), max(lo, 0) + n, inner + 1)
            for n, (lo, _, inner) in zip(spread, config, strict=True)
        )
        out[inside] = x
    cut = tuple(
        slice(max(-lo, 0), n - max(-hi, 0)) for n, (lo, hi, _) in zip(sizes, config, strict=True)
    )
    return out[cut].to(x.dtype)


def first(x: Tensor) -> Tensor:
    """The first element, in as many dimensions; also of a tensor that is given flat."""
    return x[(slice(0, 1),) * x.ndim]


def unbind(x: Tensor) -> tuple[Tensor, ...]:
    """The entries of a copy of a vector."""
    return x.clone().unbind()


def _clamped(start: Tensor | int, high: int) -> Tensor | int:
    if isinstance(start, Tensor):
        return torch.clamp(start.to(torch.int64), 0, high)
    return min(max(start, 0), high)


def _window(
    shape: Sequence[int], starts: Sequence[Tensor | int], sizes: Sequence[int], device: torch.device
) -> tuple[Tensor, ...]:
    """Index tensors of the window of ``sizes`` at ``starts``, pushed inside ``shape``."""
    index = []
    for d, (n, start, size) in enumerate(zip(shape, starts, sizes, strict=True)):
        along = torch.arange(size, device=device) + _clamped(start, n - size)
        index.append(along.reshape([-1 if e == d else 1 for e in range(len(shape))]))
    return tuple(index)


def dynamic_slice(x: Tensor, starts: Sequence[Tensor | int], sizes: Sequence[int]) -> Tensor:
    """The window of ``sizes`` at ``starts``, moved inside ``x`` where it sticks out."""
    for d, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if size == x.shape[d]:
            continue
        at = _clamped(start, x.shape[d] - size)
        if isinstance(at, Tensor):
            x = torch.index_select(x, d, torch.arange(size, device=x.device) + at)
        else:
            x = x.narrow(d, at, size)
    return x


def dynamic_update_slice(x: Tensor, update: Tensor, starts: Sequence[Tensor | int]) -> Tensor:
    """``x`` with ``update`` written at ``starts``, moved inside where it sticks out."""
    if x.ndim == 0:
        return update
    index = _window(x.shape, starts, update.shape, x.device)
    return torch.index_put(x, index, update)


def _addresses(
    shape: Sequence[int],
    indices: Tensor,
    window: Sequence[int],
    index_map: Sequence[int],
    batching: Sequence[tuple[int, int]],
    collapsed: Sequence[int],
    clip: bool,
) -> tuple[Tensor, Tensor]:
    """Flat addresses of every window element, batch axes first, and which windows fit.

    ``batching`` pairs an operand axis with the axis of ``indices`` that walks along it.
    """
    batch = indices.shape[:-1]
    axes = [d for d in range(len(shape)) if d not in collapsed]
    starts: dict[int, Tensor] = {d: indices[..., i].long() for i, d in enumerate(index_map)}
    for operand_axis, index_axis in batching:
        walk = torch.arange(batch[index_axis], device=indices.device)
        starts[operand_axis] = walk.reshape(
            [-1 if i == index_axis else 1 for i in range(len(batch))]
        )
    fits = torch.ones(batch, dtype=torch.bool, device=indices.device)
    flat = torch.zeros(batch, dtype=torch.int64, device=indices.device)
    flat = flat.reshape([*batch, *[1] * len(axes)])
    stride = 1
    for d in reversed(range(len(shape))):
        start = starts.get(d)
        if start is not None:
            last = shape[d] - window[d]
            if not clip:
                fits = fits & (start >= 0) & (start <= last)
            start = torch.clamp(start, 0, last)
            flat = flat + (start * stride).reshape([*start.shape, *[1] * len(axes)])
        if d in axes:
            along = torch.arange(window[d], device=indices.device) * stride
            flat = flat + along.reshape([-1 if a == d else 1 for a in axes])
        stride *= shape[d]
    return flat, fits.reshape([*batch, *[1] * len(axes)])


def gather(
    x: Tensor,
    indices: Tensor,
    window: Sequence[int],
    offset_dims: Sequence[int],
    collapsed: Sequence[int],
    index_map: Sequence[int],
    batching: Sequence[tuple[int, int]],
    clip: bool,
    fill: float | int | bool,
) -> Tensor:
    """XLA's gather; windows that stick out are moved inside, or read ``fill``."""
    flat, fits = _addresses(x.shape, indices, window, index_map, batching, collapsed, clip)
    values = torch.take(x, flat) if x.numel() else x.new_full(flat.shape, fill)
    if not clip:
        values = torch.where(fits, values, torch.full_like(values, fill))
    batch = iter(range(indices.ndim - 1))
    offset = iter(range(indices.ndim - 1, values.ndim))
    order = [next(offset) if d in offset_dims else next(batch) for d in range(values.ndim)]
    return values.permute(order)


def scatter(
    x: Tensor,
    indices: Tensor,
    updates: Tensor,
    reduce: str,
    window_dims: Sequence[int],
    inserted: Sequence[int],
    index_map: Sequence[int],
    batching: Sequence[tuple[int, int]],
    clip: bool,
) -> Tensor:
    """XLA's scatter (``reduce`` in set, sum, prod, amin, amax); windows that stick out are dropped."""
    batch_dims = [d for d in range(updates.ndim) if d not in window_dims]
    sizes = iter(updates.shape[d] for d in window_dims)
    window = [1 if d in inserted else next(sizes) for d in range(x.ndim)]
    flat, fits = _addresses(x.shape, indices, window, index_map, batching, inserted, clip)
    values = updates.permute([*batch_dims, *window_dims])
    # One spare element at the end takes what is dropped.
    address = torch.where(fits, flat, x.numel()).expand(values.shape).reshape(-1)
    buffer = torch.cat([x.reshape(-1), x.new_zeros(1)])
    if reduce == "set":
        buffer = torch.scatter(buffer, 0, address, values.reshape(-1))
    elif reduce == "sum":
        buffer = torch.index_add(buffer, 0, address, values.reshape(-1))
    else:
        buffer = torch.scatter_reduce(buffer, 0, address, values.reshape(-1), reduce)
    return buffer[:-1].reshape(x.shape)


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


def svd(a: Tensor, full: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values, left vectors, right vectors transposed; NaN where ``a`` is not finite."""
    finite = torch.isfinite(a).all()
    u, s, vt = torch.linalg.svd(torch.where(finite, a, 0.0), full_matrices=full)
    s, u, vt = (torch.where(finite, x, math.nan) for x in (s, u, vt))
    return s, u, vt


def singular_values(a: Tensor) -> Tensor:
    """Singular values, largest first; NaN where ``a`` is not finite."""
    finite = torch.isfinite(a).all()
    return torch.where(finite, torch.linalg.svdvals(torch.where(finite, a, 0.0)), math.nan)


def eigh(a: Tensor, lower: bool) -> tuple[Tensor, Tensor]:
    """Eigenvectors and ascending eigenvalues; NaN where ``a`` is not finite."""
    finite = torch.isfinite(a).all()
    w, v = torch.linalg.eigh(torch.where(finite, a, 0.0), UPLO="L" if lower else "U")
    return torch.where(finite, v, math.nan), torch.where(finite, w, math.nan)


# ---- control flow ------------------------------------------------------------------------


def branch(
    index: Tensor, branches: Sequence[Callable[..., tuple[Tensor, ...]]], operands: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Run one of ``branches``; reads ``index`` on the host."""
    chosen = min(max(int(index), 0), len(branches) - 1)
    return branches[chosen](*operands)


def while_loop(
    condition: Callable[..., tuple[Tensor, ...]],
    body: Callable[..., tuple[Tensor, ...]],
    condition_constants: Sequence[Tensor],
    body_constants: Sequence[Tensor],
    carry: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Iterate ``body`` while ``condition``; reads the predicate on the host each time."""
    carry = tuple(carry)
    while bool(condition(*condition_constants, *carry)[0]):
        carry = body(*body_constants, *carry)
    return carry


def scan(
    body: Callable[..., tuple[Tensor, ...]],
    constants: Sequence[Tensor],
    carry: Sequence[Tensor],
    xs: Sequence[Tensor],
    length: int,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Iterate ``body`` over the leading axis of ``xs``; final carry, then stacked outputs."""
    carry = tuple(carry)
    stacked: list[tuple[Tensor, ...]] = []
    for i in reversed(range(length)) if reverse else range(length):
        out = body(*constants, *carry, *(x[i] for x in xs))
        carry = out[: len(carry)]
        stacked.append(out[len(carry) :])
    if reverse:
        stacked.reverse()
    return (*carry, *(torch.stack(y) for y in zip(*stacked, strict=True)))
