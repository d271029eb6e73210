"""Odd trees: holes, nothing at all, scalars, no elements, complex and integer leaves, the wrong structure."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import chainrule
from chainrule import transforms
from harness import assert_close, assert_identical, random_tree, run, signature_of
from registry import CASES, every_case, every_chain


def without_first(tree, hole):
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [hole, *leaves[1:]])


def finite(tree, initial=None):
    """No NaN and no infinity, save where `initial` is NaN: nothing measured yet."""
    leaves = [x for x in jax.tree.leaves(tree) if np.issubdtype(x.dtype, np.inexact)]
    if initial is None:
        return all(np.all(np.isfinite(x)) for x in leaves)
    starts = [x for x in jax.tree.leaves(initial) if np.issubdtype(x.dtype, np.inexact)]
    return all(np.all(np.isfinite(x) | np.isnan(y)) for x, y in zip(leaves, starts, strict=True))


def fixed(tx, params, grads):
    """Updates and state after two steps; the state is as `init` made it."""
    updates, state = run(tx, params, [grads, grads])
    assert signature_of(state) == signature_of(tx.init(params))
    return updates[-1], state


@every_case
def test_none_leaves(case):
    params, grads = (without_first(random_tree(case.shapes, seed), None) for seed in (0, 1))
    updates, _ = fixed(case.make(), params, grads)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))


@every_case
def test_masked_leaves_pass_and_the_others_do_not_notice(case):
    params, grads = (random_tree(case.shapes, seed) for seed in (0, 1))
    mask = without_first(jax.tree.map(lambda _: True, params), False)
    masked, _ = fixed(optax.masked(case.make(), mask), params, grads)
    alone, _ = fixed(case.make(), without_first(params, None), without_first(grads, None))
    np.testing.assert_array_equal(jax.tree.leaves(masked)[0], jax.tree.leaves(grads)[0])
    assert_identical(without_first(masked, None), alone)


@every_case
def test_partition_equals_each_part_alone(case):
    params, grads = (random_tree(case.shapes, seed) for seed in (0, 1))
    labels = without_first(jax.tree.map(lambda _: "rest", params), "first")
    tx = optax.partition({"first": optax.set_to_zero(), "rest": case.make()}, labels)
    updates, _ = fixed(tx, params, grads)
    alone, _ = fixed(case.make(), without_first(params, None), without_first(grads, None))
    assert not np.any(jax.tree.leaves(updates)[0])
    assert_identical(without_first(updates, None), alone)


@every_case
@pytest.mark.parametrize("tree", [{}, (), {"a": None}], ids=str)
def test_empty_trees(case, tree):
    updates, _ = fixed(case.make(), tree, tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)


@every_case
def test_a_single_array(case):
    params, grads = (jax.tree.leaves(random_tree(case.shapes, seed))[1] for seed in (0, 1))
    updates, _ = fixed(case.make(), params, grads)
    assert updates.shape == params.shape


@every_case
def test_zero_size_leaves_are_no_nan(case):
    params, grads = (
        {"none": jnp.zeros((0, 2)), "of": jnp.zeros((3, 0)), **random_tree(case.shapes, seed)}
        for seed in (0, 1)
    )
    updates, state = fixed(case.make(), params, grads)
    assert updates["of"].shape == (3, 0)
    assert finite(updates) and finite(state, case.make().init(params))


@every_case
def test_zero_gradients_are_no_nan(case):
    params = random_tree(case.shapes, 0)
    updates, _ = fixed(case.make(), params, jax.tree.map(jnp.zeros_like, params))
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))


@every_case
def test_complex_leaves_work_or_are_refused(case):
    params, grads = (random_tree(case.shapes, seed, jnp.complex64) for seed in (0, 1))
    if case.complex_error:
        with pytest.raises(TypeError, match=case.complex_error):
            run(case.make(), params, [grads])
        return
    updates, _ = fixed(case.make(), params, grads)
    for u in jax.tree.leaves(updates):
        assert u.dtype == jnp.complex64
        assert np.all(np.isfinite(u))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name) for case in CASES if not case.stateless]
)
def test_integer_parameters_are_refused(case):
    params = without_first(random_tree(case.shapes, 0), jnp.arange(3))
    with pytest.raises(TypeError, match=r"int32.*floating-point"):
        case.make().init(params)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name) for case in CASES if not case.stateless]
)
@pytest.mark.parametrize("with_params", [True, False], ids=["params", "no params"])
def test_gradients_of_another_structure_are_refused(case, with_params):
    params = random_tree(case.shapes, 0)
    tx = case.make()
    for grads in ({"other": jnp.ones(3)}, {**params, "other": jnp.ones(3)}, [1.0, 2.0]):
        with pytest.raises(ValueError):
            tx.update(grads, tx.init(params), params if with_params else None)


@every_chain
def test_a_gradient_of_another_shape_is_refused(case):
    params = random_tree(case.shapes, 0)
    grads = without_first(params, jnp.ones((7, 7)))
    tx = case.make()
    with pytest.raises(ValueError, match=r"the gradient of .* has shape \(7, 7\), the parameter"):
        tx.update(grads, tx.init(params), params)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name) for case in CASES if case.needs_params]
)
def test_missing_parameters_are_named(case):
    params, grads = (random_tree(case.shapes, seed) for seed in (0, 1))
    tx = case.make()
    with pytest.raises(ValueError, match=r"param"):
        tx.update(grads, tx.init(params))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name) for case in CASES if not case.needs_params]
)
def test_parameters_are_optional_where_nothing_reads_them(case):
    params, grads = (random_tree(case.shapes, seed) for seed in (0, 1))
    tx = case.make()
    assert_close(tx.update(grads, tx.init(params))[0], tx.update(grads, tx.init(params), params)[0])


@every_case
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_gradients_follow_the_policy(case, value):
    """Zeroed, and shown as a metric, where the case says so; else visible, and cured by `zero_nonfinite`."""
    params, good = (random_tree(case.shapes, seed) for seed in (0, 1))
    bad = jax.tree.map(lambda g: g.reshape(-1).at[0].set(value).reshape(g.shape), good)

    tx = case.make()
    updates, state = run(tx, params, [good, bad])
    if case.zeroes_nonfinite:
        assert finite(updates) and finite(state, tx.init(params))
        assert np.all(jax.tree.leaves(chainrule.metrics(state)["nonfinite"]))
    else:
        # The sign of an infinite gradient is finite.
        assert np.isinf(value) or not finite((updates[-1], state))
    safe = chainrule.chain(transforms.zero_nonfinite(), tx)
    updates, state = run(safe, params, [good, bad, good])
    assert finite(updates) and finite(state, safe.init(params))
    assert chainrule.metrics(state)["nonfinite_total"] == len(jax.tree.leaves(params))
