"""The projection: orthogonal, of the gradient's length, and harmless where there is nothing to project."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bounds
from chainrule.transforms import orthograd
from harness import assert_close


def project(g, p, **settings):
    tx = orthograd(**settings)
    return tx.update(g, tx.init(p), p)[0]


@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from([2, 3, 60]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_orthogonal_and_of_the_gradients_length(seed, size, scale):
    rng = np.random.default_rng(seed)
    g, p = (jnp.asarray(rng.normal(size=size) * s, jnp.float32) for s in (scale, 1.0))
    u = np.asarray(project(g, p), np.float64)
    # The angle is as small as the rounding of the part that was taken away allows.
    rest = np.linalg.norm(g - (g @ p) / (p @ p) * p) / np.linalg.norm(g)
    cosine = u @ np.asarray(p, np.float64) / np.linalg.norm(u) / np.linalg.norm(p)
    assert abs(cosine) <= 2 * bounds.summed(size) / rest
    np.testing.assert_allclose(np.linalg.norm(u), np.linalg.norm(g), rtol=bounds.summed(size))


def test_a_parallel_gradient_leaves_nothing():
    p = jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.float32)
    np.testing.assert_array_equal(project(-1.7 * p, p), jnp.zeros(50))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_element_passes(shape):
    p, g = jnp.full(shape, 0.7), jnp.full(shape, 1.3)
    np.testing.assert_array_equal(project(g, p), g)


@pytest.mark.parametrize("eps", [0.0, 1e-30])
def test_zeros_are_no_nan(eps):
    x, zero = jnp.array([1.0, 2.0]), jnp.zeros(2)
    np.testing.assert_allclose(project(x, zero, eps=eps), x, rtol=bounds.ELEMENTWISE)
    np.testing.assert_array_equal(project(zero, x, eps=eps), zero)
    assert project(jnp.zeros((0, 2)), jnp.zeros((0, 2)), eps=eps).shape == (0, 2)


def test_complex_tensors_are_real_vectors():
    rng = np.random.default_rng(1)
    g, p = (rng.normal(size=(2, 5)).astype(np.float32) for _ in range(2))
    as_complex = project(jnp.asarray(g[0] + 1j * g[1]), jnp.asarray(p[0] + 1j * p[1]))
    expected = project(jnp.asarray(g), jnp.asarray(p))
    assert_close(as_complex, expected[0] + 1j * expected[1], bounds.summed(10))


def test_without_parameters_the_error_says_how_to_call():
    with pytest.raises(ValueError, match=r"orthograd: needs the parameters; call `update\(updates"):
        orthograd().update(jnp.ones(2), orthograd().init(jnp.ones(2)))
