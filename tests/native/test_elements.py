"""Programs of elements: each operation against NumPy's float32, which rounds as often."""

import itertools

import numpy as np
import pytest

import bounds
from chainrule.native import _kernel

pytestmark = pytest.mark.skipif(_kernel is None, reason="needs the compiled kernel")

AWKWARD = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 3e38, -1.5, 0.7], np.float32)
TENSOR, ROOM, NUMBER, SUM = range(4)
f32 = np.float32
NO_SUMS = np.zeros(0, f32)


def mask(truths):
    return np.where(truths, np.uint32(0xFFFFFFFF), np.uint32(0)).view(f32)


def truth(x):
    return x.view(np.uint32) != 0


def lerp(x, y, w):
    return np.where(np.abs(w) < f32(0.5), x + w * (y - x), y + (w - f32(1)) * (y - x))


FORMULAS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "add_scaled": lambda x, y, k: x + k * y,
    "addcmul": lambda x, a, b, k: x + k * a * b,
    "addcdiv": lambda x, a, b, k: x + k * a / b,
    "lerp": lerp,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "neg": np.negative,
    "abs": np.abs,
    "square": np.square,
    "reciprocal": lambda x: f32(1) / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: f32(1) / np.sqrt(x),
    "sign": np.sign,
    "isfinite": lambda x: mask(np.isfinite(x)),
    "finite_or_zero": lambda x: np.where(np.isfinite(x), x, f32(0)),
    "clone": np.copy,
    "where": lambda c, x, y: np.where(truth(c), x, y),
    "lt": lambda x, y: mask(x < y),
    "le": lambda x, y: mask(x <= y),
    "gt": lambda x, y: mask(x > y),
    "ge": lambda x, y: mask(x >= y),
    "eq": lambda x, y: mask(x == y),
    "ne": lambda x, y: mask(x != y),
    "bitwise_and": lambda x, y: mask(truth(x) & truth(y)),
    "bitwise_or": lambda x, y: mask(truth(x) | truth(y)),
    "bitwise_xor": lambda x, y: mask(truth(x) ^ truth(y)),
    "bitwise_not": lambda x: mask(~truth(x)),
}
OF_TRUTHS = {"bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"}


def run(steps, rows, tensors, words=(0,), threads=1, sums=NO_SUMS):
    program = _kernel.ElementProgram(steps, rows, np.array(words, np.uint32), len(tensors), sums)
    program.run([x.ctypes.data for x in tensors], threads)


