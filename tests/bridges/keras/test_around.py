"""Atoms around any optimizer of Keras: what it does by itself goes on."""

import keras
import numpy as np
import optax
import pytest
from tests.bridges.keras.setting import fitted, in_plain_jax, largest_difference, small_model

import chainrule
from chainrule import chains, keras_optimizers
from chainrule.keras_optimizers import Grokfast, Magma, Orthograd

pytestmark = pytest.mark.keras

CLOSE = 2e-6  # see test_parity


def keras_adam(rate, **arguments):
    """Keras' Adam as a chain: epsilon before the bias correction."""
    return chains.adam(rate, eps=1e-7, eps_scope="raw", **arguments)


@pytest.mark.parametrize(
    ("around", "links"),
    [
        (Grokfast, lambda inner: chains.grokfast(inner, alpha=0.99, lamb=5.0)),
        (Orthograd, chains.orthograd),
        (lambda inner: Orthograd(Grokfast(inner)),
         lambda inner: chains.orthograd(chains.grokfast(inner, alpha=0.99, lamb=5.0))),
        (Magma, lambda inner: chains.magma(inner, moment="own")),
    ],
    ids=["grokfast", "orthograd", "nested", "magma"],
)  # fmt: skip
def test_around_keras_adam_is_the_chain_around_adam(around, links):
    """Its bias corrections count on, its schedule advances, its decay and its clipping are applied."""
    schedule = keras.optimizers.schedules.ExponentialDecay(3e-3, 5, 0.5)
    model = fitted(around(keras.optimizers.Adam(schedule, global_clipnorm=0.5)), steps=12)
    inner = chainrule.chain(
        optax.clip_by_global_norm(0.5), keras_adam(optax.exponential_decay(3e-3, 5, 0.5))
    )
    expected = in_plain_jax(links(inner), steps=12)
    assert largest_difference(small_model().get_weights(), expected) > 100 * CLOSE
    assert largest_difference(model.get_weights(), expected) <= CLOSE
    assert int(model.optimizer.iterations) == int(model.optimizer.optimizer.iterations) == 12


def test_the_decay_of_the_optimizer_inside_is_applied_once():
    ours = fitted(Grokfast(keras.optimizers.Adam(3e-3, weight_decay=0.5)), steps=6)
    tx = chains.grokfast(keras_adam(3e-3, weight_decay=0.5), alpha=0.99, lamb=5.0)
    assert largest_difference(ours.get_weights(), in_plain_jax(tx, steps=6)) <= CLOSE


def test_around_a_chain_of_ours():
    ours = fitted(Orthograd(Grokfast(keras_optimizers.Stam(3e-3))), steps=6)
    tx = chains.orthograd(chains.grokfast(chains.stam(3e-3), alpha=0.99, lamb=5.0))
    assert largest_difference(ours.get_weights(), in_plain_jax(tx, steps=6)) <= CLOSE


def test_the_learning_rate_is_that_of_the_optimizer_inside():
    optimizer = Grokfast(keras.optimizers.SGD(0.5))
    optimizer.learning_rate = 0.25
    variable = keras.Variable([1.0, 1.0])
    optimizer.apply([keras.ops.ones((2,))], [variable])  # g + lamb g = 6 g at the first gradient
    np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), 1 - 0.25 * 6, rtol=CLOSE)
    optimizer.hyperparams["lamb"] = 0.0
    optimizer.apply([keras.ops.ones((2,))], [variable])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), 1 - 0.25 * 7, rtol=CLOSE)


def test_gradients_are_accumulated_by_the_outermost():
    ours = fitted(Grokfast(keras.optimizers.Adam(1e-3), gradient_accumulation_steps=4), steps=8)
    assert int(ours.optimizer.iterations) == 2 or int(ours.optimizer.optimizer.iterations) == 2
    tx = optax.MultiSteps(chains.grokfast(keras_adam(1e-3), alpha=0.99, lamb=5.0), 4)
    expected = in_plain_jax(tx.gradient_transformation(), steps=8)
    assert largest_difference(ours.get_weights(), expected) <= CLOSE


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Grokfast(chains.adam()), TypeError, "must be an optimizer of Keras or its name"),
        (lambda: Grokfast(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())), ValueError,
         "put LossScaleOptimizer around Grokfast"),
        (lambda: Magma(keras.optimizers.SGD(gradient_accumulation_steps=2)), ValueError,
         "give `gradient_accumulation_steps` to Magma"),
        (lambda: Orthograd(keras.optimizers.SGD(weight_decay=0.1), weight_decay=0.1), ValueError,
         "is given to Orthograd and to the .* inside it"),
        (lambda: Grokfast(inner="sgd"), TypeError, "unexpected argument 'inner'; did you mean 'optimizer'"),
        (lambda: keras_optimizers.Muon(momentum=0.9), TypeError, "did you mean 'muon_beta'"),
        (lambda: keras_optimizers.Adam(amsgrad=True), TypeError, "unexpected argument 'amsgrad'; it has learning_rate"),
        (lambda: keras_optimizers.Adam(beta_2=1.5), ValueError, r"`b2` must be in \[0, 1\)"),
    ],
)  # fmt: skip
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_preset_is_for_what_is_not_given():
    model = fitted(keras_optimizers.Stam(3e-3, epsilon=1e-6, preset="original"), steps=6)
    expected = in_plain_jax(
        chains.stam(3e-3, eps=1e-6, preset="original", weight_decay=None), steps=6
    )
    default = in_plain_jax(chains.stam(3e-3, eps=1e-6, weight_decay=None), steps=6)
    assert largest_difference(expected, default) > 10 * CLOSE
    config = model.optimizer.get_config()
    assert config["preset"] == "original" and "debias" not in config
    again = keras_optimizers.Stam.from_config(config)
    assert again.get_config() == config
    without = fitted(
        keras_optimizers.Stam(3e-3, epsilon=1e-6, preset="original", weight_decay=0.0), steps=6
    )
    assert largest_difference(without.get_weights(), expected) <= CLOSE
