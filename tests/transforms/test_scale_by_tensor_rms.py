"""One scale a tensor."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
from chainrule.transforms import adaptive_beta1, scale_by_tensor_rms


def test_the_first_update_has_root_mean_square_one():
    tx = scale_by_tensor_rms(eps=0.0)
    g = jnp.array([[3.0, -4.0], [12.0, 0.5]])
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(jnp.mean(updates**2), 1.0, rtol=bounds.ELEMENTWISE)
    np.testing.assert_allclose(updates / updates[0, 0], g / g[0, 0], rtol=bounds.ELEMENTWISE)


def test_the_state_is_a_number_a_tensor():
    state = scale_by_tensor_rms(stat_dtype="bfloat16").init({"w": jnp.ones((9, 9))})
    assert (state.mean_square.values.shape, state.mean_square.values.dtype) == ((1,), jnp.bfloat16)


def test_scale_of_the_gradient_does_not_matter():
    g = jnp.array([1.0, -2.0])
    tx = scale_by_tensor_rms(eps=0.0)
    small, large = (tx.update(s * g, tx.init(g))[0] for s in (1e-10, 1e10))
    np.testing.assert_allclose(small, large, rtol=bounds.ELEMENTWISE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("steps_before", [0, 1, 30])
def test_a_gradient_that_is_not_finite_or_overflows_makes_no_large_step(bad, steps_before):
    """Behind a momentum leaf: the scale is kept, and before there is one, no step is made."""
    tx = optax.chain(adaptive_beta1(signal="moments"), scale_by_tensor_rms())
    g = jnp.array([1.0, -2.0, 0.5])
    state = tx.init(g)
    for gradient in [g] * steps_before + [g.at[0].set(bad)] + [g] * 3:
        updates, state = tx.update(gradient, state)
        assert jnp.all(jnp.isfinite(updates))
        if jnp.all(jnp.abs(gradient) < 10):
            assert jnp.all(jnp.abs(updates) < 4)
