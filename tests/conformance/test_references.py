"""Agreement with the float64 oracles over a dozen steps of gradients of varied scale."""

import jax
import numpy as np
import pytest

from harness import flat, random_tree
from reference.steps import as_float64
from registry import CASES

STEPS = 12


@pytest.mark.parametrize(
    ("case", "setting"),
    [
        pytest.param(case, setting, id=f"{case.name}-{index}")
        for case in CASES
        if case.reference is not None
        for index, setting in enumerate(case.settings)
    ],
)
def test_equals_the_reference(case, setting):
    tx, oracle = case.make(setting), case.reference(**setting)
    params = random_tree(case.shapes, 0)
    state, largest = tx.init(params), dict.fromkeys(flat(params), 0.0)
    for seed in range(1, STEPS + 1):
        scale = 10.0 ** np.random.default_rng(seed).uniform(-2, 1)
        grads = jax.tree.map(lambda g, scale=scale: g * scale, random_tree(case.shapes, seed))
        updates, state = tx.update(grads, state, params)
        expected = oracle(as_float64(flat(grads)), as_float64(flat(params)))
        actual = flat(updates)
        assert actual.keys() == expected.keys()
        for path, e in expected.items():
            # The largest update so far: one in which direction and decay cancel has few digits.
            largest[path] = np.max(np.abs(e), initial=largest[path])
            error = np.max(np.abs(actual[path] - e), initial=0.0)
            assert error <= case.tolerance * largest[path], f"{path}, step {seed}"
        params = jax.tree.map(lambda p, u: p - 0.01 * u, params, updates)
