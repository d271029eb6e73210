"""What Keras does around an optimizer works around a chain: its own SGD beside `KerasBridge(optax.sgd(...))`."""

import keras
import numpy as np
import optax
import pytest
from tests.bridges.keras.setting import (
    BATCH,
    fitted,
    in_plain_jax,
    largest_difference,
    load,
    small_data,
    small_model,
)

import chainrule
from chainrule import chains, keras_optimizers

pytestmark = pytest.mark.keras

CLOSE = 2e-6  # see test_parity
RATE = 0.05


def close(ours, theirs):
    assert largest_difference(ours.get_weights(), theirs.get_weights()) <= CLOSE
    assert largest_difference(small_model().get_weights(), ours.get_weights()) > 100 * CLOSE


@pytest.mark.parametrize(
    "arguments",
    [
        {"clipnorm": 0.05},
        {"global_clipnorm": 0.05},
        {"clipvalue": 0.01},
        {"weight_decay": 0.1},
        {"use_ema": True, "ema_momentum": 0.8},
        {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3},
        {"gradient_accumulation_steps": 4, "clipnorm": 0.05},
        {"loss_scale_factor": 64.0},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_arguments_of_keras_mean_what_they_mean(arguments):
    ours = fitted(chainrule.KerasBridge(optax.sgd(1.0), RATE, **arguments), steps=8)
    theirs = fitted(keras.optimizers.SGD(RATE, **arguments), steps=8)
    close(ours, theirs)
    assert int(ours.optimizer.iterations) == int(theirs.optimizer.iterations)


def test_accumulated_gradients_step_the_chain_once():
    """JAX runs the update at every step and keeps one in four: the chain's count says how many."""
    tx = chains.adam(1e-3, eps_scope="raw")  # Keras adds epsilon before the bias correction
    ours = fitted(chainrule.KerasBridge(tx, gradient_accumulation_steps=4), steps=8)
    assert int(ours.optimizer.state().count) == 2
    theirs = fitted(
        keras.optimizers.Adam(1e-3, epsilon=1e-8, gradient_accumulation_steps=4), steps=8
    )
    close(ours, theirs)


@pytest.mark.parametrize("by", ["names", "variables"])
def test_variables_are_excluded_from_weight_decay(by):
    def trained(optimizer):
        model = small_model()
        chosen = {"var_names": ["bias"]}
        if by == "variables":
            chosen = {"var_list": [v for v in model.trainable_variables if v.name == "bias"]}
        optimizer.exclude_from_weight_decay(**chosen)
        return fitted(optimizer, steps=4, model=model)

    ours = trained(chainrule.KerasBridge(optax.sgd(1.0), RATE, weight_decay=0.5))
    close(ours, trained(keras.optimizers.SGD(RATE, weight_decay=0.5)))
    decayed = fitted(keras.optimizers.SGD(RATE, weight_decay=0.5), steps=4)
    assert largest_difference(ours.get_weights(), decayed.get_weights()) > 100 * CLOSE


def test_a_schedule_of_keras_is_followed():
    schedule = keras.optimizers.schedules.ExponentialDecay(1e-2, 5, 0.5)
    model = fitted(chainrule.KerasBridge(chains.stam(), schedule), steps=10)
    expected = in_plain_jax(chains.stam(optax.exponential_decay(1e-2, 5, 0.5)), steps=10)
    assert largest_difference(model.get_weights(), expected) <= CLOSE


def test_the_learning_rate_is_read_set_and_reduced():
    optimizer = chainrule.KerasBridge(chains.adam(learning_rate=0.01))
    assert optimizer.learning_rate.shape == ()
    assert float(optimizer.learning_rate) == np.float32(0.01)
    model = fitted(optimizer, steps=2)
    plateau = keras.callbacks.ReduceLROnPlateau(
        monitor="loss", factor=0.1, patience=0, min_delta=1e9
    )
    model.fit(*small_data(2), batch_size=BATCH, epochs=2, verbose=0, callbacks=[plateau])
    assert float(optimizer.learning_rate) < 0.011 * 0.1
    optimizer.learning_rate = 0.0
    before = model.get_weights()
    model.fit(*small_data(2), batch_size=BATCH, verbose=0)
    assert largest_difference(before, model.get_weights()) == 0.0


def test_the_rate_multiplies_what_has_no_rate_of_its_own():
    ours = fitted(chainrule.KerasBridge(optax.sgd(1.0), learning_rate=RATE), steps=4)
    close(ours, fitted(keras.optimizers.SGD(RATE), steps=4))


def test_mixed_precision_scales_the_loss():
    def trained(optimizer):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.layers.Input((3,)),
                keras.layers.Dense(4, dtype="mixed_float16"),
                keras.layers.Dense(1),
            ]
        )
        random = np.random.default_rng(0)
        model.set_weights([random.normal(size=w.shape) for w in model.get_weights()])
        scaled = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=128.0, dynamic_growth_steps=2
        )
        model.compile(scaled, loss="mse")
        x = random.normal(size=(32, 3)).astype("float32")
        model.fit(x, x[:, :1], batch_size=8, shuffle=False, verbose=0)
        return model

    ours = trained(chainrule.KerasBridge(optax.sgd(RATE)))
    theirs = trained(keras.optimizers.SGD(RATE))
    assert largest_difference(ours.get_weights(), theirs.get_weights()) <= CLOSE
    assert float(ours.optimizer.dynamic_scale) == float(theirs.optimizer.dynamic_scale) == 512.0


