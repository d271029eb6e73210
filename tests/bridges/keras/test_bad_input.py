"""Errors come before anything is written, and say what to do."""

import keras
import numpy as np
import optax
import pytest

import chainrule
from chainrule import chains, keras_optimizers

pytestmark = pytest.mark.keras


def changes_shapes():
    def update(updates, state, params=None):
        return updates, {
            name: np.zeros((*np.shape(u), 1), np.float32) for name, u in updates.items()
        }

    return optax.GradientTransformation(lambda params: params, update)


CASES = {
    "an unmatched pattern": (
        lambda: keras_optimizers.Muon(exclude_layers=["hiden"]),
        ValueError,
        "`exclude` pattern 'hiden' matches none of the leaves 'kernel'",
    ),
    "reads the loss": (
        lambda: chainrule.KerasBridge(optax.polyak_sgd()),
        TypeError,
        r"reads the loss \(`value`\), which Keras does not give",
    ),
    "evaluates the loss": (
        lambda: chainrule.KerasBridge(optax.lbfgs(), learning_rate=1.0),
        TypeError,
        "which Keras cannot do for it|which Keras does not give",
    ),
    "changes shapes": (
        lambda: chainrule.KerasBridge(changes_shapes()),
        TypeError,
        r"changes the shape of `kernel` in its state from \(2, 2\) to \(2, 2, 1\)",
    ),
    "decay twice, in optax": (
        lambda: chainrule.KerasBridge(optax.adamw(1e-3), weight_decay=0.1),
        ValueError,
        "give it once",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_at_build(name):
    make, error, message = CASES[name]
    optimizer = make()
    kernel = keras.Variable(np.ones((2, 2), np.float32), name="kernel")
    before = len(optimizer.variables)
    with pytest.raises(error, match=message):
        optimizer.apply([keras.ops.ones((2, 2))], [kernel])
    assert not optimizer.built
    assert len(optimizer.variables) == before
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(kernel), 1.0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: chainrule.KerasBridge(chains.stam(), weight_decay=0.1),
            ValueError,
            "give it once",
        ),
        (
            lambda: chainrule.KerasBridge(keras.optimizers.SGD()),
            TypeError,
            "expected a gradient transformation",
        ),
        (lambda: chainrule.KerasBridge(optax.lbfgs()), ValueError, "give `learning_rate`"),
        (lambda: chainrule.KerasBridge(chains.adam(), "fast"), ValueError, "learning_rate"),
        (
            lambda: chainrule.KerasBridge(chains.adam(), betas=(0.9, 0.99)),
            ValueError,
            "not recognized",
        ),
    ],
)
def test_at_construction(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_decay_that_is_zero_in_the_chain_is_not_twice():
    optimizer = chainrule.KerasBridge(chains.adam(learning_rate=0.5), weight_decay=0.5)
    kernel = keras.Variable(np.ones((2, 2), np.float32), name="kernel")
    optimizer.apply([keras.ops.zeros((2, 2))], [kernel])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(kernel), 0.75)


def test_variables_added_after_building():
    kernel, late = keras.Variable(np.ones(2, np.float32)), keras.Variable(np.ones(2, np.float32))
    optimizer = chainrule.KerasBridge(chains.adam(learning_rate=0.5))
    optimizer.build([kernel])
    optimizer.build([kernel])  # the same ones: nothing to do
    with pytest.raises(ValueError, match="cannot be built again for these 2; make a new optimizer"):
        optimizer.build([kernel, late])
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply([keras.ops.ones(2), keras.ops.ones(2)], [kernel, late])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(kernel), 1.0)


def test_variables_that_are_no_floats():
    optimizer = chainrule.KerasBridge(chains.adam())
    codes = keras.Variable(np.ones(2, np.int8), dtype="int8", name="codes", trainable=False)
    with pytest.raises(TypeError, match=r"'codes' has dtype int8, .* dtype policy"):
        optimizer.build([codes])
    assert not optimizer.built
