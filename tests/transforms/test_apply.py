"""`apply_updates` with stochastic rounding, and `compensated`: small steps of half-precision weights add up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bounds
from chainrule import apply_updates
from chainrule.transforms import compensated
from harness import assert_identical

HALF = jnp.bfloat16
SPACING = 2.0**-7  # of bfloat16 between 1 and 2


def drawn(params, updates, seed=0):
    return apply_updates(params, updates, rounding="stochastic", key=jax.random.key(seed))


@given(
    st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: abs(x) >= 2.0**-100),
    st.integers(0, 2**31),
)
@settings(max_examples=50)
def test_it_rounds_to_a_neighbour_and_its_mean_is_right(x, seed):
    """The number that is rounded up is binomial."""
    n = 4096
    got = np.asarray(drawn(jnp.zeros(n, HALF), jnp.full(n, x, jnp.float32), seed), np.float64)
    bits = np.float32(x).view(np.uint32)
    down = float((bits & np.uint32(0xFFFF0000)).view(np.float32))  # toward zero
    up = float(((bits & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32))
    assert set(got) <= {down, up}
    share = (x - down) / (up - down)
    deviation = np.sqrt(share * (1 - share))
    assert abs(np.mean(got == up) - share) <= bounds.sampled(n, deviation) + 1 / n


@given(st.floats(-4096, 4096, width=16), st.floats(-4096, 4096, width=16))
@settings(max_examples=50)
def test_what_bfloat16_has_is_exact(p, u):
    p, u = HALF(p), HALF(u)
    total = jnp.float32(p) + jnp.float32(u)
    if HALF(total) == total:
        assert drawn(p, u) == total


def test_not_finite_stays_so():
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(drawn(jnp.zeros(3, HALF), x).astype(jnp.float32), x)


def test_other_dtypes_and_absent_leaves_are_optax_s():
    params = {"a": jnp.ones(3), "b": None, "c": jnp.ones(2, jnp.float16), "d": jnp.ones((), HALF)}
    updates = {"a": jnp.full(3, 0.1), "b": None, "c": jnp.full(2, 0.1, jnp.float16), "d": HALF(1.0)}
    expected = optax.apply_updates(params, updates)
    assert_identical(drawn(params, updates), expected)
    assert_identical(apply_updates(params, updates), expected)


def test_arrays_of_one_step_and_steps_of_one_array_are_rounded_apart():
    params = {name: jnp.ones(64, HALF) for name in "ab"}
    updates = {name: jnp.full(64, SPACING / 2) for name in "ab"}
    first, second = drawn(params, updates, 0), drawn(params, updates, 1)
    assert_identical(first, drawn(params, updates, 0))
    assert jnp.any(first["a"] != first["b"]) and jnp.any(first["a"] != second["a"])


def test_under_jit_it_is_the_same():
    params, updates = jnp.ones((8, 16), HALF), jnp.full((8, 16), 1e-3)
    assert_identical(jax.jit(drawn)(params, updates), drawn(params, updates))


def test_weights_move_on_the_mean_path_where_rounding_to_nearest_does_not():
    n, steps = 4096, 500
    weights, updates = jnp.ones(n, HALF), jnp.full(n, 1e-3)

    def step(carry, key):
        random, nearest = carry
        random = apply_updates(random, updates, rounding="stochastic", key=key)
        return (random, apply_updates(nearest, updates)), None

    keys = jax.random.split(jax.random.key(0), steps)
    (random, nearest), _ = jax.lax.scan(step, (weights, weights), keys)
    assert jnp.all(nearest == 1)
    # A step of 1e-3 moves a weight by SPACING with a probability of 1e-3 / SPACING.
    deviation = SPACING * np.sqrt(steps * (1e-3 / SPACING))
    mean = np.mean(np.asarray(random, np.float64))
    assert abs(mean - 1.5) <= bounds.sampled(n, deviation) + steps * 2 * bounds.unit()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounding": "up"}, r"`rounding` must be one of None, 'stochastic', got 'up'"),
        ({"rounding": "stochastic"}, r"needs `key`, another one for every step"),
        ({"key": jax.random.key(0)}, r"`key` is for rounding=\"stochastic\""),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        apply_updates(jnp.ones(2), jnp.ones(2), **arguments)


# ---- compensated -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kept", [None, "float32"])
def test_the_sum_is_that_of_a_wider_dtype(dtype, kept):
    steps, n = 300, 64
    rng = np.random.default_rng(0)
    given = rng.uniform(0, 2e-3, (steps, n)).astype(dtype)
    tx = compensated(dtype=kept)
    start = jnp.ones(n, dtype)

    def step(carry, u):
        params, state = carry
        updates, state = tx.update(u, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (start, tx.init(start)), jnp.asarray(given))
    exact = 1 + given.astype(np.float64).sum(axis=0)
    bound = bounds.compensated(steps, 2e-3, dtype, kept or dtype)
    got = np.asarray(params, np.float64)
    assert np.all(np.abs(got + np.asarray(state.lost, np.float64) - exact) <= bound)
    assert np.all(np.abs(got - exact) <= 2 * bounds.unit(dtype) + bound)
    assert params.dtype == dtype and state.lost.dtype == (kept or dtype)


def test_it_names_what_it_needs():
    with pytest.raises(ValueError, match="compensated: needs the parameters"):
        compensated().update(jnp.ones(2), compensated().init(jnp.ones(2)))
