"""XLA's semantics element by element, where one torch function does not already have them.

Unsigned integers are held in a wider signed dtype (see `arrays`); `bits` arguments say how many are real.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chainrule.native import _kernel


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1, and NaN for NaN (torch.sign gives 0)."""
    return torch.where(x != x, x, torch.sign(x))  # `isnan` is no operation of vectors in Inductor


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


_Words = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _by_the_kernel(plain: _Words) -> _Words:
    """On the CPU the kernel makes the words, without a hundred calls of torch; an exported file has the plain form."""

    @functools.wraps(plain)
    def words_of(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        words = (k0, k1, x0, x1)
        if _kernel is not None and all(type(x) is Tensor and x.is_cpu for x in words):
            return _threefry_of_the_kernel(words)
        return plain(*words)

    return words_of


@_by_the_kernel
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


def _threefry_of_the_kernel(words: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(*(x.shape for x in words))
    first, second = (torch.empty(shape, dtype=torch.int64, device="cpu") for _ in range(2))
    count = first.numel()
    given = [(x if x.numel() == 1 else x.expand(shape)).contiguous() for x in words]
    steps = [int(x.numel() > 1) for x in given]
    pointers = [x.data_ptr() for x in given]
    _kernel.threefry2x32(pointers, steps, first.data_ptr(), second.data_ptr(), count)
    return first, second


def iota_2x32(
    shape: Sequence[int],
    device: torch.device,
    spans: Sequence[tuple[int, int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The high and low 32-bit words of 0 .. n-1 in the given shape, or in its part within `spans`."""
    spans = [(0, n) for n in shape] if spans is None else spans
    counts = torch.zeros((), dtype=torch.int64, device=device)
    for n, (start, stop) in zip(shape, spans, strict=True):
        counts = n * counts[..., None] + torch.arange(start, stop, device=device)
    return counts >> 32, counts & _WORD
