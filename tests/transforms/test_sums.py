"""Sums taken in the kernel, in XLA and by the formula are the same, under every transformation of JAX."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bounds
from chainrule import chains
from chainrule.bridges.lowering import lower, to_torch
from chainrule.bridges.lowering.ops import kernel_call
from chainrule.native import forms, primitives
from chainrule.transforms._sums import means, sums
from harness import assert_close, random_tree, run

SHAPES = [(), (0,), (7,), (33, 40), (3, 5000)]
C = 0.5
STEP, CURVATURE = (
    1e-6,
    100.0,
)  # no formula's value, slope or third derivative is larger where it is tried
FORMULAS = {
    "moments": (lambda x, y: x, lambda x, y: x**2),
    "residual": (lambda x, y: np.abs(x - y), lambda x, y: (x - y) ** 2),
    "alignment": (lambda x, y: x * y, lambda x, y: x**2, lambda x, y: y**2),
    "variance_share": (lambda x, y: x**2 / (x**2 + C * y),),
    "square_share": (lambda x, y: x**2 / np.maximum(x**2, C * y),),
    "magnitude": (lambda x, y: np.abs(x),),
}


def tensors(dtype="float32"):
    rng = np.random.default_rng(0)
    xs = [jnp.asarray(rng.standard_normal(s), dtype) for s in SHAPES]
    return xs, [jnp.asarray(rng.standard_normal(s) ** 2, dtype) for s in SHAPES]


def taken(kind, xs, ys, c=C):
    return sums(kind, xs, None if kind in forms.OF_ONE else ys, c)


def expected(kind, xs, ys, of=lambda term: term):
    pairs = [
        (np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in zip(xs, ys, strict=True)
    ]
    return [np.array([of(f(x, y)).sum() for x, y in pairs]) for f in FORMULAS[kind]]


def assert_summed(got, want, sizes, longest=math.inf):
    """Each sum of a list within the rounding of its terms, whose sizes add up to `sizes`."""
    terms = np.array([bounds.summed(min(math.prod(shape), longest)) for shape in SHAPES])
    off = np.abs(np.asarray(got, np.float64) - want) - terms * sizes
    assert np.all(off <= 0), f"{got} is not {want}"


@pytest.mark.parametrize("in_kernel", [True, False], ids=["kernel", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", forms.SUMS)
def test_follow_the_formula(kind, dtype, in_kernel, monkeypatch):
    if not in_kernel:
        monkeypatch.setattr(primitives, "available", lambda: False)
    xs, ys = tensors(dtype)
    compiled = jax.jit(lambda xs, ys: taken(kind, xs, ys)).lower(xs, ys).compile()
    calls = [line for line in compiled.as_text().splitlines() if "chainrule_sums" in line]
    assert sum("custom-call" in line for line in calls) == in_kernel
    for sums_ in zip(
        compiled(xs, ys), expected(kind, xs, ys), expected(kind, xs, ys, np.abs), strict=True
    ):
        assert_summed(*sums_, bounds.KERNEL_TERMS if in_kernel else math.inf)


@pytest.mark.parametrize("kind", forms.SUMS)
def test_under_vmap_each_is_as_alone(kind):
    xs, ys = tensors()
    many = [jnp.stack([x, 2 * x, -x]) for x in xs], [jnp.stack([y, y, 3 * y]) for y in ys]
    cs = jnp.array([0.5, 1.0, 2.0])
    together = jax.vmap(lambda xs, ys, c: taken(kind, xs, ys, c))(*many, cs)
    for i in range(3):
        alone = taken(kind, [x[i] for x in many[0]], [y[i] for y in many[1]], cs[i])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_array_equal(a[i], b)


@pytest.mark.parametrize("kind", forms.SUMS)
def test_the_derivative_is_that_of_the_formula(kind):
    xs, ys = [jnp.array([0.5, -2.0])], [jnp.array([1.5, 0.25])]

    def total(x, y):
        return sum(v.sum() for v in taken(kind, [x], [y]))

    def formula(x, y):
        x, y = np.float64(x), np.float64(y)
        return sum(f(x, y).sum() for f in FORMULAS[kind])

    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(*xs, *ys)
    for argument, slope in enumerate(slopes):
        for i in range(2):
            points = [[np.float64(xs[0]), np.float64(ys[0])] for _ in range(2)]
            for point, step in zip(points, (STEP, -STEP), strict=True):
                point[argument] = point[argument].copy()
                point[argument][i] += step
            difference = (formula(*points[0]) - formula(*points[1])) / (2 * STEP)
            bound = (
                bounds.difference(STEP) * CURVATURE + 2 * bounds.ELEMENTWISE * np.abs(slopes).max()
            )
            np.testing.assert_allclose(slope[i], difference, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", sorted(forms.SUMS.keys() - {"magnitude"}))  # which leaves that out
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_what_is_not_finite_or_overflows_shows_in_its_tensor_alone(kind, bad):
    xs = [jnp.array([1.0, bad, 2.0]), jnp.ones(40)]
    ys = [jnp.ones(3), jnp.ones(40)]
    *_, last = taken(kind, xs, ys) if kind != "alignment" else taken(kind, xs, ys)[:2]
    assert np.isfinite(last[1])
    assert not np.isfinite(last[0])


def test_a_share_of_nothing_is_nothing():
    for kind in ("variance_share", "square_share"):
        assert taken(kind, [jnp.zeros(5)], [jnp.zeros(5)])[0] == 0


def test_no_tensors_have_no_sums():
    assert [v.shape for v in sums("moments", [])] == [(0,), (0,)]
    assert [v.tolist() for v in means("moments", [jnp.zeros((0, 2))])] == [[0.0], [0.0]]


def test_wide_and_complex_tensors_are_reduced_in_xla():
    z = jnp.array([3.0 + 4.0j, 1.0j])
    product, x, y = sums("alignment", [z], [2 * z])
    np.testing.assert_allclose(
        [product[0], x[0], y[0]], [52.0, 26.0, 104.0], rtol=bounds.ELEMENTWISE
    )
    with jax.enable_x64(True):
        (mean, _) = means("moments", [jnp.array([1.0, 1.0 + 1e-12], jnp.float64)])
        assert mean.dtype == jnp.float64 and mean[0] > 1


@pytest.mark.parametrize(
    "make",
    [chains.stam, chains.stam_lite, chains.casmo, chains.casmo_snr, chains.magma],
    ids=lambda f: f.__name__,
)
def test_a_chain_is_the_same_with_and_without_the_kernel(make, monkeypatch):
    tx = make(chains.adam()) if make is chains.magma else make()
    shapes = {"dense": {"bias": (300,), "kernel": (40, 30)}, "scale": ()}
    params, grads = random_tree(shapes, 0), [random_tree(shapes, seed) for seed in range(1, 5)]
    with_kernel, _ = run(tx, params, grads)
    monkeypatch.setattr(primitives, "available", lambda: False)
    jax.clear_caches()
    without, _ = run(tx, params, grads)
    assert_close(with_kernel, without, rtol=bounds.summed(1200))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", forms.SUMS)
def test_in_a_bridge(kind, compiled):
    xs, ys = tensors()
    many = [jnp.stack([x, 2 * x]) for x in xs], [jnp.stack([y, 3 * y]) for y in ys]

    def slope(xs, ys):
        return jax.grad(lambda x: sum(v.sum() for v in taken(kind, [x], [ys[2]])))(xs[2])

    def each(xs, ys):
        return taken(kind, xs, ys)

    for function, args in ((each, (xs, ys)), (jax.vmap(each), many), (slope, (xs, ys))):
        lowered = lower(function, *args, compiled=compiled)
        calls = [n for n in lowered.graph.nodes if n.target is kernel_call]
        in_kernel = not compiled or kind == "magnitude"  # whose reader is in the kernel too
        assert len(calls) == (in_kernel and function is not slope)
        results = lowered(*map(to_torch, jax.tree.leaves(args)))
        wanted = jax.tree.leaves(function(*args))
        if function is slope:
            assert_close(results[0].numpy(), wanted[0], bounds.ELEMENTWISE)
            continue
        # Twice x and three times y: no term is more than six times as large.
        sizes = [6 * size for size in expected(kind, xs, ys, np.abs)]
        for got, want, size in zip(results, wanted, sizes, strict=True):
            assert_summed(got, want, size)
