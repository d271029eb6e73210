"""What optax asks of every transformation of its own, of ours.

The rest of its common properties have files of their own here: one compilation (`test_compilation`), fixed dtypes
(`test_dtypes`), `optax.tree.map_params` (`test_ecosystem`), wrappers (`test_composition`), odd trees (`test_trees`).
"""

import chex
import jax
import numpy as np
import optax
from absl.testing import parameterized

from harness import assert_close, assert_identical, random_tree, run
from registry import CASES, every_case, every_chain


@every_case
def test_arguments_that_nobody_asked_for_change_nothing(case):
    params, grads = random_tree(case.shapes, 0), [random_tree(case.shapes, 1)] * 2
    expected = run(case.make(), params, grads)
    assert_identical(run(case.make(), params, grads, not_an_argument=object()), expected)


@every_case
def test_eval_shape_says_what_is_made(case):
    params, grads = (random_tree(case.shapes, seed) for seed in (0, 1))
    tx = case.make()
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), state)
    said = jax.eval_shape(tx.update, grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(said, tx.update(grads, state, params))


@every_case
def test_nothing_given_is_changed(case):
    """Arrays of NumPy could be."""
    params, grads = (jax.tree.map(np.array, random_tree(case.shapes, seed)) for seed in (0, 1))
    kept = jax.tree.map(np.copy, (params, grads))
    run(case.make(), params, [grads])
    assert_identical((params, grads), kept)


@every_chain
def test_the_learning_rate_can_be_injected(case):
    """By optax, which makes the chain anew at every update with an array in its place."""

    def make(learning_rate):
        return case.make({**case.settings[0], "learning_rate": learning_rate})

    params, grads = random_tree(case.shapes, 0), [random_tree(case.shapes, s) for s in (1, 2)]
    injected = optax.inject_hyperparams(make)(learning_rate=0.125)
    updates, state = run(injected, params, grads)
    expected, _ = run(make(0.125), params, grads)
    assert_close(updates, expected)
    state.hyperparams["learning_rate"] = state.hyperparams["learning_rate"] * 0
    last, _ = injected.update(grads[0], state, params)
    assert not any(np.any(u) for u in jax.tree.leaves(last))


@every_case
def test_it_can_be_given_by_name(case):
    """`init` and `update` have optax's names for their arguments."""
    params, grads = (random_tree(case.shapes, seed) for seed in (0, 1))
    tx = case.make()
    state = tx.init(params=params)
    by_name = tx.update(updates=grads, state=state, params=params)
    assert_identical(by_name, tx.update(grads, state, params))


class TestVariants(chex.TestCase):
    """chex's; those of `jit` are in `test_compilation`."""

    @chex.variants(with_device=True, without_device=True)
    @parameterized.named_parameters((case.name, case) for case in CASES)
    def test_a_step_is_the_same(self, case):
        """State, gradients and parameters may be arrays of JAX or of NumPy."""
        params, grads = (random_tree(case.shapes, seed) for seed in (0, 1))
        tx = case.make()
        given = grads, tx.init(params), params
        assert_identical(self.variant(tx.update)(*given), tx.update(*given))
