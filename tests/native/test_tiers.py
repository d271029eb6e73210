"""The NumPy door's tiers and statistics against float64, over dtypes, sizes, threads and instruction sets."""

import ml_dtypes
import numpy as np
import pytest

import bounds
from chainrule import native
from chainrule.native import _kernel, forms
from reference import kernel as oracle

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Half a unit in the last place, and what a step in float32 adds.
TOLERANCE = {dtype: bounds.unit(dtype) + bounds.stepped(2) for dtype in DTYPES}
# None, one, less and more than a vector, a tile, several tasks with a rest.
SIZES = [0, 1, 7, 33, 1024, 1027, 200_003]
SETTINGS = {"learning_rate": 0.01, "b1": 0.9, "b2": 0.99, "eps": 1e-8}
INSTRUCTION_SETS = native.info()["instruction_sets"]


def draw(seed: int, dtype: str = "float32", scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal(n)).astype(DTYPES[dtype]) for n in SIZES]


def second_moments(dtype: str = "float32") -> list[np.ndarray]:
    return [np.abs(x) for x in draw(3, dtype)]


def wide(tensors: list[np.ndarray]) -> list[np.ndarray]:
    return [x.astype(np.float64) for x in tensors]


def check(actual: list[np.ndarray], expected: list[np.ndarray], dtype: str = "float32") -> None:
    for a, e in zip(actual, expected, strict=True):
        size = np.abs(e).max(initial=1.0)
        np.testing.assert_allclose(
            a.astype(np.float64), e, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size
        )


@pytest.mark.parametrize("gradient", DTYPES)
@pytest.mark.parametrize("parameter", DTYPES)
@pytest.mark.parametrize("state", DTYPES)
def test_tier2_moves_parameters_and_moments(parameter, gradient, state):
    p, g = draw(0, parameter), draw(1, gradient)
    mu, nu = draw(2, state), second_moments(state)
    before = [wide(x) for x in (p, g, mu, nu)]
    _kernel.tier2(p, g, mu, nu, weight_decay=0.1, nu_correction=0.5, mu_correction=0.8, **SETTINGS)
    expected = [
        oracle.tier2(g, m, v, b1=0.9, b2=0.99, eps=1e-8, nu_correction=0.5, mu_correction=0.8)
        for _, g, m, v in zip(*before, strict=True)
    ]
    check(mu, [e.mu for e in expected], state)
    check(nu, [e.nu for e in expected], state)
    moved = [
        x + oracle.step(e.update, x, learning_rate=0.01, weight_decay=0.1)
        for x, e in zip(before[0], expected, strict=True)
    ]
    check(p, moved, parameter)


