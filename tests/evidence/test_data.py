"""Data of experiments: what is read from the user's disk, and what a step costs."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chainrule.evidence import costs, data
from chainrule.evidence.experiment import Arm


def test_cifar10_is_read_as_its_authors_describe_it(tmp_path):
    """A record is a label, then 1024 red, 1024 green and 1024 blue bytes, row by row."""
    for file in range(1, 6):
        record = np.zeros((2, 3073), np.uint8)
        record[:, 0] = file, 9
        record[:, 1 + 1024 + 32 + 5] = 255  # green, second row, sixth column
        record.tofile(tmp_path / f"data_batch_{file}.bin")
    images, labels = data.cifar10(tmp_path)
    assert labels.tolist() == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9]
    expected = np.zeros((10, 32, 32, 3))
    expected[:, 1, 5, 1] = 1
    np.testing.assert_array_equal(images, expected)


def test_a_folder_without_cifar10_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="binary version"):
        data.cifar10(tmp_path)


def test_the_standard_library_is_split_by_place():
    train, validation, test = data.standard_library()
    whole = np.concatenate([train, validation, test])
    assert whole.min() >= 0
    assert whole.max() < data.VOCABULARY
    assert len(validation) == pytest.approx(len(whole) / 20, abs=1)
    source = "".join("\n" if c == 0 else chr(c + 31) for c in train[:200_000])
    assert "\nimport " in source
    found = data.windows(test, 5, 8)
    np.testing.assert_array_equal(found[[0, -1]], [test[:8], test[-8:]])


def test_costs_are_of_each_arm():
    """State bytes are the arrays'; SGD has none, Adam two moments and a count."""
    grid = {"learning_rate": (0.1, 0.2, 0.4)}
    arms = [
        Arm("sgd", "baseline", lambda h: optax.sgd(h["learning_rate"]), grid),
        Arm("adam", "baseline", lambda h: optax.adam(h["learning_rate"]), grid),
    ]
    points = [{"learning_rate": 0.1}] * 2
    found = costs.measure(arms, points, {"w": jnp.ones((8, 8))}, rounds=2, steps=2)
    assert [cost["state_bytes"] for cost in found.values()] == [0, 2 * 64 * 4 + 4]
    assert min(cost["step_microseconds"] for cost in found.values()) > 0
    assert min(cost["first_seconds"] for cost in found.values()) > 0
