"""Which entries are kept, and by what they are scaled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bounds
import chainrule
from chainrule.transforms import cautious, chain, metrics, scale_by_adam, zero_nonfinite

U = jnp.array([1.0, -2.0, 3.0, -4.0, 0.0, 5.0, 6.0, -7.0])
G = jnp.array([1.0, -1.0, -1.0, 1.0, 1.0, 0.0, 0.5, 2.0])
KEPT = np.array([1, 1, 0, 0, 0, 0, 1, 0])
# optax computes 1 - b2**t in float32, and adds eps to a root of at least 0.5.
ADAM = bounds.stepped(1) + bounds.corrected(0.999) / 2 + bounds.shrunk(1e-8, 0.5)


def apply(tx, u, g):
    return tx.update(u, tx.init(u), grad=g)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({}, 8 / 3),
        ({"mean_floor": 0.5}, 2.0),
        ({"normalizer": "mean", "eps": 0.125}, 2.0),
        ({"normalizer": "count"}, 2.0),
        ({"normalizer": "none"}, 1.0),
    ],
)
def test_the_factor_of_each_normalizer(settings, factor):
    updates, state = apply(cautious(**settings), U, G)
    np.testing.assert_allclose(updates, U * KEPT * factor, rtol=bounds.ELEMENTWISE)
    assert metrics(state)["kept_fraction"] == 3 / 8


def test_no_normalizer_is_no_caution():
    updates, state = apply(cautious(None), U, G)
    np.testing.assert_array_equal(updates, U)
    assert not jax.tree.leaves(state)


@given(seed=st.integers(0, 2**16), size=st.sampled_from([1, 2, 40]))
def test_kept_entries_descend_and_their_sum_is_preserved(seed, size):
    rng = np.random.default_rng(seed)
    u, g = (jnp.asarray(rng.normal(size=size), jnp.float32) for _ in range(2))
    updates, _ = apply(cautious("none"), u, g)
    assert np.all(np.asarray(updates * g) >= 0)
    scaled, state = apply(cautious(), u, g)
    if state.kept_fraction > 0:
        np.testing.assert_allclose(scaled * state.kept_fraction, updates, rtol=bounds.summed(size))


def test_after_the_learning_rate_it_is_negated():
    before, _ = apply(cautious(), U, G)
    after, _ = apply(cautious(negated=True), -0.1 * U, G)
    np.testing.assert_allclose(after, -0.1 * before, rtol=bounds.ELEMENTWISE)


@pytest.mark.parametrize("normalizer", ["clamped_mean", "mean", "count", "none"])
def test_disagreement_everywhere_is_a_zero_update(normalizer):
    updates, state = apply(cautious(normalizer, eps=0.0), U, -U)
    np.testing.assert_array_equal(updates, jnp.zeros(8))
    assert state.kept_fraction == 0


def test_small_numbers_agree_although_their_product_underflows():
    tiny = jnp.full(3, 1e-30)
    np.testing.assert_array_equal(apply(cautious(), tiny, tiny)[0], tiny)


def test_complex_entries_agree_by_the_real_part_of_the_product():
    u = jnp.array([1 + 1j, 1 - 1j, 2j])
    g = jnp.array([1 + 0j, -1 + 0j, 1j])
    updates, state = apply(cautious("none"), u, g)
    np.testing.assert_array_equal(updates, jnp.array([1 + 1j, 0, 2j]))
    np.testing.assert_allclose(state.kept_fraction, 2 / 3, rtol=bounds.ELEMENTWISE)


def test_zero_size_leaves_stay_finite():
    empty = jnp.zeros((0, 3))
    updates, state = apply(cautious(), {"e": empty}, {"e": empty})
    assert updates["e"].shape == (0, 3)
    assert jnp.isfinite(state.kept_fraction["e"])


def test_a_bad_raw_gradient_that_was_made_safe_does_not_return():
    tx = chain(zero_nonfinite(), scale_by_adam(), cautious())
    g = jnp.array([1.0, jnp.nan, -1.0])
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates, [1.5, 0.0, -1.5], rtol=bounds.stepped(1))


def test_without_a_gradient_the_error_names_the_remedies():
    tx = optax.chain(optax.scale_by_adam(), cautious())
    with pytest.raises(
        ValueError, match=r"cautious: needs `grad`.*chainrule\.chain.*grad=gradients"
    ):
        tx.update(G, tx.init(G))
    np.testing.assert_allclose(tx.update(G, tx.init(G), grad=G)[0], jnp.sign(G) * 8 / 7, rtol=ADAM)


def test_in_a_partition_the_raw_gradient_is_whole_and_the_updates_are_masked():
    tx = chainrule.chain(
        optax.partition(
            {"a": chain(scale_by_adam(), cautious()), "b": optax.identity()}, {"x": "a", "y": "b"}
        )
    )
    grads = {"x": G, "y": G}
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["x"], jnp.sign(G) * 8 / 7, rtol=ADAM)
    np.testing.assert_array_equal(updates["y"], G)
