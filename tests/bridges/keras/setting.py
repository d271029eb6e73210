"""A small model, its data, and the same training in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

STEPS, BATCH, CLASSES = 20, 8, 5
BACKEND = keras.backend.backend()


def small_model(seed: int = 0) -> Any:
    """A convolution and two dense layers, with weights that NumPy draws: each backend's generator has its own."""
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, activation="relu", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(16, activation="tanh", name="hidden"),
            keras.layers.Dense(CLASSES, name="head"),
        ],
        name="small",
    )
    random = np.random.default_rng(seed)
    scaled = [
        random.normal(size=w.shape) / max(100, w[..., 0].size) ** 0.5 for w in model.get_weights()
    ]
    model.set_weights([w.astype(np.float32) for w in scaled])
    return model


def small_data(steps: int = STEPS, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    images = random.normal(size=(steps * BATCH, 8, 8, 3)).astype(np.float32)
    return images, random.integers(0, CLASSES, steps * BATCH)


def loss_of_logits() -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def fitted(
    optimizer: Any, *, steps: int = STEPS, model: Any = None, **compile_arguments: Any
) -> Any:
    """The small model after some steps of `fit`."""
    model = model or small_model()
    model.compile(optimizer, loss=loss_of_logits(), **compile_arguments)
    model.fit(*small_data(steps), batch_size=BATCH, shuffle=False, verbose=0)
    return model


def paths(model: Any) -> list[str]:
    return [v.path for v in model.trainable_variables]


def in_plain_jax(
    tx: optax.GradientTransformation,
    *,
    steps: int = STEPS,
    state: Any = None,
    dtype: Any = np.float32,
) -> list[np.ndarray]:
    """The weights of the small model after as many steps of a loop in JAX."""
    model, (images, labels) = small_model(), small_data(steps)
    names = paths(model)
    tx = optax.with_extra_args_support(tx)

    def loss(params: Any, images: Any, labels: Any) -> Any:
        conv, conv_bias, hidden, hidden_bias, head, head_bias = (params[name] for name in names)
        x = jax.lax.conv_general_dilated(
            images, conv, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + conv_bias).reshape(len(images), -1)
        logits = jnp.tanh(x @ hidden + hidden_bias) @ head + head_bias
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params: Any, state: Any, images: Any, labels: Any) -> Any:
        grads = jax.grad(loss)(params, images, labels)
        updates, state = tx.update(grads, state, params, grad=grads)
        return optax.apply_updates(params, updates), state

    images = images.astype(dtype)
    values = [jnp.asarray(w, dtype) for w in model.get_weights()]
    params = dict(zip(names, values, strict=True))
    state = tx.init(params) if state is None else state(tx, params)
    for i in range(steps):
        rows = slice(BATCH * i, BATCH * (i + 1))
        params, state = step(params, state, images[rows], labels[rows])
    return [np.asarray(params[name]) for name in names]


def largest_difference(ours: Any, theirs: Any) -> float:
    return max(
        float(np.abs(np.asarray(a, np.float64) - b).max())
        for a, b in zip(ours, theirs, strict=True)
    )


def load(path: Any) -> Any:
    """The model in a file."""
    return keras.saving.load_model(path)
