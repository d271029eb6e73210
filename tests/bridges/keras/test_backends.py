"""What only one backend does: JAX's distribution, torch's compiler, TensorFlow's graphs."""

import types

import keras
import numpy as np
import optax
import pytest
from tests.bridges.keras.setting import (
    BACKEND,
    BATCH,
    fitted,
    in_plain_jax,
    largest_difference,
    loss_of_logits,
    small_data,
    small_model,
)

import chainrule
from chainrule import chains, keras_optimizers

pytestmark = pytest.mark.keras

CLOSE = 2e-6  # see test_parity
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="of the JAX backend")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="of the torch backend")
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="of the TensorFlow backend")


def lazy_model():
    """Its variables are made when it first sees data: on TensorFlow, while the first step is traced."""
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(5)])


def test_a_model_without_input_shape_trains():
    model = fitted(chainrule.KerasBridge(chains.stam(1e-2)), steps=3, model=lazy_model())
    assert int(model.optimizer.iterations) == int(model.optimizer.state().count) == 3


def test_a_state_that_starts_from_the_parameters():
    make = lambda: optax.contrib.schedule_free_sgd(0.05)  # noqa: E731
    model = fitted(chainrule.KerasBridge(make()), steps=4)
    assert largest_difference(model.get_weights(), in_plain_jax(make(), steps=4)) <= CLOSE


@on_tensorflow
def test_a_state_that_starts_from_parameters_that_have_no_value_yet():
    optimizer = chainrule.KerasBridge(optax.contrib.schedule_free_sgd(0.05))
    with pytest.raises(ValueError, match="has no value yet; build the model before it trains"):
        fitted(optimizer, steps=1, model=lazy_model())


@on_tensorflow
def test_a_graph_that_xla_compiles_is_the_same():
    ours = fitted(keras_optimizers.Stam(1e-2), steps=4, jit_compile=True)
    theirs = fitted(keras_optimizers.Stam(1e-2), steps=4, jit_compile=False)
    assert largest_difference(ours.get_weights(), theirs.get_weights()) <= CLOSE


@on_tensorflow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_apply_in_a_graph_is_apply(jit_compile):
    import tensorflow as tf

    def applied(run):
        variables = [keras.Variable(np.full(shape, 1.0, np.float32)) for shape in ((3, 2), (2,))]
        optimizer = keras_optimizers.Muon(1e-2, ns_steps=2)
        optimizer.build(variables)
        step = run(lambda *grads: optimizer.apply(grads, variables))
        for t in range(3):
            step(*(tf.constant(np.cos(np.arange(v.value.shape.num_elements()) + t).reshape(v.shape), tf.float32)
                   for v in variables))  # fmt: skip
        return [keras.ops.convert_to_numpy(v) for v in variables]

    eager = applied(lambda step: step)
    graph = applied(lambda step: tf.function(step, autograph=False, jit_compile=jit_compile))
    assert largest_difference(graph, eager) <= CLOSE
    assert largest_difference(eager, [np.ones((3, 2)), np.ones(2)]) > 1000 * CLOSE


@on_tensorflow
def test_several_replicas_are_refused(monkeypatch):
    import tensorflow as tf

    strategy = types.SimpleNamespace(num_replicas_in_sync=2)
    optimizer = keras_optimizers.Adam()
    variable = keras.Variable([1.0])
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: strategy)
    with pytest.raises(NotImplementedError, match="with 2 replicas is not supported"):
        optimizer.build([variable])
    assert not optimizer.built


def test_gradients_of_an_embedding():
    """On TensorFlow they are rows and their indices, which may repeat: Keras' Adam squares them before it adds them."""

    def trained(optimizer):
        model = keras.Sequential(
            [keras.layers.Input((3,), dtype="int32"), keras.layers.Embedding(7, 4), keras.layers.Flatten(),
             keras.layers.Dense(2)]
        )  # fmt: skip
        random = np.random.default_rng(0)
        model.set_weights([random.normal(size=w.shape) for w in model.get_weights()])
        model.compile(optimizer, loss=loss_of_logits())
        x = random.integers(0, 7, (32, 3))
        model.fit(x, x[:, 0] % 2, batch_size=8, shuffle=False, verbose=0)
        return model.get_weights()

    assert (
        largest_difference(
            trained(chainrule.KerasBridge(optax.sgd(0.5))), trained(keras.optimizers.SGD(0.5))
        )
        <= CLOSE
    )


