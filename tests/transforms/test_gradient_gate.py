"""A gate on noisy gradients, tier by tier."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
import chainrule
from chainrule.transforms import chain, gradient_gate

STEADY = jnp.array([1.0, -1.0, 1.0, -1.0])  # var / mean|g|^2 is 1: open
NOISY = jnp.array([8.0] + [0.0] * 15)  # 15: closed


def gates(grads, losses=None, **settings):
    """The gate after each gradient."""
    tx = gradient_gate(**{"warmup_steps": 0, "update_interval": 1, **settings})
    state, seen = tx.init(grads[0]), []
    for g, loss in zip(grads, losses or [None] * len(grads), strict=True):
        updates, state = tx.update(jnp.ones_like(g), state, grad=g, value=loss)
        seen.append(chainrule.metrics(state)["gate_scale"].item())
        np.testing.assert_allclose(updates, max(seen[-1], 0.1), rtol=bounds.ELEMENTWISE)
    return seen


def test_variance_closes_it():
    assert gates([STEADY], min_scale=0.3) == bounds.near([1.0])
    assert gates([NOISY], min_scale=0.3) == bounds.near([0.3])


def test_between_the_bounds_it_falls_in_a_line():
    g = np.array([1.0] + [0.0] * 6)  # var / mean|g|^2 = n - 1 = 6, half way from 4 to 8
    np.testing.assert_allclose(
        gates([jnp.asarray(g, jnp.float32)]), [1 - 0.5 * 0.8], rtol=bounds.summed(7)
    )


def test_a_change_of_magnitude_closes_it():
    """d = |a - e| / e with e = 0.9 + 0.1 a: 2.5 times the magnitude is 1.35 / 1.15, beyond 1."""
    assert gates([STEADY, 2.5 * STEADY]) == bounds.near([1.0, 0.2])
    change = 0.9 / 1.1  # of twice the magnitude
    assert gates([STEADY, 2 * STEADY]) == bounds.near([1.0, 1 - (change - 0.5) / 0.5 * 0.8])


def test_a_loss_that_jumps_closes_it():
    assert gates([STEADY] * 3, [1.0, 1.2, 2.0]) == bounds.near([1.0, 1.0, 0.2])
    assert gates([STEADY] * 3, [-2.0, -1.9, -1.0]) == bounds.near([1.0, 1.0, 0.2])
    assert gates([STEADY] * 2, [-1.0, -2.0]) == bounds.near([1.0, 1.0])


def test_it_comes_in_after_the_warmup():
    assert gates([NOISY] * 5, warmup_steps=2) == bounds.near([1.0, 1.0, 0.6, 0.2, 0.2])


def test_it_measures_every_so_many_steps():
    steps = [STEADY, NOISY, NOISY, NOISY, STEADY, STEADY]
    seen = gates(steps, update_interval=3)
    assert seen == bounds.near([1.0, 1.0, 0.2, 0.2, 0.2, 1.0])


def test_tiers_have_rates_and_those_above_the_gate_are_open():
    tx = gradient_gate(1, warmup_steps=0, update_interval=1, tier_scale=(0.01, 1.0, 2.0))
    grads = {"a": NOISY, "b": NOISY, "c": STEADY}
    ones = {name: jnp.ones_like(g) for name, g in grads.items()}
    updates, state = tx.update(ones, tx.init(grads), grad=grads, tiers=(0, 1, 2))
    assert state.gate_scale == bounds.near(0.2)
    expected = {"a": 0.1, "b": 0.2, "c": 2.0}  # 0.1: min_lr_scale
    assert {name: u[0].item() for name, u in updates.items()} == bounds.near(expected)


def test_a_synced_step_takes_the_rate_of_the_higher_tier():
    tx = gradient_gate(0, warmup_steps=0, update_interval=1, tier_scale=(0.5, 1.0, 2.0))
    for full_sync, expected in ((True, 1.0), (False, 0.1)):
        updates, state = tx.update(
            {"w": jnp.ones_like(NOISY)},
            tx.init(NOISY),
            grad={"w": NOISY},
            tiers=(0,),
            synced_tiers=(1,),
            full_sync=full_sync,
        )
        assert state.gate_scale == bounds.near(0.2)
        assert updates["w"][0].item() == bounds.near(expected)


def test_a_tier_needs_a_rate():
    tx = gradient_gate(tier_scale=(1.0, 1.0))
    with pytest.raises(
        ValueError, match="`tier_scale` must have a rate for each tier, got 2 for tiers up to 2"
    ):
        tx.update({"w": jnp.ones_like(NOISY)}, tx.init(NOISY), grad={"w": NOISY}, tiers=(2,))


def test_a_gradient_that_is_not_finite_opens_it():
    assert gates([STEADY, STEADY.at[0].set(jnp.nan), STEADY]) == bounds.near([1.0, 1.0, 1.0])


def test_no_tensor_below_the_gate_is_no_gate():
    tx = chain(optax.scale_by_sign(), gradient_gate(-1, warmup_steps=0, update_interval=1))
    updates, _ = tx.update(NOISY, tx.init(NOISY))
    np.testing.assert_array_equal(updates, jnp.sign(NOISY))
