"""grokfast in front of an optimizer whose own state advances."""

import numpy as np
import optax

import bounds
import chainrule
from chainrule import chains
from harness import assert_close, random_tree, run

SHAPES = {"b": (5,), "w": (3, 4)}
PARAMS = random_tree(SHAPES, 0)
GRADS = [random_tree(SHAPES, seed) for seed in range(1, 8)]


def test_it_is_the_inner_optimizer_on_filtered_gradients():
    average, filtered = GRADS[0], []
    for g in GRADS:
        average = {k: 0.5 * average[k] + 0.5 * g[k] for k in g}
        filtered.append({k: g[k] + 2.0 * average[k] for k in g})
    ours, _ = run(chains.grokfast(optax.adamw(1e-2), alpha=0.5), PARAMS, GRADS)
    assert_close(ours, run(optax.adamw(1e-2), PARAMS, filtered)[0], bounds.stepped(2 * len(GRADS)))


def test_the_inner_step_count_bias_correction_and_decay_advance():
    """In KerasOptimizers' wrapper the wrapped Adam stays at its first step and does not decay."""
    tx = chains.grokfast(chains.adam(1.0, weight_decay=0.1), lamb=1.0)
    updates, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    for _ in range(50):
        updates, state = tx.update(GRADS[0], state, PARAMS)
    # A constant gradient stays constant behind the filter, and Adam's step on it is its sign.
    expected = {k: -np.sign(g) - 0.1 * PARAMS[k] for k, g in GRADS[0].items()}
    assert_close(updates, expected, bounds.stepped(51))


def test_a_schedule_of_the_inner_optimizer_advances():
    tx = chains.grokfast(optax.sgd(lambda count: 1.0 / (1.0 + count)), lamb=0.0)
    updates, _ = run(tx, PARAMS, [GRADS[0]] * 3)
    assert_close(updates[2], {k: -g / 3 for k, g in GRADS[0].items()})


def test_the_hyperparameters_of_both_are_live():
    tx = chains.grokfast(chains.adam(1e-2))
    state = tx.init(PARAMS)
    assert {"alpha", "lamb", "learning_rate", "b1"} <= set(chainrule.hyperparams(state))
