"""Chains on eight devices, against one; run by `test_sharding.py` with patterns of the checks' names.

A layout says how parameters lie on the mesh: `data`, whole on every device; `fsdp`, cut along the first axis;
`tensor`, matrices cut along the second; each on a mesh of automatic axes, where XLA finds how everything else lies,
and of explicit ones (`jax.make_mesh`'s default), where the types of arrays say it.
"""

import functools
import re
import sys
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bounds
from chainrule import apply_updates, chains, transforms
from chainrule.transforms.newton_schulz import COEFFICIENTS
from harness import assert_close, assert_identical, random_tree
from registry import in_tiers

SHAPES = {"bias": (16,), "kernel": (64, 32), "more": {"embedding": (128, 16)}, "scale": ()}

ELEMENTWISE = {
    "adam": lambda: chains.adam(weight_decay=0.1),
    "nadam": chains.nadam,
    "compensated": lambda: optax.chain(chains.adam(), transforms.compensated()),
    "grokfast": lambda: chains.grokfast(chains.adam()),
    "optax.adamw": lambda: optax.adamw(1e-3),
    "optax.lion": lambda: optax.lion(1e-3),
}
SUMS = {
    "stam": chains.stam,
    "stam_lite": chains.stam_lite,
    "casmo": chains.casmo,
    "casmo by parameter": lambda: chains.casmo(granularity="parameter"),
    "casmo_snr": chains.casmo_snr,
    "magma": lambda: chains.magma(chains.adam()),
    "orthograd": lambda: chains.orthograd(chains.adam()),
    "cosmic": lambda: in_tiers(chains.cosmic()),
    "optax.lamb": lambda: optax.lamb(1e-3),
    "optax.clip_by_global_norm": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(1e-3)
    ),
}
MATRICES = {"muon": chains.muon, "optax.adafactor": lambda: optax.adafactor(1e-3)}
CHAINS = ELEMENTWISE | SUMS | MATRICES

LAYOUTS: dict[str, Callable[[tuple[int, ...]], P]] = {
    "data": lambda shape: P(),
    "fsdp": lambda shape: P("x") if shape else P(),
    "tensor": lambda shape: P(None, "x") if len(shape) == 2 else P(),
}


@functools.cache
def mesh_of(axes: AxisType) -> Mesh:
    return jax.make_mesh((8,), ("x",), axis_types=(axes,))


def placed(tree, layout, mesh):
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, LAYOUTS[layout](x.shape))), tree
    )


def lie_alike(state, params):
    """Every leaf in the shape of a cut parameter lies as that does."""
    cut = {p.shape: p.sharding for p in jax.tree.leaves(params) if not p.is_fully_replicated}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.shape in cut:
            assert leaf.sharding.is_equivalent_to(cut[leaf.shape], leaf.ndim), (path, leaf.sharding)


def gathered(text):
    """The shapes that collectives other than reductions make, but of a few numbers for each tensor."""
    moves = r"= \(?\w+\[([\d,]*)\][^=]* (?:all-gather|all-to-all|collective-permute)"
    sizes = [np.prod([int(n) for n in s.split(",") if n]) for s in re.findall(moves, text)]
    return [size for size in sizes if size > 16]


def steps_alone(name, shapes):
    """Updates of two steps on one device."""
    tx, params = CHAINS[name](), random_tree(shapes, 0)
    state, seen, update = tx.init(params), [], jax.jit(tx.update)
    for seed in (1, 2):
        updates, state = update(random_tree(shapes, seed), state, params)
        seen.append(updates)
    return seen


two_steps = functools.cache(lambda name: steps_alone(name, SHAPES))


def bound(name):
    if name != "muon":  # sums over whole tensors, of 128 x 16 entries at most
        return bounds.summed(2048)
    kernel = np.asarray(random_tree(SHAPES, 1)["kernel"])
    s = np.linalg.svd(kernel, compute_uv=False) / np.linalg.norm(kernel)
    triples = 5 * COEFFICIENTS["keller_jordan"]
    # An orthogonal matrix of 64 x 32 has entries of an eighth in the mean, so the largest has more.
    return bounds.iterated(s, triples) * 8


def check_layout(name, layout, axes):
    check_steps(name, SHAPES, two_steps(name), bound(name), layout, axes)


def check_large(name):
    """With a leaf of 2^16 entries, whose sums are written in another way."""
    shapes = {"kernel": (512, 128)}
    expected = steps_alone(name, shapes)
    check_steps(name, shapes, expected, bounds.summed(2**16), "fsdp", AxisType.Explicit)


def check_steps(name, shapes, expected, rtol, layout, axes):
    tx, mesh = CHAINS[name](), mesh_of(axes)
    params = placed(random_tree(shapes, 0), layout, mesh)
    state = tx.init(params)
    lie_alike(state, params)
    if not name.startswith("optax."):  # whose moments jit puts whole on one device
        init = jax.jit(tx.init).lower(params).compile()
        lie_alike(init(params), params)
        # No moment is made whole and then cut: there is room for a device's part of one, and for what decides.
        assert not re.search("all-|collective", init.as_text())
        largest = max(p.addressable_shards[0].data.nbytes for p in jax.tree.leaves(params))
        assert init.memory_analysis().temp_size_in_bytes < 2 * largest
    step = None
    for seed, updates_alone in zip((1, 2), expected, strict=True):
        grads = placed(random_tree(shapes, seed), layout, mesh)
        step = step or jax.jit(tx.update).lower(grads, state, params).compile()
        updates, state = step(grads, state, params)
        assert_close(updates, updates_alone, rtol)
        lie_alike(state, params)
    assert step is not None
    if name not in MATRICES:
        assert not gathered(step.as_text()), gathered(step.as_text())
    assert "chainrule_" not in step.as_text()  # a foreign call would have its operands gathered


