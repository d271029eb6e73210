"""The step of a chain with its element-wise part as generated loops: what XLA computes, within rounding, in place."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bounds
import chainrule as cr
import optax_cases
from chainrule.native import loops
from chainrule.native.loop_text import supports
from harness import random_tree

SHAPES = [(), (1,), (0,), (7,), (33, 40), (3, 3, 4, 8), (70_001,)]
CHAINS = {
    "optax.adamw": optax.adamw(0.1),
    "optax.lion": optax.lion(0.1),
    "optax.adabelief": optax.adabelief(0.1),
    "schedule": optax.sgd(optax.linear_schedule(0.1, 0.0, 10), momentum=0.9, nesterov=True),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.1),
    "clipped": optax.chain(optax.clip(1.0), optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    "chains.stam": cr.chains.stam(0.1),
    "chains.casmo": cr.chains.casmo(0.1),
    "chains.stam_lite": cr.chains.stam_lite(0.1),
}
"""Chains all of whose state moves smoothly: a rounding of the gradient is a rounding of the result."""


def plain(tx):
    def step(params, state, grads, **extra):
        updates, new = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), new

    return step


def assert_near(found, wanted, relative):
    """Floats within `relative` of the largest entry, the rest equal; structures, shapes and dtypes equal."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if not jnp.issubdtype(a.dtype, jnp.floating):
            assert np.array_equal(np.asarray(a), np.asarray(b))
        elif a.size:
            a, b = (np.asarray(x, np.float64) for x in (a, b))
            size = np.max(np.abs(b), initial=0, where=np.isfinite(b))
            np.testing.assert_allclose(a, b, rtol=relative, atol=relative * size)


def compare(tx, dtype="float32", steps=3, shapes=SHAPES, **extra):
    """Steps from the same states, by XLA and by loops."""
    params = random_tree(shapes, 0, dtype)
    state = tx.init(params)
    ours, theirs = jax.jit(cr.fused(tx)), jax.jit(plain(tx))
    # A step is some tens of roundings; in bfloat16 XLA may leave out those between operations.
    relative = bounds.gamma(48, "float32" if dtype == "float32" else "bfloat16")
    grads = random_tree(shapes, 1, dtype)
    for i in range(steps):
        found = ours(params, state, grads, **extra)
        assert_near(found, theirs(params, state, grads, **extra), relative)
        params, state, grads = *found, random_tree(shapes, i + 2, dtype)
    return ours, (params, state, grads)


@pytest.mark.parametrize("name", CHAINS)
def test_equals_the_step_by_xla(name):
    ours, arguments = compare(CHAINS[name])
    assert ours._cache_size() == 1
    assert "custom_call @chainrule_loops" in ours.lower(*arguments).as_text()


def test_bfloat16_parameters():
    compare(optax.chain(optax.trace(0.9), optax.scale(-0.1)), "bfloat16")


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4),
    st.sampled_from(["float32", "bfloat16"]),
)
@settings(max_examples=8, deadline=None)
def test_shapes(shapes, dtype):
    compare(optax.sgd(0.1, momentum=0.9), dtype, steps=1, shapes=shapes)


