"""Momentum as an average, and its look-aheads."""

import jax.numpy as jnp
import numpy as np
import pytest

import bounds
from chainrule.transforms import ema_momentum
from harness import assert_close, random_tree, run

B = 0.8
GRADS = [np.asarray(random_tree((5,), seed)) for seed in range(5)]


def formula(nesterov, debias):
    mu, seen = np.zeros(5), []
    for t, g in enumerate((np.float64(g) for g in GRADS), start=1):
        mu = B * mu + (1 - B) * g
        now, ahead = (1 - B**t, 1 - B ** (t + 1)) if debias else (1, 1)
        seen.append(
            {
                None: mu / now,
                "lerp": (1 - B) * g / now + B * mu / ahead,
                "raw": g + B * mu,
                "elementwise": (1 - mu) * g + B * mu,
            }[nesterov]
        )
    return seen


@pytest.mark.parametrize(
    ("nesterov", "debias"),
    [
        *((form, False) for form in (None, "lerp", "raw", "elementwise")),
        (None, True),
        ("lerp", True),
    ],
)
def test_follows_the_formula(nesterov, debias):
    updates, _ = run(ema_momentum(B, nesterov, debias=debias), jnp.zeros(5), GRADS)
    assert_close(updates, formula(nesterov, debias), bounds.stepped(5))


def test_a_constant_gradient_is_itself_when_debiased():
    g = jnp.array([3.0, -0.5])
    updates, _ = run(ema_momentum(nesterov=None, debias=True), g, [g] * 4)
    np.testing.assert_allclose(updates, [g] * 4, rtol=bounds.stepped(4))


def test_no_memory_is_the_gradient():
    for nesterov in (None, "lerp", "raw"):
        updates, _ = run(ema_momentum(0.0, nesterov), jnp.zeros(5), GRADS)
        np.testing.assert_array_equal(updates, GRADS)


def test_the_average_is_in_the_dtype_asked_for():
    _, state = run(ema_momentum(mu_dtype=jnp.bfloat16), jnp.zeros(3), [jnp.ones(3)] * 2)
    assert state.mu.dtype == jnp.bfloat16
    assert state.count == 2
