"""Adam's direction: beside optax, its first steps, its forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bounds
from chainrule.transforms import adaptive_beta1, scale_by_adam
from harness import assert_close

GRADIENTS = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
EPS = bounds.shrunk(1e-8, np.abs(GRADIENTS[0]).min())  # in the first step


def run(tx, gradients):
    state, seen = tx.init(jnp.zeros(gradients.shape[1:])), []
    for g in gradients:
        updates, state = tx.update(jnp.asarray(g), state)
        seen.append(updates)
    return np.stack(seen), state


@pytest.mark.parametrize("nesterov", [False, True])
def test_equals_optax(nesterov):
    ours, state = run(scale_by_adam(0.8, 0.95, 1e-3, 1e-4, nesterov=nesterov), GRADIENTS)
    theirs, expected = run(optax.scale_by_adam(0.8, 0.95, 1e-3, 1e-4, nesterov=nesterov), GRADIENTS)
    assert_close(ours, theirs, bounds.stepped(len(GRADIENTS)))
    for name in ("count", "mu", "nu"):
        ours, theirs = (getattr(s, name) for s in (state, expected))
        np.testing.assert_allclose(ours, theirs, rtol=bounds.stepped(len(GRADIENTS)))


@pytest.mark.parametrize(
    ("nesterov", "first"), [(False, 1.0), (True, 0.9 * 0.1 / 0.19 + 1.0), ("keras", 0.9 + 1.0)]
)
def test_the_first_step_of_each_look_ahead(nesterov, first):
    updates, _ = run(scale_by_adam(nesterov=nesterov), GRADIENTS[:1])
    np.testing.assert_allclose(
        np.abs(updates[0]),
        first,
        rtol=bounds.stepped(1) + EPS,
    )


def test_without_a_first_moment_nesterov_is_the_gradient():
    plain, keras = (run(scale_by_adam(b1=0.0, nesterov=n), GRADIENTS)[0] for n in (False, "keras"))
    np.testing.assert_allclose(keras, plain, rtol=bounds.ELEMENTWISE)


def test_a_raw_eps_shrinks_the_first_step():
    """With g = eps sqrt(nu) is sqrt(1 - b2) eps, so that eps outweighs it by far before the correction."""
    g = np.full((1, 2), 1e-3, np.float32)
    corrected, _ = run(scale_by_adam(eps=1e-3), g)
    raw, _ = run(scale_by_adam(eps=1e-3, eps_scope="raw"), g)
    root = 0.001**0.5
    np.testing.assert_allclose(corrected, 0.5, rtol=bounds.stepped(1))
    np.testing.assert_allclose(raw, root / (1 + root), rtol=bounds.stepped(1))


@given(scale=st.floats(1e-6, 1e6))
def test_the_scale_of_the_gradient_does_not_matter(scale):
    unit, _ = run(scale_by_adam(eps=0.0), GRADIENTS[:5])
    scaled, _ = run(scale_by_adam(eps=0.0), GRADIENTS[:5] * np.float32(scale))
    assert_close(scaled, unit, bounds.stepped(5))


def test_bias_correction_keeps_its_digits():
    """1 - b2 at the first step, where float32's 1 - b2^t has an error of 1e-5 and more."""
    updates, _ = run(scale_by_adam(b2=0.99999), GRADIENTS[:1])
    np.testing.assert_allclose(
        np.abs(updates),
        1.0,
        rtol=bounds.ELEMENTWISE + EPS,
    )


def test_moments_in_the_dtype_asked_for():
    tx = scale_by_adam(mu_dtype=jnp.bfloat16, nu_dtype=jnp.float32)
    params = jnp.zeros(3, jnp.float16)
    updates, state = tx.update(jnp.ones(3, jnp.float16), tx.init(params))
    assert (updates.dtype, state.mu.dtype, state.nu.dtype) == (
        jnp.float16,
        jnp.bfloat16,
        jnp.float32,
    )


def test_the_second_moment_of_complex_parameters_is_real():
    g = jnp.array([3 + 4j])
    tx = scale_by_adam()
    updates, state = tx.update(g, tx.init(g))
    assert state.nu.dtype == jnp.float32
    np.testing.assert_allclose(updates, (3 + 4j) / 5, rtol=bounds.stepped(1))


def test_no_first_moment_of_its_own():
    tx = scale_by_adam(b1=None)
    assert tx.init(jnp.ones(3)).mu is None
    with pytest.raises(TypeError, match=r"b1=None says.*`adaptive_beta1` directly before it"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))


def test_a_momentum_leaf_replaces_the_first_moment():
    """With no adaptation STAM's moment is Adam's, whatever b1 `scale_by_adam` was given."""
    chained = optax.chain(adaptive_beta1(0.9, adapt_strength=0.0), scale_by_adam(b1=0.5))
    adam, _ = run(scale_by_adam(b1=0.9), GRADIENTS)
    ours, _ = run(chained, GRADIENTS)
    assert_close(ours, adam, bounds.stepped(len(GRADIENTS)))


def test_masked_leaves_and_none_pass():
    tree = {"a": jnp.ones(2), "b": optax.MaskedNode(), "c": None, "e": jnp.zeros((0,))}
    tx = scale_by_adam()
    updates, state = tx.update(tree, tx.init(tree))
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert jax.tree.structure(state.mu) == jax.tree.structure(tree)
