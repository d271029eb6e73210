"""What an import pulls in; public names."""

import importlib
import os
import subprocess
import sys

import pytest
from tests.bridges.keras.setting import BACKEND

import chainrule
from chainrule import bridges

pytestmark = pytest.mark.keras

TRAIN = """
import sys, numpy, keras, chainrule
model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
model.compile(chainrule.KerasBridge(chainrule.chains.casmo()), loss="mse")
model.fit(numpy.ones((4, 3), "float32"), numpy.ones((4, 2), "float32"), verbose=0)
model.optimizer.explain(), model.optimizer.metrics()
print(*sorted(m for m in sys.modules if "." not in m))
"""


def test_the_public_names_are_one_class():
    assert chainrule.KerasBridge is bridges.KerasBridge
    names = {"KerasBridge", "keras_optimizers"}
    assert names <= set(chainrule.__all__)
    assert all(getattr(chainrule, name) is not None for name in names)
    with pytest.raises(AttributeError, match="has no attribute 'KerasBrige'"):
        bridges.KerasBrige  # noqa: B018


@pytest.mark.skipif(BACKEND == "torch", reason="the torch backend is torch")
def test_training_imports_no_torch():
    environment = {**os.environ, "KERAS_BACKEND": BACKEND}
    result = subprocess.run(
        [sys.executable, "-c", TRAIN], capture_output=True, text=True, check=True, env=environment
    )
    assert "torch" not in result.stdout.split()


def test_the_bridges_name_no_framework():
    for name in ("flat_chain", "described", "keras_hyperparams"):
        module = importlib.import_module(f"chainrule.bridges.{name}")
        assert not {"torch", "tensorflow"} & set(vars(module))
