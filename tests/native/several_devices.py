"""Run by `test_primitives.py` with eight devices: nothing is gathered, and the kernel runs in `shard_map`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import bounds
from chainrule import chains
from chainrule.native import forms, xla
from harness import assert_close

SHAPES = {"kernel": (64, 32), "embedding": (128, 16), "bias": (8,)}


def tree(seed, sharding=None):
    rng = np.random.default_rng(seed)
    arrays = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in SHAPES.items()}
    return arrays if sharding is None else jax.device_put(arrays, sharding)


def gathered(compiled):
    """The shapes that all-gathers of a program make, but of vectors with a number for each tensor."""
    text = compiled.as_text()
    found = re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather", text)
    return [s for s in found if np.prod([int(n) for n in s.split(",") if n]) > 8]


def check_chain(name, tx, mesh):
    rows = NamedSharding(mesh, PartitionSpec("x"))
    params, grads = tree(0), tree(1)
    state = tx.init(params)
    expected, _ = jax.jit(tx.update)(grads, state, params)

    def placed(x):
        whole = x.ndim == 0 or x.shape[0] % 8 or x.size < 64
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec()) if whole else rows)

    sharded = jax.tree.map(placed, state)
    args = tree(1, rows), sharded, tree(0, rows)
    compiled = jax.jit(tx.update).lower(*args).compile()
    assert not gathered(compiled), (name, gathered(compiled))
    assert "chainrule_" not in compiled.as_text(), name
    assert_close(compiled(*args)[0], expected, bounds.summed(64 * 32))


CHAINS = {
    "adam": chains.adam(),
    "stam": chains.stam(),
    "stam_lite": chains.stam_lite(),
    "casmo": chains.casmo(),
    "casmo_snr": chains.casmo_snr(),
    "magma": chains.magma(optax.adamw(1e-3)),
}


def main():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    for name, tx in CHAINS.items():
        check_chain(name, tx, mesh)

    # Inside shard_map every device has its own part, and the kernel sums it.
    xs = jax.device_put(jnp.arange(64.0), rows)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec())
    def total(x):
        return jax.lax.psum(xla.sums("moments", [x])[1], "x")

    compiled = total.lower(xs).compile()
    assert "chainrule_sums" in compiled.as_text()
    np.testing.assert_allclose(compiled(xs), [np.sum(np.arange(64.0) ** 2)], rtol=bounds.summed(64))

    # Sums of sharded arrays outside of it are XLA's.
    for kind in forms.SUMS:
        pair = [xs] if kind in forms.OF_ONE else [xs, xs]
        sharded = jax.jit(lambda *p, k=kind: xla.sums(k, *[[x] for x in p], c=0.5))(*pair)
        alone = xla.sums(kind, *[[jnp.asarray(np.asarray(x))] for x in pair], c=0.5)
        np.testing.assert_allclose(np.stack(sharded), np.stack(alone), rtol=bounds.summed(64))


if __name__ == "__main__":
    main()
