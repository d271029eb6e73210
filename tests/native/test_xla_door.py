"""Inside jit: the same bits as the NumPy door, state updated in place, and clear errors when traced."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bounds
from chainrule.native import _kernel, forms, xla
from harness import assert_close
from reference import kernel as oracle

SHAPES = [(), (0,), (7,), (33, 40), (3, 3, 4, 8), (70_001,)]
NUMBERS = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "nu_correction": 0.5, "mu_correction": 0.75}
# Exactly what the FFI door sees: numbers are float32 there.
SINGLE = {name: float(np.float32(x)) for name, x in NUMBERS.items()}


def draw(seed: int, dtype: str = "float32") -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(s), jnp.float32).astype(dtype) for s in SHAPES]


def nus() -> list[jax.Array]:
    return [jnp.abs(x) for x in draw(3)]


def host(arrays: list[jax.Array]) -> list[np.ndarray]:
    return [np.array(x) for x in arrays]


def equal(some: list[jax.Array], others: list[np.ndarray]) -> None:
    for a, b in zip(some, others, strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == b.tobytes()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tier2_equals_the_numpy_door(dtype, in_place):
    g, mu, long, nu = host(draw(1, dtype)), host(draw(2)), host(draw(4)), host(nus())
    updates = [np.empty_like(x) for x in g]
    _kernel.tier2(
        None, g, mu, nu, mu_long=long, updates=updates, learning_rate=-1.0, blend=0.5,
        b1_long=float(np.float32(0.99)), **SINGLE
    )  # fmt: skip
    step = partial(xla.tier2, blend=0.5, b1_long=0.99, in_place=in_place, **NUMBERS)
    results = jax.jit(lambda g, mu, mu_long, nu: step(g, mu, nu, mu_long=mu_long))(
        draw(1, dtype), draw(2), draw(4), nus()
    )
    equal(results.updates, updates)
    equal(results.mu, mu)
    assert results.mu_long is not None and results.nu is not None
    equal(results.mu_long, long)
    equal(results.nu, nu)


@pytest.mark.parametrize("denominator", ["root", "magnitude", "none"])
def test_tier2_hands_out_a_whole_step(denominator):
    p, g, mu = draw(0), draw(1), draw(2)
    nu = nus() if denominator == "root" else None
    results = xla.tier2(
        g, mu, nu, parameters=p, learning_rate=0.1, weight_decay=0.2, denominator=denominator,
        b1=0.9, b2=0.99, eps=1e-3
    )  # fmt: skip
    assert (results.nu is None) == (nu is None) and results.mu_long is None
    for i, update in enumerate(results.updates):
        wide = [np.asarray(x[i], np.float64) for x in (p, g, mu, nus())]
        new = oracle.tier2(*wide[1:], b1=0.9, b2=0.99, eps=1e-3, denominator=denominator)
        expected = oracle.step(new.update, wide[0], learning_rate=0.1, weight_decay=0.2)
        assert_close(update, expected, bounds.stepped(1))


def test_numbers_are_traced_and_may_differ_from_tensor_to_tensor():
    traces = []

    @jax.jit
    def directions(b1):
        traces.append(1)
        return xla.tier2(draw(1), draw(2), nus(), **{**NUMBERS, "b1": b1}).updates

    together = directions(jnp.linspace(0.5, 0.9, len(SHAPES)))
    for i, b1 in enumerate(np.linspace(0.5, 0.9, len(SHAPES))):
        assert_close(together[i], directions(jnp.full(len(SHAPES), b1))[i], bounds.stepped(1))
    assert len(traces) == 1


def test_donated_state_is_updated_where_it_is():
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(mu, nu, g):
        results = xla.tier2(g, mu, nu, **NUMBERS)
        return results.mu, results.nu, results.updates

    mu, nu, g = draw(2)[-1:], nus()[-1:], draw(1)[-1:]
    before = [x.unsafe_buffer_pointer() for x in (*mu, *nu)]
    new_mu, new_nu, _ = step(mu, nu, g)
    assert [x.unsafe_buffer_pointer() for x in (*new_mu, *new_nu)] == before


def test_state_that_is_not_donated_is_left_alone():
    g, mu, nu = draw(1), draw(2), nus()
    kept = host(g), host(mu), host(nu)
    xla.tier2(g, mu, nu, in_place=True, **NUMBERS)
    for arrays, copies in zip((g, mu, nu), kept, strict=True):
        equal(arrays, copies)


def test_vmap_and_scan_run_one_after_another():
    g = jnp.stack([draw(s)[3] for s in (5, 6, 7)])
    zeros = jnp.zeros_like(g)

    def one(g, m, v):
        results = xla.tier2([g], [m], [v], **NUMBERS)
        return results.updates[0]

    together = jax.vmap(one)(g, zeros, zeros)
    for i in range(3):
        np.testing.assert_array_equal(together[i], one(g[i], zeros[i], zeros[i]))

    def body(state, g):
        results = xla.tier2([g], [state[0]], [state[1]], **NUMBERS)
        return (results.mu[0], results.nu[0]), results.updates[0]

    (mu, _), _ = jax.lax.scan(body, (zeros[0], zeros[0]), g)
    expected = zeros[0]
    for x in g:
        expected = 0.9 * expected + (1 - 0.9) * x
    assert_close(mu, expected, bounds.stepped(3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale_decay", [False, True])
def test_tier1_equals_the_numpy_door(scale_decay, dtype):
    g, p = host(draw(1, dtype)), host(draw(0, dtype))
    c = [np.full(1, 0.5, np.float32) for _ in SHAPES]
    updates = [np.empty_like(x) for x in g]
    _kernel.tier1(
        p, g, c, updates=updates, learning_rate=0.5, weight_decay=0.25, decay=0.75, scale_decay=scale_decay
    )  # fmt: skip
    results, magnitudes = jax.jit(
        lambda g, p, c: xla.tier1(
            g, c, parameters=p, learning_rate=0.5, weight_decay=0.25, decay=0.75, scale_decay=scale_decay
        )
    )(draw(1, dtype), draw(0, dtype), jnp.full(len(SHAPES), 0.5))  # fmt: skip
    equal(results, updates)
    np.testing.assert_array_equal(magnitudes, np.concatenate(c))


def test_tier1_s_direction():
    (update,), c = xla.tier1([jnp.array([1.0, -3.0, 0.0])], jnp.zeros(1), decay=0.0)
    np.testing.assert_allclose(update, [4 / 3, -4 / 3, 0.0], rtol=bounds.ELEMENTWISE)
    np.testing.assert_allclose(c, [4 / 3], rtol=bounds.ELEMENTWISE)


def test_statistics_equal_the_numpy_door():
    g = draw(1)
    table = jax.jit(xla.statistics)(g)
    np.testing.assert_array_equal(table, _kernel.statistics(host(g)).astype(np.float32))


@pytest.mark.parametrize("kind", forms.SUMS)
def test_sums_equal_the_numpy_door(kind):
    x, y = draw(1), [jnp.abs(g) for g in draw(2)]
    pairs = (x,) if kind in forms.OF_ONE else (x, y)
    columns = jax.jit(lambda *pairs: xla.sums(kind, *pairs, c=0.5))(*pairs)
    table = _kernel.sums(kind, *map(host, pairs), c=0.5)
    np.testing.assert_array_equal(np.stack(columns, axis=1), table)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [3, 256, 5000])
def test_codes_equal_the_numpy_door(block, bits):
    values = draw(1)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), len(SHAPES)))
    codes = jax.jit(partial(xla.quantize, block=block, bits=bits))(values, keys=keys)
    packed = [np.zeros_like(x) for x in host(codes.codes)]
    scales = [np.zeros_like(x) for x in host(codes.scales)]
    _kernel.quantize(host(values), packed, scales, block=block, bits=bits, keys=np.asarray(keys))
    equal(codes.codes, packed)
    equal(codes.scales, scales)
    decoded = [np.empty_like(x) for x in host(values)]
    _kernel.dequantize(packed, scales, decoded, block=block, bits=bits)
    equal(xla.dequantize(codes, values, block=block, bits=bits), decoded)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("block", [3, 256, 5000])
def test_tier2_over_codes_equals_the_numpy_door(block, dtype):
    sizes = [x.size for x in draw(0)]
    packed = [np.zeros(xla.packed_size(n, 4), np.uint8) for n in sizes]
    scales = [np.zeros(xla.block_count(n, block), np.float32) for n in sizes]
    g, nu = host(draw(1, dtype)), host(nus())
    updates = [np.empty_like(x) for x in g]
    codes = xla.Codes([jnp.asarray(x) for x in packed], [jnp.asarray(x) for x in scales])
    results = jax.jit(
        partial(xla.tier2_quantized, block=block, start="gradient", blend=0.5, b1_long=0.99, **NUMBERS)
    )(draw(1, dtype), codes, nus(), mu_long=codes)  # fmt: skip
    long_packed, long_scales = [x.copy() for x in packed], [x.copy() for x in scales]
    _kernel.tier2_quantized(
        None, g, packed, scales, nu, mu_long_codes=long_packed, mu_long_scales=long_scales, block=block,
        start="gradient", updates=updates, learning_rate=-1.0, blend=0.5, b1_long=float(np.float32(0.99)), **SINGLE,
    )  # fmt: skip
    equal(results.updates, updates)
    equal(results.mu.codes, packed)
    equal(results.mu.scales, scales)
    assert results.mu_long is not None and results.nu is not None
    equal(results.mu_long.codes, long_packed)
    equal(results.nu, nu)


def test_no_tensors_is_no_call():
    empty = xla.Codes([], [])
    assert xla.tier2([], [], [], **NUMBERS).updates == []
    assert xla.tier2_quantized([], empty, [], block=2, **NUMBERS).mu == empty
    assert xla.statistics([]).shape == (0, 4)
    assert xla.tier1([], jnp.zeros(0), decay=0.5)[0] == []
    assert xla.quantize([], block=4) == empty
    assert xla.dequantize(empty, [], block=4) == []


X = jnp.ones(4)
CODES = xla.Codes([jnp.zeros(2, jnp.uint8)], [jnp.zeros(2)])
ERRORS = {
    "float64": (
        lambda: xla.tier2([np.ones(4)], [X], [X], **NUMBERS),  # pyright: ignore[reportArgumentType]
        TypeError,
        r"`gradients\[0\]` must be float32, bfloat16 or float16, got float64",
    ),
    "shapes": (
        lambda: xla.tier2([X], [jnp.ones(5)], [X], **NUMBERS),
        ValueError,
        r"`mu\[0\]` must have shape \(4,\), got \(5,\)",
    ),
    "how many": (
        lambda: xla.tier2([X], [X, X], [X], **NUMBERS),
        ValueError,
        "`mu` must have 1 arrays, got 2",
    ),
    "nu missing": (lambda: xla.tier2([X], [X], None, **NUMBERS), ValueError, "`nu` goes with"),
    "denominator": (
        lambda: xla.tier2([X], [X], [X], denominator="sqrt", **NUMBERS),
        ValueError,
        "`denominator` must be 'root'",
    ),
    "decay alone": (
        lambda: xla.tier2([X], [X], [X], weight_decay=0.1, **NUMBERS),
        ValueError,
        "`weight_decay` and `parameters` go together",
    ),
    "decay of a direction": (
        lambda: xla.tier2([X], [X], [X], weight_decay=0.1, parameters=[X], **NUMBERS),
        ValueError,
        r"a direction \(learning_rate=None\) has no `weight_decay`",
    ),
    "magnitudes": (
        lambda: xla.tier1([X], jnp.ones(2), decay=0.5),
        ValueError,
        r"`magnitudes` must be float32\[1\], got float32\[2\]",
    ),
    "block of 0": (
        lambda: xla.quantize([X], block=0),
        ValueError,
        "`block` must be an integer of at least 1, got 0",
    ),
    "bits": (
        lambda: xla.quantize([X], block=2, bits=3),
        ValueError,
        "`bits` must be 4 or 8, got 3",
    ),
    "keys": (
        lambda: xla.quantize([X], block=2, keys=jnp.zeros((2, 2), jnp.uint32)),
        ValueError,
        r"`keys` must be uint32\[1, 2\]",
    ),
    "codes": (
        lambda: xla.dequantize(CODES, [X], block=4),
        ValueError,
        r"`codes\[0\]` must be uint8\[2\] codes and float32\[1\] scales",
    ),
    "number of codes": (
        lambda: xla.dequantize(CODES, [X, X], block=2),
        ValueError,
        "`codes` must have codes and scales of 2 arrays",
    ),
    "start": (
        lambda: xla.tier2_quantized([X], CODES, [X], block=2, start="warm", **NUMBERS),
        ValueError,
        "`start` must be 'zero' or 'gradient'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_when_traced(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()
