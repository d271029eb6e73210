"""How far two computations of the same number may be apart: every tolerance of the tests, each from an error bound.

u = eps / 2 is the unit roundoff: 2**-24 in float32, 2**-8 in bfloat16, 2**-11 in float16, 2**-53 in float64. The
bounds hold for every order of summation, with and without fused multiply-add, for every width of vectors and number
of threads, so what passes here passes on another processor. To compare, take the row that says what was computed:

| row                     | relative to                | reason                                                       |
|-------------------------|----------------------------|--------------------------------------------------------------|
| `gamma(n, dtype)`       | the entry                  | n roundings in a row, none of them of a difference of near   |
|                         |                            | numbers: n u / (1 - n u) (Higham 2002, Lemma 3.1)            |
| `ELEMENTWISE`           | the entry                  | `gamma(16)`: a formula of a few products, quotients, roots   |
| `FUNCTION`              | the entry                  | `ELEMENTWISE` and one exp, log, tanh, ...: `UNITS`           |
| `summed(n)`             | the sum of the terms' sizes| n - 1 additions in any order, and 16 roundings for a term    |
| `product(x, y)`         | (per entry, absolute)      | `summed` of the inner dimension, times |x| |y|               |
| `factorised(a)`         | (absolute)                 | 30 n eps norm(a): what LAPACK's own tests admit              |
| `stepped(steps)`        | the largest entry so far   | 12 roundings a step from the gradient to the update          |
| `halved(dtype, steps)`  | the largest entry so far   | a state and an update kept in `dtype`, rounded at every step |
| `compensated(...)`      | (absolute)                 | Kahan's sum: what a step takes of the rest that it keeps     |
| `live(decay)`           | 1 - decay                  | a decay that is itself a float32 number                      |
| `corrected(decay)`      | 1 - decay**t               | ... whose power is subtracted from 1 in float32, as in optax |
| `shrunk(eps, size)`     | the entry                  | an eps in a denominator, which the formula leaves out        |
| `iterated(s, triples)`  | (absolute)                 | Newton-Schulz: rounding errors grow by the polynomial's slope|
| `difference(step)`      | the derivative's scale     | central differences in float64: truncation and cancellation  |
| `sampled(n, deviation)` | (absolute)                 | the mean of n independent draws: six standard errors         |
| `RECORDED`, `RECORDED_*`| movement, see `replay.py`  | what every restatement of the recordings met                 |
| `UNITS[primitive]`      | the entry, in eps          | documented errors of torch's and XLA's functions             |

A tolerance that is no row here needs its own reason in a comment beside it. Both sides of a comparison in float32
round, so n counts the roundings of both.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from scipy import special


def unit(dtype: Any = "float32") -> float:
    """The unit roundoff: half the distance from 1 to the next number."""
    return float(ml_dtypes.finfo(np.dtype(dtype)).eps) / 2


def gamma(n: float, dtype: Any = "float32") -> float:
    """Relative error of n roundings in a row, without cancellation.

    >>> gamma(16) < 1e-6 < gamma(17)
    True
    """
    nu = n * unit(dtype)
    return nu / (1 - nu)


ELEMENTWISE = gamma(16)


def summed(n: int, dtype: Any = "float32") -> float:
    """Error of a sum of n terms of at most 16 roundings each, relative to the sum of their sizes."""
    return gamma(n + 16, dtype)


def product(x: Any, y: Any, dtype: Any = "float32") -> np.ndarray:
    """Largest difference, entry by entry, of two computations of the matrix product x y."""
    x, y = (np.abs(np.asarray(a, np.float64)) for a in (x, y))
    return 2 * gamma(x.shape[-1], dtype) * (x @ y)


def factorised(a: Any, condition: float = 1.0, dtype: Any = "float32") -> float:
    """Largest difference in an entry of singular values, eigenvalues or a product of the factors of `a`.

    LAPACK's tests admit residuals of 30 n eps norm(a). What is less well determined than these (a vector, a
    solution) moves by `condition` times as much: norm(a) over the gap to the next singular value, cond(a).
    """
    a = np.asarray(a, np.float64)
    return 30 * max(a.shape[-2:]) * 2 * unit(dtype) * float(np.linalg.norm(a, 2)) * condition


def solved(a: Any, b: Any, dtype: Any = "float32") -> float:
    """Largest difference in an entry of the solution of a x = b or x a = b, for triangular `a`."""
    inverse = np.linalg.norm(np.linalg.inv(np.asarray(a, np.float64)), 2)
    return factorised(b, float(np.linalg.cond(a) * inverse), dtype)


def stepped(steps: int) -> float:
    """Error of float32 updates after some steps, relative to the largest.

    A step rounds at most 12 times on the way from a gradient to an update: three times for each of two moving
    averages (whose error adds up over the steps), and for corrections, root, quotient, decay and rate.
    """
    return gamma(12 * steps)


def of_adam(rate: float, steps: int) -> float:
    """How far apart Adam of torch and of optax may end, absolute: a step is hardly larger than the rate.

    Their 1 - b2**t and 1 - b1**t differ; as much again for what gradients differ by that follow the parameters.
    """
    return 2 * steps * rate * (stepped(steps) + corrected(0.999) / 2 + corrected(0.9))


def halved(dtype: Any, steps: int = 1) -> float:
    """Error of updates whose gradient, state, parameter and update are rounded to `dtype`, relative to the largest.

    Four roundings a step, of which the state's add up.
    """
    return gamma(4 * steps, dtype)


def compensated(steps: int, size: float, dtype: Any, kept: Any) -> float:
    """How far parameter and `lost` together may be from the exact sum, for parameters below 2.

    A step rounds y and y - (p' - p), which are at most `size` and half a unit in the last place of a parameter larger,
    to float32, and the latter to the dtype in which it is kept.
    """
    lost = 2 * unit(dtype)
    return steps * ((size + lost) * 2 * unit() + lost * unit(kept))


def live(decay: float) -> float:
    """Relative error of 1 - decay, for a decay that is itself a float32 number."""
    return unit() * decay / (1 - decay)


def corrected(decay: float) -> float:
    """Relative error of 1 - decay**t computed as it stands in float32, as optax does: of decay, and of its power."""
    return 3 * live(decay)


def shrunk(eps: float, size: float) -> float:
    """Relative effect of an eps added to a denominator of at least `size`, where the formula leaves it out."""
    return eps / size


def iterated(s: Any, triples: Any, dtype: Any = "float32") -> float:
    """Largest difference in an entry after the steps x -> a x + (b + c x x^T) x x^T x on singular values `s` <= 1.

    A step adds n u max|p| for each of its four products, p its polynomial, and multiplies the error that it finds by
    at most the largest |p'| or |p / s| between the least and the largest singular value.
    """
    s = np.asarray(s, np.float64)
    low, high, error = s.min(), s.max(), s.size * unit(dtype)
    for a, b, c in triples:
        x = np.linspace(low, high, 1001)
        y, slope = a * x + b * x**3 + c * x**5, a + 3 * b * x**2 + 5 * c * x**4
        growth = max(np.abs(slope).max(), np.abs(a + b * x**2 + c * x**4).max())
        error = growth * error + 4 * s.size * unit(dtype) * np.abs(y).max()
        low, high = y.min(), y.max()
    return 2 * float(error)


def iterated_by_gram(s: Any, triples: Any, dtype: Any = "float32") -> float:
    """The same where one Gram matrix A = x x^T serves all steps, and their polynomials p multiply x at the end.

    A knows an eigenvalue t = s^2 to n u, and a step multiplies that error by at most the largest derivative of t p^2;
    p is then wrong by |p'| of it, and so is the product of the p so far.
    """
    s = np.asarray(s, np.float64)
    rounding = s.size * unit(dtype)
    low, high = s.min() ** 2, s.max() ** 2
    of_gram, product, of_product = rounding, 1.0, 0.0
    for a, b, c in triples:
        t = np.linspace(low, high, 1001)
        p, slope, moved = a + b * t + c * t**2, b + 2 * c * t, t * (a + b * t + c * t**2) ** 2
        most = np.abs(p).max()
        of_p = np.abs(slope).max() * of_gram + rounding * np.abs(c * t**2).max()
        of_product = most * of_product + product * (of_p + rounding * most)
        product *= most
        growth = np.abs(p**2 + 2 * t * p * slope).max()
        of_gram = growth * of_gram + 2 * rounding * moved.max()
        low, high = moved.min(), moved.max()
    return 2 * float(of_product + rounding * product) * float(s.max())


def near(expected: Any, relative: float = ELEMENTWISE) -> Any:
    """What `==` holds to within a relative tolerance: numbers, lists and dictionaries of them."""
    return pytest.approx(expected, rel=relative, abs=0.0)


def difference(step: float) -> float:
    """Error of a central difference in float64 of a function of curvature and size about 1."""
    return step**2 + unit("float64") / step


def sampled(n: int, deviation: float) -> float:
    """How far the mean of n independent draws of that standard deviation may be from its expectation."""
    return 6 * deviation / n**0.5


RECORDED = 2.5e-5
# Quotients and products of recorded moments, each of them off by as much: agar, confidence, gates, b1.
RECORDED_STATISTIC = 4 * RECORDED
RECORDED_BF16 = 0.08  # Newton-Schulz in bfloat16: of the movement over a run
RECORDED_BF16_MATRIX = 0.2  # ... of the largest entry of one matrix
RECORDED_BF16_RANK_ONE = (
    0.7  # ... whose other singular values are rounding errors that each step multiplies
)

# A float32 lane of the kernel's sums adds at most 32 entries of a tile; lanes are added in pairs, tiles in float64.
KERNEL_TERMS = 32 + 5

# Denormal results may be flushed to zero.
FLUSHED = float(np.finfo(np.float32).tiny)

# Of eps. XLA's exhaustive tests of its functions admit 20, SLEEF and MKL, which torch calls, state 1 to 4. What is not
# named here is exactly rounded (add, mul, div, sqrt, conversions), so that a case of a few rounds a few times. The
# tests of half precision compute in float32 on both sides and round a few times.
UNITS = dict.fromkeys(
    [
        *(
            "acos",
            "acosh",
            "asin",
            "asinh",
            "atan",
            "atan2",
            "atanh",
            "cbrt",
            "cos",
            "erf",
            "erfc",
            "exp",
            "exp2",
        ),
        *("expm1", "log", "log1p", "logistic", "pow", "rsqrt", "sin", "tan", "tanh"),
    ],
    24,
)
EXACT_UNITS = 4
FUNCTION = gamma(2 * 24)

# Ten steps of a bridge beside JAX, relative to the movement of the parameters and to the size of a state's entries. In
# float32: 24 roundings a step, twelve on either side; a state that estimates a curvature is a difference of near
# things and has lost two digits. In bfloat16 XLA keeps float32 between the operations that it fuses and torch rounds
# after each: up to 12 roundings of an update, whose state forgets them again, and chains that couple parameters carry
# some of this to the float32 leaves of a mixed tree.
MOVEMENT = {"float32": gamma(24 * 10), "bfloat16": gamma(12, "bfloat16")}
STATE = {"float32": 8 * gamma(24 * 10), "bfloat16": gamma(12, "bfloat16")}
MIXED = {"float32": gamma(6, "bfloat16"), "bfloat16": gamma(12, "bfloat16")}


def of_normals() -> dict[str, float]:
    """For torch's comparisons: a few products and sums of normal numbers, none larger than 16."""
    return {"rtol": ELEMENTWISE, "atol": 16 * gamma(4)}


def of_functions(primitives: set[str], want: Any) -> np.ndarray:
    """Largest difference in each entry of what a few of these primitives computed, given one side's result."""
    want = np.asarray(want)
    size = np.abs(want.astype(np.complex128 if np.iscomplexobj(want) else np.float64))
    half = unit(want.dtype) > unit()
    units = (
        EXACT_UNITS
        if half
        else max((UNITS.get(name, EXACT_UNITS) for name in primitives), default=EXACT_UNITS)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        allowed = 2 * unit(want.dtype) * units * size
        if half:
            return allowed
        if primitives & {"sinh", "cosh"}:  # exp(x - log 2): the rounding of x
            allowed = allowed + unit() * size * np.arcsinh(size)
        if (
            "erf_inv" in primitives
        ):  # of w = -log(1 - x^2), of which the square is rounded; x = erf(want)
            rest = special.erfc(size) * (1 + special.erf(size))
            w = np.maximum(-np.log(rest), unit())
            allowed = allowed + 2 * unit() * size * (UNITS["log"] + (1 - rest) / rest / w)
    return allowed


def near_zeros(want: Any) -> np.ndarray:
    """lgamma and digamma are sums of terms of up to 10 that cancel near their zeros."""
    return 2 * unit() * 24 * (10 + np.abs(np.asarray(want, np.float64)))
