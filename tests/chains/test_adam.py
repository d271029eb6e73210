"""adam and nadam beside optax, and their caution."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
import chainrule
from chainrule import chains
from harness import assert_close, random_tree, run

SHAPES = {"b": (5,), "w": (3, 4)}
PARAMS = random_tree(SHAPES, 0)
GRADS = [random_tree(SHAPES, seed) for seed in range(1, 8)]
# optax computes 1 - b2**t, of which the root is taken, and 1 - b1**t as they stand.
EQUAL = bounds.stepped(len(GRADS)) + bounds.corrected(0.999) / 2 + bounds.corrected(0.9)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (chains.adam(1e-2, weight_decay=None), optax.adam(1e-2)),
        (
            chains.adam(1e-2, 0.8, 0.95, eps=1e-4, weight_decay=0.1, eps_root=1e-3),
            optax.adamw(1e-2, 0.8, 0.95, 1e-4, 1e-3, weight_decay=0.1),
        ),
        (chains.nadam(1e-2, weight_decay=0.1), optax.nadamw(1e-2, weight_decay=0.1)),
        (
            chains.adam(1e-2, weight_decay=0.1, mask={"b": False, "w": True}),
            optax.adamw(1e-2, weight_decay=0.1, mask={"b": False, "w": True}),
        ),
    ],
    ids=["adam", "adamw", "nadamw", "masked decay"],
)
def test_equals_optax(ours, theirs):
    assert_close(run(ours, PARAMS, GRADS)[0], run(theirs, PARAMS, GRADS)[0], EQUAL)


@pytest.mark.parametrize("make", [chains.adam, chains.nadam])
def test_caution_masks_the_direction_and_not_the_decay(make):
    plain, _ = run(make(1.0, weight_decay=None), PARAMS, GRADS)
    tx = make(1.0, weight_decay=0.5, caution="none")
    updates, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    for g in GRADS[1:]:
        updates, state = tx.update(g, state, PARAMS)
    for name in SHAPES:
        kept = np.asarray(plain[-1][name] * GRADS[-1][name]) < 0
        expected = np.where(kept, plain[-1][name], 0) - 0.5 * PARAMS[name]
        assert_close(updates[name], expected, bounds.stepped(len(GRADS)))
        assert 0 < kept.mean() < 1
        np.testing.assert_allclose(
            chainrule.metrics(state)["kept_fraction"][name], kept.mean(), rtol=bounds.ELEMENTWISE
        )


def test_no_caution_keeps_no_state_of_it():
    assert "kept_fraction" not in chainrule.metrics(chains.adam().init(PARAMS))


def test_an_unknown_caution_is_an_error_at_construction():
    with pytest.raises(ValueError, match=r"cautious: `normalizer` must be one of 'clamped_mean'"):
        chains.adam(caution="max")


def test_the_look_ahead_of_keras_is_larger_at_first():
    g = jnp.array([1.0])
    (dozat,), (keras,) = (
        run(chains.nadam(1.0, weight_decay=None, nesterov=n), g, [g])[0] for n in (True, "keras")
    )
    np.testing.assert_allclose(
        [dozat[0], keras[0]], [-(0.9 * 0.1 / 0.19 + 1), -1.9], rtol=bounds.stepped(1)
    )
