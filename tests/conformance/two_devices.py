"""Every case on parameters sharded over two devices, against one device; run by `test_sharding.py`."""

import sys

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from harness import assert_close, random_tree
from registry import CASES

mesh = Mesh(np.asarray(jax.devices()), ("data",))


def sharded(tree):
    """Leaves whose first axis divides by two are split along it, the others are copied to both devices."""

    def spec(leaf):
        split = leaf.ndim > 0 and leaf.shape[0] % len(mesh.devices) == 0
        return NamedSharding(mesh, PartitionSpec("data") if split else PartitionSpec())

    return jax.tree.map(lambda leaf: jax.device_put(leaf, spec(leaf)), tree)


def sharded_state(tx, params):
    """A fresh state, sharded as optax documents: moments as the parameters, the rest copied to both devices."""
    copied = NamedSharding(mesh, PartitionSpec())
    shardings = optax.tree.map_params(
        tx,
        lambda moment, param: moment if isinstance(moment, optax.MaskedNode) else param.sharding,
        tx.init(params),
        params,
        transform_non_params=lambda _: copied,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    return jax.device_put(tx.init(params), shardings)


def second_update(step, state, params, grads):
    _, state = step(grads, state, params)
    return step(grads, state, params)[0]


if __name__ == "__main__":
    assert jax.device_count() == 2
    for case in CASES:
        trees = [random_tree(case.shapes, seed) for seed in (0, 1)]
        tx = case.make()
        params, grads = map(sharded, trees)
        updates = second_update(jax.jit(tx.update), sharded_state(tx, params), params, grads)
        assert_close(updates, second_update(tx.update, tx.init(trees[0]), *trees))
        sys.stdout.write(f"{case.name}\n")
