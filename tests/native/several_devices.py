"""Run by `test_primitives.py` with eight devices: the kernel runs in `shard_map`, and XLA sums what is sharded."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import bounds
from chainrule.native import forms, xla


def main():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("x"))
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
