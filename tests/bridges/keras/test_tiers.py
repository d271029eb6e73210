"""COSMIC's tiers move under `fit`, at the steps and to the tiers that plain JAX gives them."""

import jax
import keras
import numpy as np
import pytest
from tests.bridges.keras.setting import (
    BATCH,
    fitted,
    largest_difference,
    load,
    loss_of_logits,
    small_data,
    small_model,
)

import chainrule
from chainrule import keras_optimizers
from chainrule.bridges.keras_tiers import loss_gradients, retier
from chainrule.transforms import TierPolicy

pytestmark = pytest.mark.keras


def policy():
    return TierPolicy({2: 0.4, 1: 0.2}, reassignment_interval=2, min_tier_steps=0)


def cosmic(**arguments):
    return chainrule.KerasBridge(chainrule.chains.cosmic(1e-2, policy=policy(), **arguments))


def tiers_of(optimizer):
    return optimizer.metrics()["tier_occupancy"]


def trained(model, steps, *callbacks):
    images, labels = small_data(steps)
    model.fit(images, labels, batch_size=BATCH, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model


def test_the_gradients_are_those_of_the_loss():
    model = fitted(keras.optimizers.SGD(0.0), steps=1)
    images, labels = small_data(1)
    before, grads = model.get_weights(), loss_gradients(model, images, labels)
    model.compile(keras.optimizers.SGD(1.0), loss=loss_of_logits())
    model.train_on_batch(images, labels)
    moved = [a - b for a, b in zip(before, model.get_weights(), strict=True)]
    assert largest_difference(moved, grads) <= 2e-6


def test_tiers_move_where_the_policy_says_and_training_goes_on():
    images, labels = small_data(4)
    callback = keras_optimizers.Retier(images[:BATCH], labels[:BATCH])
    model = small_model()
    model.compile(cosmic(), loss=loss_of_logits())
    trained(model, 1, callback)
    assert tiers_of(model.optimizer) == {0: 6}
    trained(model, 4, callback)
    occupancy = tiers_of(model.optimizer)
    assert occupancy[2] >= 2 and sum(occupancy.values()) == 6
    assert int(model.optimizer.iterations) == int(model.optimizer.state().count) == 5
    moments = [v for v in model.optimizer.variables if "mu" in v.path]
    assert any(np.any(keras.ops.convert_to_numpy(v)) for v in moments)  # steps were made in tier 2


def test_retier_is_chainrule_s():
    optimizer = cosmic()
    fitted(optimizer, steps=1)
    state, names = optimizer.state(), optimizer._parts.flat.names
    random = np.random.default_rng(0)
    values = [keras.ops.convert_to_numpy(v) for v in optimizer._parts.params]
    grads = [random.normal(size=v.shape).astype(np.float32) for v in values]
    expected = chainrule.retier(
        state, dict(zip(names, grads, strict=True)), dict(zip(names, values, strict=True))
    )
    assert retier(optimizer, grads)
    assert jax.tree.structure(optimizer.state()) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(optimizer.state()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not retier(optimizer, grads)  # not due again before the next step


def test_a_chain_without_tiers():
    optimizer = fitted(keras_optimizers.Adam(), steps=1).optimizer
    with pytest.raises(ValueError, match="needs a chain with one tiered state, this one has 0"):
        retier(optimizer, [])


def test_moved_tiers_are_saved(tmp_path):
    model = small_model()
    model.compile(keras_optimizers.Cosmic(1e-2, preset="fast"), loss=loss_of_logits())
    trained(model, 1)
    model.optimizer._parts.tiers = None
    state = model.optimizer.state()
    moved = [2, 0, 1, 0, 2, 0]
    parts = model.optimizer._parts
    from chainrule.bridges.flat_chain import FlatChain
    from chainrule.bridges.probing import in_tiers

    flat = FlatChain(in_tiers(parts.given.chain, moved), parts.flat.names, parts.flat.structs)
    for variable in parts.stored:
        model.optimizer._untrack_variable(variable)
    parts.tiers = tuple(moved)
    params = dict(zip(parts.flat.names, map(keras.ops.convert_to_numpy, parts.params), strict=True))
    model.optimizer._adopt(flat, flat.values_of(chainrule.transforms.assign(state, moved, params)))
    model.make_train_function(force=True)
    trained(model, 2)
    model.save(tmp_path / "model.keras")
    loaded = load(tmp_path / "model.keras")
    assert tiers_of(loaded.optimizer) == tiers_of(model.optimizer) == {0: 3, 1: 1, 2: 2}
    for going in (model, loaded):
        trained(going, 2)
    assert largest_difference(model.get_weights(), loaded.get_weights()) == 0.0
