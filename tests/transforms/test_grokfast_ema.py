"""The exponential filter of Grokfast: where its average starts and what it adds."""

import jax.numpy as jnp
import numpy as np
import pytest

import bounds
from chainrule.transforms import grokfast_ema


def run(tx, gradients):
    state, seen = tx.init(gradients[0]), []
    for g in gradients:
        updates, state = tx.update(g, state)
        seen.append(updates)
    return jnp.stack(seen), state


@pytest.mark.parametrize(("start", "factor"), [("first", 1 + 2.0), ("zero", 1 + 2.0 * 0.1)])
def test_the_first_update(start, factor):
    g = jnp.array([1.0, -2.0])
    updates, _ = run(grokfast_ema(0.9, lamb=2.0, start=start), [g])
    np.testing.assert_allclose(updates[0], factor * g, rtol=bounds.ELEMENTWISE)


@pytest.mark.parametrize("start", ["first", "zero"])
def test_a_constant_gradient_is_amplified_by_one_plus_lamb_at_last(start):
    g = jnp.array([0.5])
    updates, _ = run(grokfast_ema(0.5, lamb=5.0, start=start), [g] * 40)
    np.testing.assert_allclose(updates[-1], 6 * g, rtol=bounds.ELEMENTWISE)


def test_an_alternating_gradient_is_not_amplified():
    gradients = [jnp.array([(-1.0) ** i]) for i in range(400)]
    updates, _ = run(grokfast_ema(0.98, lamb=2.0, start="zero"), gradients)
    np.testing.assert_allclose(jnp.abs(updates[-2:]), 1.0, atol=2 * (1 - 0.98) / (1 + 0.98) * 1.01)


def test_no_amplification_is_the_identity():
    gradients = [jnp.array([1.0, -3.0]), jnp.array([2.0, 0.0])]
    updates, _ = run(grokfast_ema(lamb=0.0), gradients)
    np.testing.assert_array_equal(updates, jnp.stack(gradients))


def test_the_average_is_kept_in_the_dtype_asked_for():
    tx = grokfast_ema(state_dtype=jnp.bfloat16)
    _, state = run(tx, [jnp.ones(2)] * 2)
    assert state.ema.dtype == jnp.bfloat16
