"""magma around whole optimizers and around directions."""

import jax
import numpy as np
import optax
import pytest

import chainrule
from chainrule import chains
from chainrule.transforms import scale_by_adam
from harness import assert_close, random_tree, run

SHAPES = {"b": (5,), "w": (3, 4)}
PARAMS = random_tree(SHAPES, 0)
GRADS = [random_tree(SHAPES, seed) for seed in range(1, 5)]


@pytest.mark.parametrize(
    ("inner", "moment"),
    [
        (optax.adamw(1e-2), "mu"),
        (optax.lion(1e-2), "mu"),
        (optax.sgd(1e-2, momentum=0.9), "trace"),
        (optax.sgd(1e-2), "own"),
        (chains.adam(1e-2), "mu"),
    ],
    ids=["optax.adamw", "optax.lion", "momentum", "sgd", "chains.adam"],
)
def test_any_inner_optimizer_is_scaled(inner, moment):
    alone, _ = run(inner, PARAMS, GRADS[:1])
    scaled, state = run(chains.magma(inner, mask_prob=1.0, moment=moment), PARAMS, GRADS[:1])
    alignment = chainrule.metrics(state)["alignment"]
    assert_close(scaled[0], jax.tree.map(lambda u, s: u * s, alone[0], alignment))


@pytest.mark.parametrize("masked", [True, False])
def test_decay_is_masked_with_the_inner_optimizer_or_not_at_all(masked):
    """With nothing let through, what is left is the decay that the mask does not reach."""
    if masked:
        tx = chains.magma(chains.adam(0.1, weight_decay=0.5), mask_prob=0.0)
    else:
        tx = chains.magma(scale_by_adam(), mask_prob=0.0, learning_rate=0.1, weight_decay=0.5)
    updates, _ = run(tx, PARAMS, GRADS[:1])
    assert_close(updates[0], jax.tree.map(lambda p: p * (0.0 if masked else -0.05), PARAMS))


def test_only_included_parameters_are_decayed_by_the_decay_mask():
    settings = {"learning_rate": 0.1, "weight_decay": 0.5, "decay_mask": {"b": False, "w": True}}
    updates, _ = run(chains.magma(scale_by_adam(), mask_prob=0.0, **settings), PARAMS, GRADS[:1])
    assert not np.any(updates[0]["b"])
    assert np.all(updates[0]["w"])


def test_the_mask_probability_is_live():
    tx = chains.magma(optax.adamw(1e-2), mask_prob=0.0)
    updates, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    state = chainrule.set_hyperparams(state, mask_prob=1.0)
    updates, _ = tx.update(GRADS[0], state, PARAMS)
    assert all(np.all(u) for u in jax.tree.leaves(updates))


def test_decay_without_a_rate_is_an_error():
    with pytest.raises(ValueError, match=r"weight_decay=0\.1.* with learning_rate=None; give both"):
        chains.magma(scale_by_adam(), weight_decay=0.1)