@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras has no stateless_apply there")
def test_a_stateless_step_writes_nothing_of_its_own():
    variable = keras.Variable(np.ones(3, np.float32))
    optimizer = chainrule.KerasBridge(chains.adam(learning_rate=0.5))
    optimizer.build([variable])
    given = [
        keras.ops.convert_to_tensor(keras.ops.convert_to_numpy(v).copy())
        for v in optimizer.variables
    ]
    start = keras.ops.ones((3,))
    before = [np.array(keras.ops.convert_to_numpy(x)) for x in given]
    (new,), state = optimizer.stateless_apply(given, [keras.ops.ones((3,))], [start])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(new), 0.5, rtol=CLOSE)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(start), 1)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), 1)
    for old, value in zip(before, given, strict=True):
        np.testing.assert_array_equal(old, keras.ops.convert_to_numpy(value))
    assert any(
        not np.array_equal(a, keras.ops.convert_to_numpy(b))
        for a, b in zip(before, state, strict=True)
    )


@on_torch
def test_compiled_is_the_same():
    ours = fitted(chainrule.KerasBridge(chains.stam(1e-2), compile=True), steps=4)
    assert largest_difference(ours.get_weights(), in_plain_jax(chains.stam(1e-2), steps=4)) <= CLOSE


@on_torch
def test_a_training_step_that_torch_compiles():
    ours = fitted(chainrule.KerasBridge(chains.stam(1e-2)), steps=4, jit_compile=True)
    assert largest_difference(ours.get_weights(), in_plain_jax(chains.stam(1e-2), steps=4)) <= CLOSE


@pytest.fixture
def undistributed():
    yield
    keras.distribution.set_distribution(None)


@on_jax
@pytest.mark.parametrize("layout", ["data", "model"])
@pytest.mark.parametrize(
    "make", [chains.stam, lambda rate: chains.muon(rate, dims="hwio")], ids=["stam", "muon"]
)
def test_distribution(layout, make, undistributed):
    devices = keras.distribution.list_devices()
    assert len(devices) == 8
    if layout == "data":
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    else:
        mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), devices)
        layouts = keras.distribution.LayoutMap(mesh)
        layouts[".*hidden/kernel"] = (None, "model")
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
        )
    model = fitted(chainrule.KerasBridge(make(1e-2)), steps=4)
    expected = in_plain_jax(make(1e-2), steps=4)
    assert (
        largest_difference(model.get_weights(), expected) <= 5e-6
    )  # sums over devices, and Muon's iteration
    kernel = next(v for v in model.trainable_variables if v.path == "small/hidden/kernel")
    slots = [
        v
        for v in model.optimizer.variables
        if "hidden_kernel" in v.path and v.shape == kernel.shape
    ]
    assert slots
    for slot in slots:
        assert slot.value.sharding.is_equivalent_to(kernel.value.sharding, kernel.ndim)
    shards = {shard.data.shape for shard in kernel.value.addressable_shards}
    assert shards == ({(144, 4)} if layout == "model" else {(144, 16)})


def test_training_goes_on_after_an_evaluation():
    model = fitted(keras_optimizers.Stam(), steps=2)
    images, labels = small_data(2)
    model.evaluate(images, labels, batch_size=BATCH, verbose=0)
    model.train_on_batch(images[:BATCH], labels[:BATCH])
    model.predict(images[:BATCH], verbose=0)
    assert int(model.optimizer.iterations) == 3
    assert largest_difference(small_model().get_weights(), model.get_weights()) > 0
