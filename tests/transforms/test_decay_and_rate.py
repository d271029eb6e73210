"""The two links that end an optimizer."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
from chainrule.transforms import decay_and_rate

PARAMS, UPDATES = (
    {"b": jnp.array(4.0), "w": jnp.array([1.0, -2.0])},
    {"b": jnp.array(0.5), "w": jnp.ones(2)},
)


def once(tx):
    return tx.update(UPDATES, tx.init(PARAMS), PARAMS)[0]


def test_both():
    updates = once(decay_and_rate(0.5, weight_decay=0.1))
    np.testing.assert_allclose(updates["w"], [-0.5 * 1.1, -0.5 * 0.8], rtol=bounds.ELEMENTWISE)
    np.testing.assert_allclose(updates["b"], -0.5 * 0.9, rtol=bounds.ELEMENTWISE)


def test_the_mask_says_what_decays():
    updates = once(decay_and_rate(0.5, weight_decay=0.1, mask={"b": False, "w": True}))
    np.testing.assert_allclose(updates["b"], -0.25, rtol=bounds.ELEMENTWISE)
    np.testing.assert_allclose(updates["w"], [-0.55, -0.4], rtol=bounds.ELEMENTWISE)


def test_it_is_the_end_of_adamw():
    tx = optax.chain(optax.scale_by_adam(), decay_and_rate(0.1, weight_decay=0.2))
    expected = once(optax.adamw(0.1, weight_decay=0.2))
    np.testing.assert_allclose(once(tx)["w"], expected["w"], rtol=bounds.ELEMENTWISE)


def test_a_schedule_counts_updates():
    tx = decay_and_rate(lambda count: 1.0 / (1 + count))
    state = tx.init(PARAMS)
    seen = []
    for _ in range(3):
        updates, state = tx.update(UPDATES, state)
        seen.append(updates["w"][0].item())
    np.testing.assert_allclose(seen, [-1, -1 / 2, -1 / 3], rtol=bounds.ELEMENTWISE)


def test_neither_is_the_identity():
    assert once(decay_and_rate()) is UPDATES


def test_a_decay_without_a_rate_is_an_error():
    with pytest.raises(ValueError, match=r"weight_decay=0.1 with learning_rate=None; give both"):
        decay_and_rate(weight_decay=0.1)