# ---- inside shard_map --------------------------------------------------------------------------


def check_data_parallel_by_hand(name):
    """Every device has gradients of its own; the chain sees their mean."""
    tx, mesh = CHAINS[name](), mesh_of(AxisType.Auto)
    params, grads = random_tree(SHAPES, 0), [random_tree(SHAPES, seed) for seed in range(1, 9)]
    together = jax.tree.map(lambda *gs: jnp.stack(gs), *grads)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P("x"), P()), out_specs=P())
    def updates(grads, params):
        mean = jax.tree.map(lambda g: jax.lax.pmean(g[0], "x"), grads)
        return tx.update(mean, tx.init(params), params)[0]

    mean = jax.tree.map(lambda gs: jnp.mean(gs, axis=0), together)
    expected, _ = jax.jit(tx.update)(mean, tx.init(params), params)
    assert_close(updates(together, params), expected, bound(name))


def check_parts_by_hand(name):
    """Entry by entry a chain may be given parts."""
    tx, mesh, tree = CHAINS[name](), mesh_of(AxisType.Auto), {"kernel": (64, 32), "bias": (16,)}
    params, grads = random_tree(tree, 0), random_tree(tree, 1)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    def updates(grads, params):
        return tx.update(grads, tx.init(params), params)[0]

    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert_close(updates(grads, params), expected, bounds.stepped(1))


# ---- Newton-Schulz over devices ------------------------------------------------------------------


def check_matrices_are_shared_out():
    """Eight devices with a matrix each do an eighth of the operations, and the same."""
    mesh = mesh_of(AxisType.Auto)
    over = NamedSharding(mesh, P("x"))
    stack = random_tree({str(i): (48, 32) for i in range(7)} | {"tall": (48, 32)}, 0)
    alone, shared = transforms.newton_schulz(), transforms.newton_schulz(sharding=over)

    def compiled(tx, layout):
        grads = placed(stack, layout, mesh)
        return grads, jax.jit(lambda g: tx.update(g, optax.EmptyState())[0]).lower(grads).compile()

    expected = alone.update(stack, optax.EmptyState())[0]
    grads, whole = compiled(alone, "data")
    for layout in LAYOUTS:
        grads, parts = compiled(shared, layout)
        assert_close(parts(grads), expected, bound("muon"))
        ratio = parts.cost_analysis()["flops"] / whole.cost_analysis()["flops"]
        assert ratio < 1.05 / 8, (layout, ratio)


# ---- weights in bfloat16 -------------------------------------------------------------------------


def check_rounding(layout):
    """Random bits do not depend on the layout, and each device makes its own."""

    def step(params, updates, key):
        return apply_updates(params, updates, rounding="stochastic", key=key)

    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tree(SHAPES, 0))
    updates, key = jax.tree.map(lambda x: 1e-3 * x, random_tree(SHAPES, 1)), jax.random.key(2)
    there = [placed(tree, layout, mesh_of(AxisType.Auto)) for tree in (half, updates)]
    compiled = jax.jit(step).lower(*there, key).compile()
    assert_identical(
        jax.device_get(compiled(*there, key)), jax.device_get(step(half, updates, key))
    )
    assert not re.search("all-|collective", compiled.as_text())


# ---- checkpoints -----------------------------------------------------------------------------


def check_orbax(name):
    """Saved on one mesh and restored on another: the same numbers, lying as the new parameters do."""
    tx = CHAINS[name]()
    old = placed(random_tree(SHAPES, 0), "fsdp", mesh_of(AxisType.Auto))
    _, state = jax.jit(tx.update)(old, tx.init(old), old)
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    new = placed(random_tree(SHAPES, 0), "tensor", mesh)

    def struct(x):
        lies = x.sharding if isinstance(x.sharding, NamedSharding) else NamedSharding(mesh, P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies)

    like = jax.tree.map(struct, tx.init(new))
    with (
        tempfile.TemporaryDirectory() as folder,
        orbax.checkpoint.StandardCheckpointer() as checkpointer,
    ):
        checkpointer.save(f"{folder}/state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(f"{folder}/state", like)
    assert_identical(jax.device_get(restored), jax.device_get(state))
    lie_alike(restored, new)
    step = jax.jit(tx.update)
    expected, _ = step(*jax.device_get((old, state, old)))
    assert_close(step(new, restored, new)[0], expected, bound(name))


# ---- which checks ----------------------------------------------------------------------------


CHECKS: dict[str, Callable[[], None]] = {
    **{
        f"{layout}, {axes.name}, {name}": functools.partial(check_layout, name, layout, axes)
        for name in CHAINS
        for layout in LAYOUTS
        for axes in (AxisType.Auto, AxisType.Explicit)
        if layout != "data" or axes == AxisType.Auto
    },
    **{
        f"large, {name}": functools.partial(check_large, name)
        for name in ("stam", "casmo_snr", "magma")
    },
    **{f"by hand, {name}": functools.partial(check_data_parallel_by_hand, name) for name in CHAINS},
    **{f"parts, {name}": functools.partial(check_parts_by_hand, name) for name in ELEMENTWISE},
    **{
        f"orbax, {name}": functools.partial(check_orbax, name)
        for name in ("stam", "muon", "cosmic")
    },
    **{f"rounding, {layout}": functools.partial(check_rounding, layout) for layout in LAYOUTS},
    "matrices": check_matrices_are_shared_out,
}


if __name__ == "__main__":
    assert jax.device_count() == 8
    for check, run in CHECKS.items():
        if any(re.match(wanted, check) for wanted in sys.argv[1:]):
            run()
            sys.stdout.write(f"{check}\n")
            sys.stdout.flush()
