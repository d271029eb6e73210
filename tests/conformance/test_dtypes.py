"""State structure, shapes and dtypes are what `init` made them, and updates have the gradient's dtype."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import chainrule
from harness import random_tree, run, signature_of
from registry import every_case, every_chain, every_setting

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
MIXES = list(itertools.product(FLOATS, FLOATS))


def shapes_of(case, dtype):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        case.shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def assert_fixed(tx, params, grads):
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, grads, state, params)
    assert signature_of(after) == signature_of(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)


@pytest.mark.parametrize(("of_params", "of_grads"), MIXES, ids=lambda dtype: dtype.__name__)
@every_setting
def test_fixed_for_every_mix_of_dtypes(case, setting, of_params, of_grads):
    assert_fixed(case.make(setting), shapes_of(case, of_params), shapes_of(case, of_grads))


@every_case
def test_fixed_for_leaves_of_different_dtypes(case):
    leaves, structure = jax.tree.flatten(shapes_of(case, jnp.float32))
    mixed = [
        jax.ShapeDtypeStruct(leaf.shape, dtype)
        for leaf, dtype in zip(leaves, itertools.cycle(FLOATS), strict=False)
    ]
    params = jax.tree.unflatten(structure, mixed)
    assert_fixed(case.make(), params, params)
    assert_fixed(case.make(), params, shapes_of(case, jnp.float32))


@every_case
def test_fixed_with_float64_enabled(case):
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64):
            assert_fixed(case.make(), shapes_of(case, dtype), shapes_of(case, dtype))


@every_chain
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
def test_hyperparameters_are_float32(case, x64):
    with jax.enable_x64(x64):
        for dtype in (jnp.bfloat16, jnp.float32):
            state = jax.eval_shape(case.make().init, shapes_of(case, dtype))
            values = jax.tree.leaves(chainrule.hyperparams(state))
            assert values and all(value.dtype == jnp.float32 for value in values)
            assert state.count.dtype == jnp.int32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@every_case
def test_half_precision_stays_finite_and_near_float32(case, dtype):
    exact = random_tree(case.shapes, 0), [random_tree(case.shapes, seed) for seed in (1, 2, 3)]
    half = jax.tree.map(lambda x: x.astype(dtype), exact)
    tx = case.make()
    updates, _ = run(tx, *half)
    expected, _ = run(tx, *exact)
    for u, e in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        u, e = np.asarray(u, np.float64), np.asarray(e, np.float64)
        assert np.all(np.isfinite(u))
        assert np.max(np.abs(u - e)) <= case.half_tolerance * np.max(np.abs(e))
