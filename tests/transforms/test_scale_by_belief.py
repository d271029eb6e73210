"""Adam's direction on the deviation of the gradient from its mean."""

import jax.numpy as jnp
import numpy as np
import pytest

import bounds
from chainrule.transforms import scale_by_belief
from harness import assert_close, random_tree, run

B1, B2, EPS = 0.8, 0.95, 1e-3
GRADS = [np.asarray(random_tree((7,), seed)) + 0.2 for seed in range(6)]


def formula(grads, deviation):
    """Both forms as the file states them, in float64."""
    m = s = np.zeros(7)
    seen = []
    for t, g in enumerate((np.float64(g) for g in grads), start=1):
        if deviation == "raw":
            d, weight = g - m, 1 - B2**t
        else:
            d = g - m / (1 - B1 ** (t - 1)) if t > 1 else np.zeros(7)
            weight = 1 - B2 ** max(t - 1, 1)
        m, s = B1 * m + (1 - B1) * g, B2 * s + (1 - B2) * d**2
        mean = m / (1 - B1**t)
        seen.append((mean / (np.sqrt(mean**2 + s / weight) + EPS), m, s))
    return seen


@pytest.mark.parametrize("deviation", ["unbiased", "raw"])
def test_follows_the_formula(deviation):
    tx = scale_by_belief(B1, B2, EPS, deviation=deviation)
    state = tx.init(jnp.zeros(7))
    for g, (u, m, s) in zip(GRADS, formula(GRADS, deviation), strict=True):
        updates, state = tx.update(jnp.asarray(g), state)
        assert_close(updates, u, bounds.stepped(len(GRADS)))
        assert_close(state.mu, m, bounds.stepped(len(GRADS)))
        assert_close(state.nu, s, bounds.stepped(len(GRADS)))


def test_a_constant_gradient_has_no_variance():
    g = jnp.array([3.0, -0.5])
    updates, state = run(scale_by_belief(eps=0.0), jnp.zeros(2), [g] * 5)
    np.testing.assert_allclose(jnp.stack(updates), [[1.0, -1.0]] * 5, rtol=bounds.stepped(5))
    np.testing.assert_allclose(state.nu, 0, atol=(3 * bounds.stepped(5)) ** 2)


@pytest.mark.parametrize(("steps", "expected"), [(1, 0.7071), (10, 0.83), (50, 0.95)])
def test_a_raw_deviation_takes_the_first_gradient_for_noise(steps, expected):
    """As measured on the repository."""
    g = jnp.array([2.0])
    updates, _ = run(scale_by_belief(deviation="raw"), g, [g] * steps)
    np.testing.assert_allclose(updates[-1], expected, rtol=0, atol=0.01)  # two digits are given


def test_an_entry_without_gradient_does_not_move():
    g = jnp.array([0.0, 1.0])
    updates, _ = run(scale_by_belief(), g, [g] * 3)
    assert [u[0].item() for u in updates] == [0.0] * 3


def test_the_moments_have_the_dtypes_asked_for():
    tx = scale_by_belief(mu_dtype=jnp.bfloat16, nu_dtype=jnp.float16)
    _, state = run(tx, jnp.zeros(3), [jnp.ones(3)] * 2)
    assert (state.mu.dtype, state.nu.dtype) == (jnp.bfloat16, jnp.float16)
