"""Chains are their links; everything works inside stock optax and inside `chainrule.chain`."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import chainrule
from chainrule.transforms import posted
from harness import assert_close, assert_identical, random_tree, run, signature_of
from registry import every_case, every_chain

STEPS = 4


def by_hand(links, params, grads):
    """Runs the links one after the other, each with the raw gradient and what the earlier ones remember."""
    links = [optax.with_extra_args_support(link) for link in links]
    states = [link.init(params) for link in links]
    seen = []
    for g in grads:
        updates, known = g, {"grad": g}
        for index, link in enumerate(links):
            updates, states[index] = link.update(updates, states[index], params, **known)
            known |= posted(states[index])
        params = optax.apply_updates(params, updates)
        seen.append(updates)
    return seen


@every_chain
def test_a_chain_equals_its_links_by_hand(case):
    params = random_tree(case.shapes, 0)
    grads = [random_tree(case.shapes, seed) for seed in range(1, STEPS + 1)]
    updates, _ = run(case.make(), params, grads)
    for actual, expected in zip(updates, by_hand(case.links(), params, grads), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("chain", [optax.chain, chainrule.chain])
@every_case
def test_it_is_a_link_like_any_other(case, chain):
    params = random_tree(case.shapes, 0)
    grads = [random_tree(case.shapes, seed) for seed in range(1, STEPS + 1)]
    inside, _ = run(chain(case.make(), optax.scale(0.5)), params, grads[:1])
    alone, _ = run(case.make(), params, grads[:1])
    assert_identical(inside[0], jax.tree.map(lambda u: 0.5 * u, alone[0]))


WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step > 1),
    "masked": lambda tx: optax.masked(tx, lambda params: jax.tree.map(lambda _: True, params)),
    "partition": lambda tx: optax.partition(
        {"all": tx}, lambda params: jax.tree.map(lambda _: "all", params)
    ),
    "named_chain": lambda tx: optax.named_chain(("tx", tx), ("identity", optax.identity())),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
@every_case
def test_it_traces_inside_the_wrappers_of_optax(case, wrap):
    """Traced without compiling: what a wrapper needs is that both branches of its condition have one type."""
    tx = wrap(case.make())
    params = random_tree(case.shapes, 0)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert signature_of(after) == signature_of(state)


@every_case
def test_multi_steps_of_one_gradient_is_one_step_of_it(case):
    tx = optax.MultiSteps(case.make(), 2)
    params, grads = random_tree(case.shapes, 0), random_tree(case.shapes, 1)
    with jax.disable_jit():  # its conditions would be compiled each time
        held, state = tx.update(grads, tx.init(params), params)
        updates, _ = tx.update(grads, state, params)
    expected, _ = run(case.make(), params, [grads])
    assert not any(jnp.any(u) for u in jax.tree.leaves(held))
    assert_close(updates, expected[0])
