"""Keras' `fit` on digits with a chain, a schedule, callbacks and a saved model that trains on.

KERAS_BACKEND=jax python notebooks/scripts/keras_fit.py [--quick]
"""

import argparse
import pathlib
import tempfile

import keras
import numpy as np
from sklearn.datasets import load_digits

from chainrule import keras_optimizers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: seconds")
    epochs = 3 if parser.parse_args().quick else 30

    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    model = keras.Sequential(
        [
            keras.layers.Input((64,)),
            keras.layers.Dense(64, activation="relu", name="hidden"),
            keras.layers.Dense(10, name="head"),
        ]
    )
    rate = keras.optimizers.schedules.CosineDecay(0.02, epochs * 45)
    model.compile(
        keras_optimizers.Muon(rate, exclude_layers=["head"], adam_lr_ratio=0.15),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(images[:1440], labels[:1440], epochs=epochs, verbose=2)
    print(model.optimizer.plan())
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "digits.keras"
        model.save(path)
        model = keras.saving.load_model(path)
    _, accuracy = model.evaluate(images[1440:], labels[1440:], verbose=0)
    print(f"{keras.backend.backend()}: test accuracy {accuracy:.1%}")
    assert history.history["loss"][-1] < history.history["loss"][0], "the loss did not fall"


if __name__ == "__main__":
    main()
