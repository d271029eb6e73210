"""Configurations, model files, and going on from them bit for bit."""

import json

import keras
import numpy as np
import optax
import pytest
from tests.bridges.keras.setting import BATCH, fitted, load, small_data

import chainrule
from chainrule import chains, keras_optimizers

pytestmark = pytest.mark.keras


@keras.saving.register_keras_serializable("tests")
def half_rate_sgd(learning_rate):
    return optax.sgd(learning_rate / 2)


STAM = {"factory": "chainrule.chains:stam", "arguments": {"b2": 0.99}}
NESTED = {
    "factory": "chainrule.chains:magma",
    "arguments": {
        "inner": {
            "factory": "chainrule:chain",
            "arguments": [
                {"factory": "optax:clip", "arguments": {"max_delta": 0.1}},
                {
                    "factory": "chainrule.chains:adam",
                    "arguments": {
                        "learning_rate": {
                            "factory": "optax:linear_schedule",
                            "arguments": {
                                "init_value": 0.01,
                                "end_value": 0.0,
                                "transition_steps": 20,
                            },
                        }
                    },
                },
            ],
        }
    },
}
OPTIMIZERS = {
    **{
        name: getattr(keras_optimizers, name)
        for name in ("Adam", "Nadam", "Casmo", "CasmoSNR", "Stam", "StamLite", "Cosmic")
    },
    "Muon": lambda: keras_optimizers.Muon(exclude_layers=["head"]),
    "Grokfast": lambda: keras_optimizers.Grokfast(keras.optimizers.Adam(1e-3)),
    "Orthograd": lambda: keras_optimizers.Orthograd(keras_optimizers.Stam()),
    "Magma": lambda: keras_optimizers.Magma(keras_optimizers.Adam()),
    "three": lambda: keras_optimizers.Orthograd(keras_optimizers.Grokfast(keras_optimizers.Muon())),
    "described": lambda: chainrule.KerasBridge(STAM, 1e-2, clipnorm=1.0),
    "nested": lambda: chainrule.KerasBridge(NESTED, weight_decay=1e-3),
    "registered": lambda: chainrule.KerasBridge(
        {"factory": "tests>half_rate_sgd", "arguments": {"learning_rate": 0.1}}
    ),
    "schedule": lambda: keras_optimizers.Casmo(
        keras.optimizers.schedules.ExponentialDecay(1e-2, 5, 0.5), clipnorm=1.0
    ),
}


def test_every_class_is_saved_here():
    assert set(keras_optimizers.__all__) - {"Retier"} <= set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loaded_model_goes_on_as_if_nothing_had_happened(name, tmp_path):
    model = fitted(OPTIMIZERS[name](), steps=3)
    model.save(tmp_path / "model.keras")
    loaded = load(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(model.optimizer)
    images, labels = small_data(steps=6)
    rest = slice(3 * BATCH, None)
    for going in (model, loaded):
        going.fit(images[rest], labels[rest], batch_size=BATCH, shuffle=False, verbose=0)
    for kind in ("weights", "optimizer.variables"):
        ours, theirs = (
            [
                keras.ops.convert_to_numpy(v)
                for v in (m.weights if kind == "weights" else m.optimizer.variables)
            ]
            for m in (model, loaded)
        )
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=kind)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_configuration_is_json_and_makes_the_same(name):
    optimizer = OPTIMIZERS[name]()
    config = json.loads(json.dumps(optimizer.get_config()))
    again = type(optimizer).from_config(config)
    assert json.dumps(again.get_config()) == json.dumps(optimizer.get_config())


def test_a_chain_given_as_an_object_trains_and_says_how_to_save_it(tmp_path):
    model = fitted(chainrule.KerasBridge(chains.stam()), steps=1)
    with pytest.raises(TypeError, match=r'has no description.*give KerasBridge\(\{"factory"'):
        model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")


def test_an_object_among_the_arguments_of_a_class_trains_and_says_so():
    optimizer = keras_optimizers.Magma("sgd", exclude=lambda path, leaf: path.endswith("bias"))
    fitted(optimizer, steps=1)
    with pytest.raises(TypeError, match="has no description"):
        optimizer.get_config()


@pytest.mark.parametrize(
    "factory",
    [
        "os:system",
        "subprocess:run",
        "builtins:eval",
        "chainrule.cli:main",
        "chainrule.demo:main",
        "chainrule:TorchBridge.os",
        "chainrule.chains.adam:optax",
        "optax._src.base:jax",
        "optax:jnp.save",
        "unregistered>run",
        "keras.saving:load_model",
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_file_names_nothing_outside(factory, nested):
    config = {**chainrule.KerasBridge(STAM).get_config()}
    config["chain"] = {"factory": factory, "arguments": {}}
    if nested:
        config["chain"] = {
            "factory": "chainrule.chains:magma",
            "arguments": {"inner": config["chain"]},
        }
    with pytest.raises(ValueError, match=r"not of chainrule or optax|has no factory"):
        chainrule.KerasBridge.from_config(config)


@pytest.mark.parametrize(
    ("description", "error", "message"),
    [
        ({"factory": "chainrule.chains:stan"}, ValueError, "did you mean chainrule.chains:stam"),
        ({"factory": 3}, ValueError, "given by its name"),
        ({"arguments": {}}, ValueError, 'needs a "factory"'),
        ({**STAM, "args": {}}, ValueError, r"got \['args'\] too"),
        (
            {"factory": "optax:sgd", "arguments": {"learning_rate": print}},
            TypeError,
            "got builtin_function",
        ),
        ("adam", TypeError, "expected a gradient transformation"),
    ],
)
def test_a_bad_description(description, error, message):
    with pytest.raises(error, match=message):
        chainrule.KerasBridge(description)


def test_states_of_other_shapes_are_refused_before_anything_is_written(tmp_path):
    model = fitted(keras_optimizers.Stam(), steps=1)
    other = {str(i): np.ones(v.shape) for i, v in enumerate(model.optimizer.variables)}
    last = str(len(other) - 1)
    other[last] = np.ones(3 + other[last].size)
    before = [keras.ops.convert_to_numpy(v) for v in model.optimizer.variables]
    with pytest.raises(ValueError, match="the chain and the model must be those that were saved"):
        model.optimizer.load_own_variables(other)
    for a, b in zip(before, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, keras.ops.convert_to_numpy(b))