@pytest.mark.parametrize("denominator", ["root", "magnitude", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tier2_hands_out_the_step_of_a_blend(denominator, dtype):
    p, g = draw(0, dtype), draw(1, dtype)
    mu, long = draw(2), draw(4)
    nu = second_moments() if denominator == "root" else None
    old = [wide(x) for x in (p, g, mu, long, nu or second_moments())]
    kept = [x.copy() for x in p]
    updates = [np.empty_like(x) for x in g]
    settings = {"b1": 0.9, "b2": 0.99, "eps": 1e-3, "b1_long": 0.99, "blend": 0.25}
    _kernel.tier2(
        p,
        g,
        mu,
        nu,
        mu_long=long,
        updates=updates,
        learning_rate=0.1,
        weight_decay=0.3,
        denominator=denominator,
        **settings,
    )
    expected = [
        oracle.tier2(g, m, v, el, denominator=denominator, **settings)
        for _, g, m, el, v in zip(*old, strict=True)
    ]
    check(long, [e.mu_long for e in expected])
    steps = [
        oracle.step(e.update, x, learning_rate=0.1, weight_decay=0.3)
        for x, e in zip(old[0], expected, strict=True)
    ]
    check(updates, steps, dtype)
    assert all((a == b).all() for a, b in zip(p, kept, strict=True))


def test_updates_may_be_the_gradients_memory():
    g, mu, nu = draw(1), draw(2), second_moments()
    apart = [x.copy() for x in g], [x.copy() for x in mu], [x.copy() for x in nu]
    updates = [np.empty_like(x) for x in g]
    settings = {**SETTINGS, "learning_rate": -1.0}
    _kernel.tier2(None, apart[0], apart[1], apart[2], updates=updates, **settings)
    _kernel.tier2(None, g, mu, nu, updates=g, **settings)
    for a, b in zip(g, updates, strict=True):
        np.testing.assert_array_equal(a, b)


def test_numbers_may_differ_from_tensor_to_tensor():
    rates = np.linspace(0.0, 0.1, len(SIZES))
    together = draw(0), draw(1), draw(2), second_moments()
    alone = draw(0), draw(1), draw(2), second_moments()
    _kernel.tier2(*together, **{**SETTINGS, "learning_rate": rates})
    for i, rate in enumerate(rates):
        roles = ([role[i]] for role in alone)
        _kernel.tier2(*roles, **{**SETTINGS, "learning_rate": rate})
    for a, b in zip(together[0], alone[0], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_decay", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_tier1(dtype, scale_decay, known):
    p, g = draw(0, dtype), draw(1, dtype)
    old, grads = wide(p), wide(g)
    c = [np.full(1, 0.5, np.float32) for _ in SIZES]
    means = [oracle.statistics(x)[0] for x in grads]
    _kernel.tier1(
        p,
        g,
        c,
        learning_rate=0.1,
        weight_decay=0.2,
        decay=0.75,
        scale_decay=scale_decay,
        mean_magnitude=means if known else None,
    )
    # An empty tensor has no gradient to take a mean of: found here, its magnitude stays.
    expected = [
        0.5 if x.size == 0 and not known else 0.75 * 0.5 + 0.25 * m
        for x, m in zip(grads, means, strict=True)
    ]
    check(c, [np.full(1, e) for e in expected])
    moved = [
        x
        + oracle.step(
            e * np.sign(g), x, learning_rate=0.1, weight_decay=0.2 * (e if scale_decay else 1.0)
        )
        for x, g, e in zip(old, grads, expected, strict=True)
    ]
    check(p, moved, dtype)


def test_tier1_starts_at_the_first_mean_whatever_was_there():
    c = [np.full(1, np.nan, np.float32)]
    g = [np.array([1.0, -3.0], np.float32)]
    _kernel.tier1([np.zeros(2, np.float32)], g, c, learning_rate=0.1, decay=0.0)
    assert c[0] == 2.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_tier0(dtype):
    p, g = draw(0, dtype), draw(1, dtype)
    old, grads = wide(p), wide(g)
    grads[3][::3] = 0
    g[3][::3] = 0
    _kernel.tier0(p, g, learning_rate=0.1, weight_decay=0.2)
    moved = [
        x + oracle.step(np.sign(y), x, learning_rate=0.1, weight_decay=0.2)
        for x, y in zip(old, grads, strict=True)
    ]
    check(p, moved, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype):
    g = draw(1, dtype)
    expected = np.stack([oracle.statistics(x) for x in wide(g)])
    np.testing.assert_allclose(
        _kernel.statistics(g), expected, rtol=bounds.summed(max(SIZES), "float64")
    )


def test_statistics_of_equal_values_have_no_variance():
    table = _kernel.statistics([np.full(100_001, -2.5, np.float32)])
    np.testing.assert_array_equal(table, [[2.5, 6.25, 0.0, 2.5]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", forms.SUMS)
def test_sums(kind, dtype):
    x, y = draw(1, dtype), second_moments(dtype)
    x[3][5] = 0
    y[3][5] = 0
    table = _kernel.sums(kind, x, None if kind in forms.OF_ONE else y, c=0.5)
    expected = [oracle.sums(kind, a, b, 0.5) for a, b in zip(wide(x), wide(y), strict=True)]
    assert table.dtype == np.float32
    sizes = np.array(
        [oracle.sums(kind, np.abs(a), b, 0.5) for a, b in zip(wide(x), wide(y), strict=True)]
    )
    assert np.all(np.abs(table - np.array(expected)) <= bounds.summed(bounds.KERNEL_TERMS) * sizes)


def test_the_magnitude_is_of_the_finite_entries():
    g = [np.array([np.nan, np.inf, -np.inf, -2.0, 1.0], np.float32)]
    assert _kernel.sums("magnitude", g).tolist() == [[3.0]]
    c, p = [np.full(1, 5.0, np.float32)], [np.zeros(5, np.float32)]
    _kernel.tier1(p, g, c, learning_rate=1.0, decay=0.0)
    np.testing.assert_allclose(c[0], 3 / 5, rtol=bounds.ELEMENTWISE)
    np.testing.assert_allclose(p[0], [np.nan, -0.6, 0.6, 0.6, -0.6], rtol=bounds.ELEMENTWISE)


def test_nonfinite_gradients_spread_as_arithmetic_says():
    p, g = [np.ones(4, np.float32)], [np.array([np.nan, np.inf, 0.0, 1.0], np.float32)]
    mu, nu = [np.zeros(4, np.float32)], [np.zeros(4, np.float32)]
    _kernel.tier2(p, g, mu, nu, **SETTINGS)
    np.testing.assert_array_equal(np.isfinite(p[0]), [False, False, True, True])
    p = [np.ones(4, np.float32)]
    _kernel.tier0(p, g, learning_rate=0.5)
    np.testing.assert_array_equal(p[0], [np.nan, 0.5, 1.0, 0.5])
    np.testing.assert_array_equal(_kernel.statistics(g), [[np.nan] * 4])
    np.testing.assert_array_equal(_kernel.statistics([g[0][1:]])[0, 3], np.inf)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_half_survives_widening_and_narrowing(dtype):
    # A step of 0 with a state of every bit pattern: mu = 1 mu + 0 g. Subnormal float16 are normal float32;
    # subnormal bfloat16 are subnormal float32 too, and are flushed.
    state = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype])
    expected = state.astype(np.float32)
    expected[np.abs(expected) < np.finfo(np.float32).tiny] = 0.0
    zeros = np.zeros(65536, np.float32)
    _kernel.tier2(
        [zeros.copy()],
        [zeros],
        [state],
        None,
        learning_rate=0.0,
        b1=1.0,
        b2=0.0,
        eps=0.0,
        denominator="none",
    )
    np.testing.assert_array_equal(state.astype(np.float32), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrowing_rounds_half_to_even(dtype):
    rng = np.random.default_rng(0)
    edges = [65504.0, 65519.9, 65520.0, -65520.0, 2**-24, 2**-25, 3 * 2**-26]
    values = rng.integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], np.array(edges, np.float32)])
    values = values[np.abs(values) >= np.finfo(np.float32).tiny]
    out = np.empty(values.size, DTYPES[dtype])
    zeros = np.zeros_like(values)
    # The direction of mu = 0 mu + 1 g, undivided, is g.
    _kernel.tier2(
        None,
        [values],
        [zeros],
        None,
        updates=[out],
        learning_rate=-1.0,
        b1=0.0,
        b2=0.0,
        eps=0.0,
        denominator="none",
    )
    with np.errstate(over="ignore"):
        expected = values.astype(DTYPES[dtype])
    tiny = np.abs(expected.astype(np.float32)) < np.finfo(np.float32).tiny
    same = (out.view(np.uint16) == expected.view(np.uint16)) | tiny
    assert same.all()


def everything(threads: int) -> list[np.ndarray]:
    """What all entries leave behind, to be compared byte by byte."""
    p, g, mu, nu = draw(0), draw(1), draw(2), second_moments()
    c = [np.zeros(1, np.float32) for _ in SIZES]
    codes = [np.zeros((n + 1) // 2, np.uint8) for n in SIZES]
    scales = [np.zeros(-(-n // 100), np.float32) for n in SIZES]
    halves = draw(5, "float16")
    _kernel.tier2(p, g, mu, nu, threads=threads, **SETTINGS)
    _kernel.tier1(p, g, c, learning_rate=0.1, decay=0.0, threads=threads)
    _kernel.tier0(halves, g, learning_rate=0.1, weight_decay=0.1, threads=threads)
    _kernel.tier2_quantized(p, g, codes, scales, nu, block=100, threads=threads, **SETTINGS)
    table = _kernel.statistics(g, threads=threads)
    keys = np.arange(2 * len(SIZES), dtype=np.uint32).reshape(-1, 2)
    random = [x.copy() for x in codes]
    _kernel.quantize(g, random, [x.copy() for x in scales], block=100, keys=keys, threads=threads)
    return [*p, *mu, *nu, *c, *codes, *scales, *halves, *random, table]


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    for a, b in zip(everything(1), everything(threads), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_results_do_not_depend_on_the_instruction_set(instruction_set, monkeypatch):
    expected = everything(1)
    monkeypatch.setenv("CHAINRULE_ISA", instruction_set)
    assert native.info()["instruction_set"] == instruction_set
    for a, b in zip(everything(1), expected, strict=True):
        assert a.tobytes() == b.tobytes()


def test_buffers_and_raw_memory_are_the_same_as_arrays():
    arrays = draw(0), draw(1), draw(2), second_moments()
    raw = draw(0), draw(1), draw(2), second_moments()
    triples = [[(x.ctypes.data, x.size, "float32") for x in role] for role in raw]
    _kernel.tier2(*arrays, **SETTINGS)
    prepared = [_kernel.Buffers(role) for role in triples]
    assert len(prepared[0]) == len(SIZES)
    _kernel.tier2(*prepared, **SETTINGS)
    for a, b in zip(arrays, raw, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_buffers_keep_their_arrays_alive():
    prepared = _kernel.Buffers([np.full(100_000, 3.0, np.float32)])
    table = _kernel.statistics(prepared)
    assert table[0, 0] == 3.0


def test_no_tensors_is_no_work():
    _kernel.tier2([], [], [], [], **SETTINGS)
    assert _kernel.statistics([]).shape == (0, 4)