def test_each_part_has_its_optimizer():
    def trained(one, other):
        split = {"hidden/.*": other}
        optimizer = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(one, split))
        return fitted(optimizer, steps=4)

    ours = trained(
        chainrule.KerasBridge(optax.sgd(RATE)), chainrule.KerasBridge(optax.sgd(RATE / 2))
    )
    close(ours, trained(keras.optimizers.SGD(RATE), keras.optimizers.SGD(RATE / 2)))


def test_checkpoints_and_backups(tmp_path):
    """Training that stops in the second epoch goes on from its backup, and ends where one without a stop ends."""

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def train(folder, *callbacks, model=None):
        model = model or small_model()
        if not model.compiled:
            model.compile(keras_optimizers.Stam(1e-2), loss="sparse_categorical_crossentropy")
        backup = keras.callbacks.BackupAndRestore(tmp_path / folder)
        checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / f"{folder}-{{epoch}}.keras")
        model.fit(*small_data(3), batch_size=BATCH, epochs=3, shuffle=False, verbose=0,
                  callbacks=[backup, checkpoint, *callbacks])  # fmt: skip
        return model

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("stopped", Stop())
    resumed = train("stopped")
    assert largest_difference(whole.get_weights(), resumed.get_weights()) == 0.0
    checkpointed = load(tmp_path / "stopped-3.keras")
    assert largest_difference(whole.get_weights(), checkpointed.get_weights()) == 0.0


def variables(*shapes, dtype="float32"):
    return [
        keras.Variable(np.full(shape, 1.0 + i), name=f"v{i}", dtype=dtype)
        for i, shape in enumerate(shapes)
    ]


def values(optimizer):
    return [keras.ops.convert_to_numpy(v) for v in optimizer.variables]


def test_a_loop_of_one_s_own():
    first, second = variables((2,), (3,))
    optimizer = chainrule.KerasBridge(chains.adam(learning_rate=0.1))
    for _ in range(3):
        pairs = [(keras.ops.ones((2,)), first), (keras.ops.ones((3,)), second)]
        optimizer.apply_gradients(pairs)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(first), 1 - 0.3, rtol=CLOSE)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(second), 2 - 0.3, rtol=CLOSE)
    assert int(optimizer.iterations) == 3


@pytest.mark.parametrize(
    "make",
    [chains.stam, chains.adam, lambda: keras_optimizers.Grokfast("adam")],
    ids=["stam", "adam", "around"],
)
def test_a_missing_gradient_leaves_its_variable_and_its_state_alone(make):
    optimizer = make()
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        optimizer = chainrule.KerasBridge(optimizer)
    first, second = variables((2,), (3,))
    optimizer.apply([keras.ops.ones((2,)), keras.ops.ones((3,))], [first, second])
    state = dict(zip([v.path for v in optimizer.variables], values(optimizer), strict=True))
    before = keras.ops.convert_to_numpy(first).copy(), keras.ops.convert_to_numpy(second).copy()
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, keras.ops.ones((3,))], [first, second])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(first), before[0])
    assert (keras.ops.convert_to_numpy(second) < before[1]).all()
    changed = {v.path for v, new in zip(optimizer.variables, values(optimizer), strict=True)
               if not np.array_equal(state[v.path], new)}  # fmt: skip
    assert any("v1" in path for path in changed)
    assert not any("v0" in path for path in changed)
    if make is chains.stam:  # one vector for all parameters
        b1 = optimizer.metrics()["b1"]
        old = next(value for path, value in state.items() if path.endswith("b1"))
        assert (b1["v0"] == old[0], b1["v1"] == old[1]) == (True, False)


