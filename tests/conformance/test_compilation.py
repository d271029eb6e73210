"""jit, vmap and scan agree with the plain loop, and nothing compiles twice."""

import jax
import jax.numpy as jnp
import numpy as np

import chainrule
from harness import assert_close, compiled_once, random_tree, run, signature_of
from registry import every_case, every_chain, every_setting

STEPS = 3


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@every_setting
def test_jit_equals_eager_and_compiles_once(case, setting):
    tx = case.make(setting)
    params = random_tree(case.shapes, 0)
    grads = [random_tree(case.shapes, seed) for seed in range(1, STEPS + 1)]
    expected, _ = run(tx, params, grads)
    step = compiled_once(tx.update)
    state = tx.init(params)
    for g, u in zip(grads, expected, strict=True):
        updates, state = step(g, state, params)
        assert_close(updates, u)
        params = jax.tree.map(jnp.add, params, u)
    for name, value in chainrule.hyperparams(state).items():
        state = chainrule.set_hyperparams(state, **{name: float(value)})
    step(grads[0], state, params)


@every_chain
def test_the_learning_rate_is_live(case):
    tx = case.make()
    params, grads = random_tree(case.shapes, 0), random_tree(case.shapes, 1)
    updates, state = tx.update(grads, tx.init(params), params)
    assert any(np.any(u != 0) for u in jax.tree.leaves(updates))
    stopped = chainrule.set_hyperparams(state, learning_rate=0.0)
    assert signature_of(stopped) == signature_of(state)
    updates, _ = tx.update(grads, stopped, params)
    assert not any(np.any(u != 0) for u in jax.tree.leaves(updates))


@every_chain
def test_a_schedule_is_called_with_the_updates_made(case):
    rates = jnp.array([0.0, 0.0, 0.25])
    tx = case.make({**case.settings[0], "learning_rate": lambda count: rates[count]})
    params, grads = random_tree(case.shapes, 0), random_tree(case.shapes, 1)
    state, seen = tx.init(params), []
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        moves = any(np.any(u != 0) for u in jax.tree.leaves(updates))
        seen.append((moves, chainrule.hyperparams(state)["learning_rate"].item()))
    assert seen == [(False, 0.0), (False, 0.0), (True, 0.25)]


@every_case
def test_vmap_equals_a_loop(case):
    tx = case.make()
    params = [random_tree(case.shapes, seed) for seed in (0, 10)]
    grads = [random_tree(case.shapes, seed) for seed in (1, 11)]

    states = [tx.init(p) for p in params]
    batched, _ = jax.jit(jax.vmap(tx.update))(stacked(grads), stacked(states), stacked(params))
    loop = [tx.update(*step)[0] for step in zip(grads, states, params, strict=True)]
    assert_close(batched, stacked(loop))


@every_case
def test_scan_equals_a_loop(case):
    tx = case.make()
    params = random_tree(case.shapes, 0)
    grads = [random_tree(case.shapes, seed) for seed in range(1, STEPS + 1)]

    def body(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), updates

    (_, state), updates = jax.lax.scan(body, (params, tx.init(params)), stacked(grads))
    expected, expected_state = run(tx, params, grads)
    assert_close(updates, stacked(expected))
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
