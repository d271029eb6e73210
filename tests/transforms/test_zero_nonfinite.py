"""What is zeroed, what is clamped, and what is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
from chainrule import chain, metrics
from chainrule.transforms import zero_nonfinite


def test_entries_and_counts():
    tx = zero_nonfinite(max_abs=2.0)
    grads = {"a": jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf]), "b": jnp.array([-3.0, 2.0])}
    state = tx.init(grads)
    for step in (1, 2):
        updates, state = tx.update(grads, state)
        assert updates["a"].tolist() == [1.0, 0.0, 0.0, 0.0]
        assert updates["b"].tolist() == [-2.0, 2.0]
        assert (state.nonfinite, state.nonfinite_total) == (4, 4 * step)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, grads), state)
    assert (state.nonfinite, state.nonfinite_total) == (0, 8)
    assert metrics(state)["nonfinite_total"] == 8


def test_without_a_clamp_finite_entries_pass():
    tx = zero_nonfinite(max_abs=None)
    updates, state = tx.update(jnp.array([3e38, jnp.nan]), tx.init(jnp.zeros(2)))
    assert updates.tolist() == [np.float32(3e38), 0.0]
    assert state.nonfinite == 1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_every_float_keeps_its_dtype_and_its_largest_number_is_squared_safely(dtype):
    tx = zero_nonfinite()
    largest = jnp.array([jnp.finfo(dtype).max], dtype)
    updates, _ = tx.update(largest, tx.init(largest))
    assert updates.dtype == dtype
    assert jnp.isfinite(updates.astype(jnp.float32) ** 2).all()


def test_complex_entries_keep_their_direction():
    tx = zero_nonfinite(max_abs=5.0)
    g = jnp.array([6 + 8j, 3 + 4j, complex(jnp.nan, 1)])
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates, [3 + 4j, 3 + 4j, 0], rtol=bounds.ELEMENTWISE)
    assert state.nonfinite == 2


def test_the_total_saturates():
    tx = zero_nonfinite()
    state = tx.init(None)._replace(nonfinite_total=jnp.int32(2**31 - 2))
    _, state = tx.update(jnp.full(3, jnp.nan), state)
    assert state.nonfinite_total == 2**31 - 1


def test_an_adam_behind_it_recovers_from_an_overflow():
    """Without the clamp one finite entry whose square is infinite stops its parameter for ever."""

    def after(tx):
        params = jnp.zeros(1)
        updates, state = tx.update(jnp.array([1e30]), tx.init(params), params)
        for _ in range(50):
            updates, state = tx.update(jnp.array([1.0]), state, params)
        return updates.item()

    assert after(optax.scale_by_adam()) == 0.0
    assert after(chain(zero_nonfinite(max_abs=10.0), optax.scale_by_adam())) > 0.3
