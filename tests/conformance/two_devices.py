"""Every case on parameters sharded over two devices, against one device; run by `test_sharding.py`."""

import sys

import jax
import numpy as np
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


def second_update(tx, step, params, grads):
    _, state = step(grads, tx.init(params), params)
    return step(grads, state, params)[0]


if __name__ == "__main__":
    assert jax.device_count() == 2
    for case in CASES:
        trees = [random_tree(case.shapes, seed) for seed in (0, 1)]
        tx = case.make()
        updates = second_update(tx, jax.jit(tx.update), *map(sharded, trees))
        assert_close(updates, second_update(tx, tx.update, *trees))
        sys.stdout.write(f"{case.name}\n")
