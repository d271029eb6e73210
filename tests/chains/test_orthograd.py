"""orthograd in front of an optimizer."""

import jax
import numpy as np
import optax
import pytest

import bounds
from chainrule import chains
from harness import random_tree, run

SHAPES = {"b": (5,), "w": (3, 4)}
PARAMS = random_tree(SHAPES, 0)
GRADS = [random_tree(SHAPES, seed) for seed in range(1, 4)]
ORTHOGONAL = 4 * bounds.summed(12)  # more than a quarter of each gradient is left


def test_steps_of_gradient_descent_are_orthogonal_to_the_parameters():
    updates, _ = run(chains.orthograd(optax.sgd(1.0)), PARAMS, GRADS[:1])
    for name in SHAPES:
        u, p = np.ravel(updates[0][name]), np.ravel(PARAMS[name])
        assert abs(u @ p) < ORTHOGONAL * np.linalg.norm(u) * np.linalg.norm(p)
        np.testing.assert_allclose(
            np.linalg.norm(u), np.linalg.norm(GRADS[0][name]), rtol=bounds.summed(12)
        )


def test_the_inner_optimizer_decays_and_advances():
    """In KerasOptimizers' wrapper the wrapped Adam stays at its first step and does not decay."""
    zeros = jax.tree.map(np.zeros_like, GRADS[0])
    updates, state = run(chains.orthograd(chains.adam(0.1, weight_decay=0.5)), PARAMS, [zeros] * 3)
    for name in SHAPES:
        np.testing.assert_allclose(updates[0][name], -0.05 * PARAMS[name], rtol=bounds.ELEMENTWISE)
    assert state.inner_state[1].count == 3


def test_without_parameters_the_error_says_how_to_call():
    tx = chains.orthograd(optax.sgd(1.0))
    with pytest.raises(ValueError, match="orthograd: needs the parameters"):
        tx.update(GRADS[0], tx.init(PARAMS))