OF_GRADIENTS = [
    case for case in optax_cases.NAMED if not (case.loss or case.batch or case.descends)
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.optimistic_adam. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("case", OF_GRADIENTS, ids=lambda case: case.name)
def test_optax(case):
    tx, shapes = case.make(), [(7,), (8, 9)]
    params = case.parameters(random_tree(shapes, 0))
    grads = case.parameters(random_tree(shapes, 1))
    extra = case.extra(0)
    arguments = (params, tx.init(params), grads)
    found = jax.jit(cr.fused(tx))(*arguments, **extra)
    assert_near(found, jax.jit(plain(tx))(*arguments, **extra), bounds.gamma(200))


AWKWARD = np.array([0.0, -0.0, 1.5, -2.5, np.inf, -np.inf, np.nan, 3e38, -1e-30, 7.0], np.float32)
OPERATIONS = {
    "arithmetic": (lambda x, y: x * 3 + y - x / y, lambda x, y: x * np.float32(3) + y - x / y),
    "maximum": (jnp.maximum, np.maximum),
    "minimum": (jnp.minimum, np.minimum),
    "sign": (lambda x, y: jnp.sign(x), lambda x, y: np.sign(x)),
    "abs": (lambda x, y: abs(-x), lambda x, y: abs(x)),
    "sqrt": (lambda x, y: jnp.sqrt(x), lambda x, y: np.sqrt(x)),
    "square": (lambda x, y: jnp.square(x), lambda x, y: x * x),
    "cube": (lambda x, y: x**3, lambda x, y: x * (x * x)),
    "inverse": (lambda x, y: x**-2, lambda x, y: np.float32(1) / (x * x)),
    "clip": (lambda x, y: jnp.clip(x, -2, 2), lambda x, y: np.clip(x, -2, 2)),
    "finite": (lambda x, y: jnp.where(jnp.isfinite(x), x, 0), lambda x, y: np.where(np.isfinite(x), x, 0)),
    "less": (lambda x, y: (x < y).astype(jnp.float32), lambda x, y: (x < y).astype(np.float32)),
    "or": (
        lambda x, y: jnp.where((x >= y) | ~(x != 0), x, y),
        lambda x, y: np.where((x >= y) | ~(x != 0), x, y),
    ),
    "infinite": (lambda x, y: jnp.where(x == jnp.inf, -jnp.inf, x), lambda x, y: np.where(x == np.inf, -np.inf, x)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, on infinities
def test_operations_on_awkward_values_are_those_of_numpy():
    x, y = (a.ravel().copy() for a in np.meshgrid(AWKWARD, AWKWARD))
    closed = jax.make_jaxpr(lambda x, y: [f(x, y) for f, _ in OPERATIONS.values()])(x, y)
    assert all(map(supports, closed.jaxpr.eqns))
    found = jax.jit(lambda x, y: loops.loops.bind(x, y, jaxpr=closed, aliases=()))(x, y)
    for (name, (_, formula)), a in zip(OPERATIONS.items(), found, strict=True):
        assert np.array_equal(a, formula(x, y), equal_nan=True), name


@pytest.mark.parametrize(
    "f",
    [jnp.exp, jnp.cumsum, lambda x: x * x[:1], lambda x: x[::-1], lambda x: x @ x, lambda x: x % 2],
)
def test_what_is_no_loop_is_left_to_xla(f):
    (eqn,) = jax.make_jaxpr(f)(jnp.ones((4, 4))).eqns[-1:]
    assert not supports(eqn)


def test_donated_parameters_and_state_are_written_in_place():
    tx = optax.adamw(0.1)
    params = random_tree([(64, 64), (100,)], 0)
    state = tx.init(params)
    step = jax.jit(cr.fused(tx), donate_argnums=(0, 1))

    def pointers(params, state):
        return [x.unsafe_buffer_pointer() for x in (*params, *state[0].mu, *state[0].nu)]

    before = pointers(params, state)
    new = step(params, state, random_tree([(64, 64), (100,)], 1))
    assert pointers(*new) == before


def test_what_is_not_donated_stays():
    tx, params = optax.sgd(1.0, momentum=0.5), [jnp.ones(50)]
    state = tx.init(params)
    new, _ = jax.jit(cr.fused(tx))(params, state, [jnp.ones(50)])
    assert np.all(np.asarray(params[0]) == 1) and np.all(np.asarray(state[0].trace[0]) == 0)
    assert np.all(np.asarray(new[0]) == 0)


def test_alike_chains_are_compiled_once():
    arguments = ([jnp.ones(5)], optax.adam(0.1).init([jnp.ones(5)]), [jnp.ones(5)])
    jax.jit(cr.fused(optax.adam(0.123)))(*arguments)
    misses = loops._loaded.cache_info().misses
    jax.jit(cr.fused(optax.adam(0.123)))(*arguments)
    assert loops._loaded.cache_info().misses == misses


def test_extra_arguments():
    tx = cr.chain(optax.trace(0.5), optax.scale_by_polyak())
    compare(tx, shapes=[(5,), (4, 4)], value=jnp.float32(0.3))


def test_operation_by_operation_without_jit():
    tx, params, grads = optax.adamw(0.1), random_tree(SHAPES, 0), random_tree(SHAPES, 1)
    state = tx.init(params)
    found = cr.fused(tx)(params, state, grads)
    assert_near(found, jax.jit(plain(tx))(params, state, grads), bounds.gamma(48))


def test_vmap_and_derivatives_are_those_of_xla():
    tx = optax.sgd(0.1, momentum=0.9)
    params, grads = random_tree([(3, 8)], 0), random_tree([(3, 8)], 1)
    state = jax.vmap(tx.init)(params)
    found = jax.jit(jax.vmap(cr.fused(tx)))(params, state, grads)
    assert_near(found, jax.jit(jax.vmap(plain(tx)))(params, state, grads), bounds.ELEMENTWISE)

    def loss(step, rate):
        tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)
        state = tx.init(params)
        state.hyperparams["learning_rate"] = rate
        new, _ = step(tx)(params, state, grads)
        return jnp.sum(new[0] ** 2)

    slopes = [
        jax.jit(jax.grad(loss, argnums=1), static_argnums=0)(s, 0.1) for s in (cr.fused, plain)
    ]
    bound = bounds.summed(24)
    np.testing.assert_allclose(*slopes, rtol=bound, atol=bound * 100)  # of terms below 10


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_get_xla_alone(platform):
    tx, params = optax.adamw(0.1), [jnp.ones(50)]
    traced = jax.jit(cr.fused(tx)).trace(params, tx.init(params), params)
    assert "custom_call" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_exported_programs_run_without_the_loops():
    tx, params = optax.adamw(0.1), [jnp.ones(50)]
    exported = jax.export.export(jax.jit(cr.fused(tx)))(params, tx.init(params), params)
    assert "@chainrule_loops" not in exported.mlir_module()


def test_on_two_devices_xla_computes(tmp_path):
    code = """
import jax, jax.numpy as jnp, numpy as np, optax, chainrule as cr
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
tx, params = optax.adamw(0.1), [jax.device_put(jnp.arange(64.0), NamedSharding(mesh, PartitionSpec("x")))]
state = jax.jit(tx.init)(params)
step = jax.jit(cr.fused(tx))
compiled = step.lower(params, state, params).compile()
assert "custom-call" not in compiled.as_text() and "all-gather" not in compiled.as_text()
new, _ = compiled(params, state, params)
assert new[0].sharding.spec == PartitionSpec("x")
alone = [jnp.arange(64.0)]
np.testing.assert_allclose(new[0], step(alone, tx.init(alone), alone)[0][0], rtol=3e-6)  # bounds.gamma(48)
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


@pytest.fixture
def without_memory():
    loops.compiler.cache_clear()
    yield
    loops.compiler.cache_clear()


def test_without_a_compiler_xla_computes_and_a_warning_says_so(monkeypatch, without_memory):
    monkeypatch.setenv("CXX", "no-such-compiler")
    tx, params = optax.adamw(0.1), [jnp.ones(50)]
    step = jax.jit(cr.fused(tx))
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler.*CXX"):
        lowered = step.lower(params, tx.init(params), params)
    assert "custom_call" not in lowered.as_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it says so once
        jax.jit(cr.fused(tx)).lower(params, tx.init(params), params)


def test_a_compiler_that_fails_is_an_error_with_its_words(monkeypatch, without_memory):
    monkeypatch.setenv("CXX", f"{sys.executable} -c print(nothing)")
    tx, params = optax.adamw(0.1), [jnp.ones(50)]
    with pytest.raises(RuntimeError, match=r"chainrule.fused: .* failed:[\s\S]*nothing"):
        jax.jit(cr.fused(tx)).lower(params, tx.init(params), params)


@pytest.mark.parametrize(
    ("key", "rows", "message"),
    [
        ("unknown", [0, 1, 0], "compiled in this process.*unknown.*trace the step again"),
        ("known", [1, 1, 0], r"rows\[0\]: must be in \[0, 0\], got 1"),
        ("known", [0, 1, 2], r"rows\[2\]: must be in \[0, 1\], got 2"),
        ("known", [0, 2, 0], r"rows\[1\]|rows: length"),
    ],
)
def test_the_foreign_call_refuses_what_it_does_not_have(key, rows, message):
    if key == "known":
        source = 'extern "C" void loop_0(void* const*, long, long) {}'  # never called: rows are checked first
        key = loops._loaded(loops.compiler(), source, 1)
    call = jax.ffi.ffi_call("chainrule_loops", [jax.ShapeDtypeStruct((4,), jnp.float32)])
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.jit(lambda x: call(x, key=key, rows=np.asarray(rows, np.int32)))(jnp.ones(4))