def test_variables_that_are_overwritten_are_not_the_chain_s():
    first, second = variables((2,), (3,))
    second.overwrite_with_gradient = True
    optimizer = chainrule.KerasBridge(chains.adam(learning_rate=0.1))
    optimizer.apply([keras.ops.ones((2,)), 7 * keras.ops.ones((3,))], [first, second])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(second), 7)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(first), 0.9, rtol=CLOSE)


def test_hyperparameters_are_a_mapping():
    (variable,) = variables((2,))
    optimizer = chainrule.KerasBridge(chains.adam(learning_rate=0.5))
    with pytest.raises(RuntimeError, match="`hyperparams` needs the optimizer's variables"):
        optimizer.hyperparams  # noqa: B018
    optimizer.build([variable])
    assert set(optimizer.hyperparams) == {
        "learning_rate",
        "b1",
        "b2",
        "eps",
        "eps_root",
        "weight_decay",
    }
    optimizer.hyperparams["b1"] = 0.0
    optimizer.hyperparams["learning_rate"] = 0.25
    assert (optimizer.hyperparams["b1"], optimizer.hyperparams["learning_rate"]) == (0.0, 0.25)
    with pytest.raises(ValueError, match=r"`b2` must be in \[0, 1\), got 1.5"):
        optimizer.hyperparams["b2"] = 1.5
    with pytest.raises(KeyError, match="no hyperparameter 'beta'"):
        optimizer.hyperparams["beta"] = 0.5
    optimizer.apply([keras.ops.ones((2,))], [variable])
    optimizer.apply([-keras.ops.ones((2,))], [variable])  # b1 = 0: the last gradient alone
    np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), 1.0, rtol=CLOSE)


def test_metrics_and_the_report():
    model = fitted(keras_optimizers.Stam(), steps=1)
    optimizer = model.optimizer
    assert set(optimizer.metrics()) == {"b1", "nonfinite", "state_bytes"}
    assert set(optimizer.metrics()["b1"]) == {v.path for v in model.trainable_variables}
    lines = optimizer.explain().splitlines()
    assert lines[0].startswith(f"6 variables, {model.count_params():,} elements, Keras on ")
    sizes = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert sizes["mu"] == ["6", f"{4 * model.count_params():,}"]


def test_muon_accounts_for_every_variable():
    model = fitted(keras_optimizers.Muon(exclude_layers=["head"]), steps=1)
    routes = {route.path: route.label for route in model.optimizer.plan().routes}
    assert routes == {
        v.path: "muon" if v.path in ("small/conv/kernel", "small/hidden/kernel") else "adam"
        for v in model.trainable_variables
    }
    assert str(model.optimizer.plan()) in model.optimizer.explain()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(dtype):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has float64 behind a flag of its own")
    (variable,) = variables((4,), dtype=dtype)
    optimizer = chainrule.KerasBridge(chains.adam(learning_rate=0.25))
    optimizer.apply([keras.ops.ones((4,), dtype)], [variable])
    assert keras.backend.standardize_dtype(variable.dtype) == dtype
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")), 0.75, rtol=1e-2
    )


def test_paths_that_occur_twice():
    first, second = keras.Variable([1.0], name="same"), keras.Variable([2.0], name="same")
    optimizer = chainrule.KerasBridge(chains.adam(learning_rate=0.5))
    optimizer.apply([keras.ops.ones((1,)), -keras.ops.ones((1,))], [first, second])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(first), 0.5, rtol=CLOSE)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(second), 2.5, rtol=CLOSE)
    assert set(optimizer.state().inner_state[0].mu) == {"same", "same#2"}
