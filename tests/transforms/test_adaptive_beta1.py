"""How b1 moves, and what a gradient that is not finite does to it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
from chainrule.transforms import adaptive_beta1, scale_by_adam
from harness import random_tree

SHAPES = {"w": (40, 30), "b": (50,)}


def b1_after(grads, **settings):
    tx = adaptive_beta1(**settings)
    state = tx.init(grads[0])
    for g in grads:
        _, state = tx.update(g, state)
    return state


@pytest.mark.parametrize("signal", ["residual", "moments"])
@pytest.mark.parametrize(("base", "strength"), [(0.9, 0.2), (0.6, 0.5), (0.99, 0.0), (0.5, 0.5)])
def test_b1_stays_in_its_bounds(signal, base, strength):
    grads = [random_tree(SHAPES, seed) for seed in range(5)]
    state = b1_after(grads, signal=signal, b1_base=base, adapt_strength=strength)
    for b1 in state.b1.values:
        assert (
            max(0.5, base * (1 - strength)) - bounds.ELEMENTWISE <= b1 <= base + bounds.ELEMENTWISE
        )


def test_zero_gradients_leave_it_at_its_base():
    state = b1_after([jnp.zeros(3)] * 3)
    assert state.b1.tree() == np.float32(0.9)


def test_debiased_the_first_step_knows_the_spread_of_the_gradient():
    """z = E r^2 / (E|r|)^2 is 1 for entries of one size; as the repository has it, ten times that."""
    even = jnp.array([1.0, -1.0, 1.0, -1.0])
    np.testing.assert_allclose(
        b1_after([even]).b1.tree(), 0.9 * (1 - 0.2 / 2), rtol=bounds.stepped(1)
    )
    z = 0.001 / (0.01**2 + 1e-8)
    raw = b1_after([even], debias=False).b1.tree()
    np.testing.assert_allclose(raw, 0.9 * (1 - 0.2 * z / (1 + z)), rtol=bounds.stepped(1))


def test_b1_is_renewed_every_k_updates_only():
    grads = [random_tree(SHAPES, seed) for seed in range(7)]
    tx = adaptive_beta1(signal="moments", b1_update_interval=3)
    state, seen = tx.init(grads[0]), []
    for g in grads:
        _, state = tx.update(g, state)
        seen.append(float(state.b1.tree()["w"]))
    renewed = [i for i in range(1, 7) if seen[i] != seen[i - 1]]
    assert renewed == [3, 6]


def test_a_spike_beyond_the_threshold_falls_back():
    sparse = jnp.zeros(1000).at[0].set(1.0)  # E r^2 / (E|r|)^2 = 1000
    assert b1_after([sparse]).b1.tree() == np.float32(0.9)
    assert b1_after([sparse], fallback_threshold=2000.0).b1.tree() < 0.75


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_skip_leaves_the_statistics_of_a_bad_gradient_out(bad):
    good = [random_tree(SHAPES, seed) for seed in range(3)]
    spoiled = [*good[:2], {"w": good[2]["w"].at[0, 0].set(bad), "b": good[2]["b"]}]
    clean, after, before = b1_after(good), b1_after(spoiled), b1_after(good[:2])
    assert after.nonfinite.tree() == {"w": True, "b": False}
    for field in ("first", "second"):
        assert getattr(after, field).tree()["w"] == getattr(before, field).tree()["w"]
    assert after.b1.tree()["w"] == np.float32(0.9)
    assert after.b1.tree()["b"] == clean.b1.tree()["b"]


def test_zero_takes_the_zeroed_gradient_in():
    g = random_tree(SHAPES, 0)
    spoiled = {"w": g["w"].at[0, 0].set(jnp.nan), "b": g["b"]}
    zeroed = {"w": g["w"].at[0, 0].set(0.0), "b": g["b"]}
    actual, expected = b1_after([spoiled], nonfinite="zero"), b1_after([zeroed])
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
def test_no_element_is_frozen_by_an_overflow(nonfinite):
    """A finite gradient whose square is not: in the repository its element never moves again."""
    tx = optax.chain(
        adaptive_beta1(nonfinite=nonfinite, max_abs=10.0), scale_by_adam(b1=None, b2=0.9)
    )
    g = jnp.array([1.0, -1.0])
    updates, state = tx.update(jnp.array([3e38, -1.0]), tx.init(g))
    for _ in range(60):
        updates, state = tx.update(g, state)
    assert jnp.all(jnp.abs(updates) > 0.5)


def test_the_moment_may_have_another_dtype():
    tx = adaptive_beta1(state_dtype=jnp.bfloat16)
    state = tx.init(jnp.ones(3))
    assert (state.mu.dtype, state.b1.values.dtype) == (jnp.bfloat16, jnp.float32)
    assert b1_after([jnp.ones(3)], stat_dtype=jnp.bfloat16).b1.values.dtype == jnp.bfloat16
