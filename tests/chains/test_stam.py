"""STAM and STAMLite as chains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chainrule import chains, metrics
from harness import assert_close, random_tree, run
from registry import TREE

PARAMS = random_tree(TREE, 0)
GRADS = [random_tree(TREE, seed) for seed in range(1, 6)]


@pytest.mark.parametrize("make", [chains.stam, chains.stam_lite])
def test_without_decay_parameters_are_not_needed(make):
    tx = make(weight_decay=None)
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS))
    assert_close(updates, tx.update(GRADS[0], tx.init(PARAMS), PARAMS)[0])


def test_without_adaptation_it_is_adamw():
    settings = {"weight_decay": 0.1, "learning_rate": 0.01}
    ours, _ = run(chains.stam(adapt_strength=0.0, **settings), PARAMS, GRADS)
    theirs, _ = run(chains.adam(**settings), PARAMS, GRADS)
    assert_close(ours, theirs)


@pytest.mark.parametrize("make", [chains.stam, chains.stam_lite])
def test_it_minimises_a_quadratic(make):
    target = jnp.array([1.0, -2.0, 0.5])
    tx = make(learning_rate=0.05, weight_decay=None)

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(x - target, state)
        return (x + updates, state), None

    start = jnp.zeros(3)
    (x, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=400)
    np.testing.assert_allclose(x, target, rtol=0, atol=0.05)


@pytest.mark.parametrize("make", [chains.stam, chains.stam_lite])
@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
def test_a_bad_gradient_is_survived_and_shown(make, nonfinite):
    """Also as the very first one, before there is any statistic."""
    tx = make(learning_rate=0.1, weight_decay=None, nonfinite=nonfinite)
    bad = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), GRADS[0]) | {"scale": GRADS[0]["scale"]}
    params, state = PARAMS, tx.init(PARAMS)
    for g, spoiled in [(bad, True), (GRADS[1], False), (bad, True), (GRADS[2], False)]:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        assert all(jnp.all(jnp.abs(u) < 1.0) for u in jax.tree.leaves(updates))
        shown = metrics(state)["nonfinite"]
        if nonfinite == "skip":
            assert [bool(x) for x in jax.tree.leaves(shown)] == [spoiled, spoiled, False]


def test_lite_keeps_one_moment():
    params = {"w": jnp.zeros((100, 100))}
    ours = metrics(chains.stam_lite().init(params))["state_bytes"]
    theirs = metrics(optax.adamw(1e-3).init(params))["state_bytes"]
    assert ours < 0.51 * theirs
