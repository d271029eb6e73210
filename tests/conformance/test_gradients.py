"""Gradients *through* an update, as meta-learning takes them, are finite wherever the update is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import bounds
from chainrule import transforms
from chainrule.transforms._numerics import root, share
from harness import random_tree
from registry import every_case


def dead(x):
    """`x` whose first entry is zero."""
    return x.reshape(-1).at[0].set(0).reshape(x.shape)


CORNERS = {
    "no gradient": lambda g, p: (jnp.zeros_like(g), p),
    "no parameter": lambda g, p: (g, jnp.zeros_like(p)),
    "neither": lambda g, p: (jnp.zeros_like(g), jnp.zeros_like(p)),
    "gradient parallel to parameters": lambda g, p: (-1.5 * p, p),
    "a dead entry": lambda g, p: (dead(g), dead(p)),
    "nothing special": lambda g, p: (g, p),
}


@every_case
def test_gradients_through_an_update_are_finite(case):
    tx = case.make()
    grads, params = (random_tree(case.shapes, seed) for seed in (1, 0))
    weights = random_tree(case.shapes, 2)
    state = tx.init(params)

    def value(g, p):
        updates, _ = tx.update(g, state, p)
        return sum(map(jnp.vdot, jax.tree.leaves(weights), jax.tree.leaves(updates)))

    def stacked(which):
        return jax.tree.map(
            lambda g, p: jnp.stack([corner(g, p)[which] for corner in CORNERS.values()]),
            grads,
            params,
        )

    # All corners at once, which also takes both sides of every condition.
    found = jax.vmap(jax.value_and_grad(value, argnums=(0, 1)))(stacked(0), stacked(1))
    for index, corner in enumerate(CORNERS):
        for path, x in jax.tree_util.tree_leaves_with_path(found):
            assert np.all(np.isfinite(x[index])), f"{corner}: {jax.tree_util.keystr(path)}"


@pytest.mark.slow
@pytest.mark.parametrize("atom", [transforms.orthograd, transforms.scale_by_adam])
def test_away_from_the_corners_they_are_right(atom):
    tx = atom()
    with jax.enable_x64(True):
        g, p = (jnp.asarray(np.random.default_rng(seed).normal(size=5)) for seed in (1, 0))
        state = tx.init(p)
        # Against central differences.
        check_grads(lambda g, p: tx.update(g, state, p)[0], (g, p), order=2, modes=("fwd", "rev"))


def test_without_eps_a_signal_of_zero_has_no_slope():
    tx = transforms.adaptive_beta1(signal="moments", eps=0.0)
    zero = jnp.zeros(3)

    def value(g):
        updates, state = tx.update(g, tx.init(zero))
        return jnp.sum(updates.mu) + state.b1.tree()

    # mu = (1 - b1) g, and b1 is at its base.
    np.testing.assert_allclose(jax.grad(value)(zero), [0.1] * 3, rtol=bounds.live(0.9))


@pytest.mark.parametrize("x", [1e-30, 1.0, 1e30])
def test_a_root_away_from_zero_has_its_derivative(x):
    np.testing.assert_allclose(jax.grad(root)(x), 0.5 / np.sqrt(x), rtol=bounds.ELEMENTWISE)
    np.testing.assert_allclose(jax.grad(jax.grad(root))(1.0), -0.25, rtol=bounds.ELEMENTWISE)
    assert root(x) == jnp.sqrt(jnp.float32(x))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_share_has_the_derivative_of_a_quotient(scale):
    x, y = jnp.float32(0.5 * scale), jnp.float32(2 * scale)
    found = jax.grad(share, argnums=(0, 1))(x, y)
    # In units of 1 / scale, which float32 holds.
    np.testing.assert_allclose([d * scale for d in found], [0.5, -0.125], rtol=bounds.ELEMENTWISE)
