"""A state written to plain arrays mid-run goes on bit for bit."""

import pickle

import jax
import numpy as np
import pytest

from harness import assert_identical, random_tree, run
from registry import every_case, every_setting


def through_numpy(state, like):
    """Leaves by path, as a checkpoint holds them, into the structure of a fresh state."""
    saved = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(like)]
    assert sorted(paths) == sorted(saved)
    leaves = [jax.numpy.asarray(saved[path]) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def through_pickle(state, _):
    return pickle.loads(pickle.dumps(state))


@pytest.mark.parametrize("through", [through_numpy, through_pickle])
@every_setting
def test_a_run_goes_on_bit_for_bit(case, setting, through):
    tx = case.make(setting)
    params = random_tree(case.shapes, 0)
    grads = [random_tree(case.shapes, seed) for seed in range(1, 5)]
    expected, expected_state = run(tx, params, grads)
    first, state = run(tx, params, grads[:2])
    for updates in first:
        params = jax.tree.map(jax.numpy.add, params, updates)
    second, state = run(tx, params, grads[2:], through(state, tx.init(params)))
    assert_identical(first + second, expected)
    assert_identical(state, expected_state)


@every_case
def test_init_is_a_function_of_the_parameters_alone(case):
    params = random_tree(case.shapes, 0)
    assert_identical(case.make().init(params), case.make().init(params))