def operands_of(name, count, size):
    """Every awkward value beside every other, then normals."""
    rng = np.random.default_rng(size)
    pairs = np.array(list(itertools.product(AWKWARD, AWKWARD)), f32)
    xs = [rng.normal(size=size).astype(f32) for _ in range(count)]
    for k, x in enumerate(xs):
        n = min(size, len(pairs))
        x[:n] = np.roll(pairs[:n, k % 2], k // 2)
    truths = range(count) if name in OF_TRUTHS else range(1) if name == "where" else ()
    for k in truths:
        xs[k] = mask(rng.integers(0, 2, size) > 0)
    return xs


def bits(x):
    """All NaN are alike, unless they are truth values."""
    return np.where(np.isnan(x) & (x.view(np.uint32) != 0xFFFFFFFF), f32(np.nan), x).view(np.uint32)


def test_every_operation_has_a_formula():
    assert set(_kernel.element_ops()) == set(FORMULAS)


@pytest.mark.parametrize("size", [1, 31, 700])
@pytest.mark.parametrize("name", FORMULAS)
def test_operations(name, size):
    count = FORMULAS[name].__code__.co_argcount if hasattr(FORMULAS[name], "__code__") else None
    count = count or getattr(FORMULAS[name], "nin", 1)
    xs = operands_of(name, count, size)
    with np.errstate(all="ignore"):
        expected = FORMULAS[name](*xs).astype(f32)
    out = np.full(size, 7, f32)
    places = [(TENSOR, k) for k in range(count)]
    run([(name, (TENSOR, count), places)], [(size, list(range(count + 1)), [])], [*xs, out])
    if name in ("maximum", "minimum"):  # which of two zeros is not said
        out, expected = out + f32(0), expected + f32(0)
    np.testing.assert_array_equal(bits(out), bits(expected))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_program_over_leaves_of_all_sizes(threads):
    """p - rate (m / (sqrt(v) + eps)) in place, with a rate for each leaf, and nothing written beside it."""
    rng = np.random.default_rng(0)
    sizes = [0, 1, 16, 17, 511, 513, 70_001, 200_000]
    rates = np.linspace(0.1, 0.9, len(sizes)).astype(f32)
    words = np.append(rates, f32(1e-3)).view(np.uint32)
    steps = [
        ("sqrt", (ROOM, 0), [(TENSOR, 2)]),
        ("add", (ROOM, 0), [(ROOM, 0), (NUMBER, 1)]),
        ("div", (ROOM, 1), [(TENSOR, 1), (ROOM, 0)]),
        ("mul", (ROOM, 1), [(ROOM, 1), (NUMBER, 0)]),
        ("sub", (TENSOR, 0), [(TENSOR, 0), (ROOM, 1)]),
    ]
    leaves = [[rng.uniform(1, 2, size + 1).astype(f32) for _ in range(3)] for size in sizes]
    before = [[x.copy() for x in leaf] for leaf in leaves]
    rows = [(n, [3 * i, 3 * i + 1, 3 * i + 2], [i, len(sizes)]) for i, n in enumerate(sizes)]
    run(steps, rows, [x for leaf in leaves for x in leaf], words, threads)
    for size, rate, (p, m, v), (old, m0, v0) in zip(sizes, rates, leaves, before, strict=True):
        expected = old - m0 / (np.sqrt(v0) + f32(1e-3)) * rate
        np.testing.assert_array_equal(p[:size], expected[:size])
        assert p[size] == old[size]
        np.testing.assert_array_equal((m, v), (m0, v0))


@pytest.mark.parametrize("threads", [1, 3])
def test_sums_of_what_a_program_computes(threads):
    """The sums of x y and of x == x, which is also true of what fills a tile; x becomes x y."""
    rng = np.random.default_rng(0)
    sizes = [0, 1, 15, 16, 511, 513, 65_536, 65_537, 200_000]
    leaves = [[rng.normal(size=n).astype(f32) for _ in range(2)] for n in sizes]
    products = [np.multiply(x, y, dtype=np.float64) for x, y in leaves]
    steps = [
        ("eq", (ROOM, 0), [(TENSOR, 0), (TENSOR, 0)]),
        ("bitwise_and", (ROOM, 0), [(ROOM, 0), (NUMBER, 0)]),
        ("sum", (SUM, 1), [(ROOM, 0)]),
        ("mul", (TENSOR, 0), [(TENSOR, 0), (TENSOR, 1)]),
        ("sum", (SUM, 0), [(TENSOR, 0)]),
    ]
    rows = [(n, [2 * i, 2 * i + 1], [0]) for i, n in enumerate(sizes)]
    words, sums = np.array([1.0], f32).view(np.uint32), np.full((len(sizes), 2), np.nan, f32)
    run(steps, rows, [x for leaf in leaves for x in leaf], words, threads, sums.reshape(-1))
    assert sums[:, 1].tolist() == sizes
    for found, wanted in zip(sums[:, 0], products, strict=True):
        error = bounds.summed(wanted.size) * np.abs(wanted).sum()
        assert abs(found - wanted.sum()) <= error
    alone = np.empty(1, f32)
    again = [np.multiply(*leaf) for leaf in ([y / y, x] for x, y in leaves[-1:])]
    run([("sum", (SUM, 0), [(TENSOR, 0)])], [(sizes[-1], [0], [])], again, (0,), 2, alone)
    assert alone[0] == sums[-1, 0]  # however many threads there are, and leaves beside it


STEP = ("neg", (TENSOR, 0), [(TENSOR, 0)])


@pytest.mark.parametrize(
    ("steps", "rows", "message"),
    [
        ([("cube", (TENSOR, 0), [(TENSOR, 0)])], [(1, [0], [])], "of `element_ops`, got 'cube'"),
        ([("add", (TENSOR, 0), [(TENSOR, 0)])], [(1, [0], [])], "operands of add: must be 2"),
        ([("neg", (NUMBER, 0), [(TENSOR, 0)])], [(1, [0], [0])], "a kind of place"),
        ([("neg", (TENSOR, 1), [(TENSOR, 0)])], [(1, [0], [])], "a place"),
        ([STEP], [(1, [1], [])], "rows: a tensor"),
        ([STEP], [(1, [0], [1])], "rows: a word"),
        ([STEP], [(-1, [0], [])], "rows: a size"),
        ([STEP], [(1, [0], []), (1, [0, 0], [])], "of as many tensors"),
        ([("sum", (SUM, 0), [])], [(1, [0], [])], "operands of sum: must be 1, got 0"),
        ([("sum", (SUM, 0), [(NUMBER, 0)])], [(1, [0], [0])], "a kind of place"),
        ([("sum", (TENSOR, 0), [(TENSOR, 0)])], [(1, [0], [])], "a kind of place"),
        ([("neg", (SUM, 0), [(TENSOR, 0)])], [(1, [0], [])], "a kind of place"),
        ([("neg", (TENSOR, 0), [(SUM, 0)])], [(1, [0], [])], "a kind of place"),
        ([("sum", (SUM, 0), [(TENSOR, 0)])], [(1, [0], [])], "a place"),
    ],
)
def test_what_is_refused(steps, rows, message):
    with pytest.raises(ValueError, match=message):
        run(steps, rows, [np.zeros(1, f32)])


@pytest.mark.parametrize(("count", "message"), [(3, "as many for each row"), (18, "sums of a row")])
def test_sums_fit_the_rows(count, message):
    with pytest.raises(ValueError, match=message):
        run([STEP], [(1, [0], [])] * 2, [np.zeros(1, f32)], sums=np.zeros(count, f32))


def test_runs_check_their_arguments():
    program = _kernel.ElementProgram([STEP], [(1, [0], [])], np.zeros(1, np.uint32), 1)
    with pytest.raises(ValueError, match="pointers: must be 1"):
        program.run([], 1)
    with pytest.raises(ValueError, match="threads"):
        program.run([np.zeros(1, f32).ctypes.data], 0)
