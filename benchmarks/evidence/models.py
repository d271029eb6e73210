"""Small models, each a tree of float32 arrays that a seed draws.

They take batches, not single examples, and convolutions are matrix products of patches: both are quick under `vmap`
over runs, where a convolution with other weights for each run is not. Kernels are (in, out).
"""

import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np


class Module:
    """A tree of its annotated fields; the one that is called `static` is a part of its structure."""

    static: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        fields = [name for name in cls.__annotations__ if name != cls.static]

        def flatten(module: Any) -> tuple[Any, Any]:
            children = [(jax.tree_util.GetAttrKey(n), getattr(module, n)) for n in fields]
            return children, cls.static and getattr(module, cls.static)

        def unflatten(static: Any, children: Any) -> Any:
            made = cls.__new__(cls)
            vars(made).update(zip(fields, children, strict=True))
            if cls.static:
                setattr(made, cls.static, static)
            return made

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)


class Dense(Module):
    """x @ kernel + bias on the last axis; He-normal for a gain of 2, LeCun-normal for 1."""

    kernel: jax.Array
    bias: jax.Array

    def __init__(self, random: np.random.Generator, n_in: int, n_out: int, gain: float = 1.0):
        self.kernel = normal(random, (n_in, n_out), np.sqrt(gain / n_in))
        self.bias = np.zeros(n_out, np.float32)  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel + self.bias


def normal(random: np.random.Generator, shape: tuple[int, ...], scale: float) -> jax.Array:
    """Normal numbers, float32; a NumPy array, so that drawing compiles nothing."""
    return random.normal(0, scale, shape).astype(np.float32)  # pyright: ignore[reportReturnType]


class Mlp(Module):
    """Layers of `widths` with relu between them."""

    hidden: list[Dense]
    output: Dense

    def __init__(self, random: np.random.Generator, widths: tuple[int, ...]):
        pairs = list(itertools.pairwise(widths))
        self.hidden = [Dense(random, *pair, gain=2.0) for pair in pairs[:-1]]
        self.output = Dense(random, *pairs[-1])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.hidden:
            x = jax.nn.relu(layer(x))
        return self.output(x)


def patches(x: jax.Array) -> jax.Array:
    """(batch, height, width, channels) to the 3 x 3 neighbours of each place, (..., 9 channels)."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts, -1)


def pool(x: jax.Array) -> jax.Array:
    """The largest of each 2 x 2 places."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


class ConvNet(Module):
    """3 x 3 convolutions, each with relu and a halving of the size, then one hidden layer."""

    convolutions: list[Dense]
    hidden: Dense
    output: Dense

    def __init__(
        self,
        random: np.random.Generator,
        size: int,
        channels: tuple[int, ...],
        hidden: int,
        classes: int,
    ):
        pairs = zip((1, *channels[:-1]), channels, strict=True)
        self.convolutions = [Dense(random, 9 * a, b, gain=2.0) for a, b in pairs]
        left = size // 2 ** len(channels)
        self.hidden = Dense(random, left**2 * channels[-1], hidden, gain=2.0)
        self.output = Dense(random, hidden, classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.convolutions:
            x = pool(jax.nn.relu(layer(patches(x))))
        return self.output(jax.nn.relu(self.hidden(x.reshape(len(x), -1))))


class Block(Module):
    """Causal attention and a layer of relu, each on a normalised residual stream."""

    query: Dense
    key: Dense
    value: Dense
    out: Dense
    up: Dense
    down: Dense
    heads: int
    static = "heads"

    def __init__(self, random: np.random.Generator, width: int, heads: int):
        self.query, self.key, self.value, self.out = (Dense(random, width, width) for _ in range(4))
        self.up, self.down = Dense(random, width, 4 * width, 2.0), Dense(random, 4 * width, width)
        self.heads = heads

    def __call__(self, x: jax.Array) -> jax.Array:
        normed = rms_normalised(x)
        split = (*x.shape[:-1], self.heads, -1)
        query, key, value = (
            layer(normed).reshape(split) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(
            jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(x.shape)
        )
        return x + self.down(jax.nn.relu(self.up(rms_normalised(x))))


def rms_normalised(x: jax.Array) -> jax.Array:
    """x over its root mean square on the last axis; no parameters."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


class CharTransformer(Module):
    """A decoder over characters: (batch, places) int32 to logits (batch, places, vocabulary)."""

    embedding: jax.Array
    positions: jax.Array
    blocks: list[Block]
    output: Dense

    def __init__(
        self, random: np.random.Generator, vocabulary: int, places: int, width: int, depth: int
    ):
        self.embedding = normal(random, (vocabulary, width), 0.1)
        self.positions = normal(random, (places, width), 0.1)
        self.blocks = [Block(random, width, max(1, width // 16)) for _ in range(depth)]
        self.output = Dense(random, width, vocabulary)

    def __call__(self, characters: jax.Array) -> jax.Array:
        x = self.embedding[characters] + self.positions[: characters.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.output(rms_normalised(x))
