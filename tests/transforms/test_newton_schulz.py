"""Newton-Schulz: the Gram iteration, how leaves are read as matrices, scales, and what it refuses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import bounds
from chainrule.transforms import _gram_iteration, newton_schulz
from chainrule.transforms.newton_schulz import COEFFICIENTS
from reference import muon as reference

SIDE = 20  # with `small_panels`, three panels of Hermitian matrices


@pytest.fixture
def small_panels(monkeypatch):
    """Panels and segments on matrices that are quick to multiply."""
    monkeypatch.setattr(_gram_iteration, "_DIRECT", 4)
    monkeypatch.setattr(_gram_iteration, "WHOLE", 4)
    monkeypatch.setattr(_gram_iteration, "TILE", 2)


def orthogonalize(x, **settings):
    tx = newton_schulz(**{"scale": None, **settings})
    return tx.update(x, tx.init(x))[0]


def with_singular_values(s, rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(rows, len(s))))[0]
    right = np.linalg.qr(rng.normal(size=(cols, len(s))))[0]
    return (left * s) @ right.T


def spectrum(x):
    """The singular values that the iteration starts from."""
    s = np.linalg.svd(np.asarray(x), compute_uv=False)
    return s / np.linalg.norm(s)


QUINTIC = reference.COEFFICIENTS["keller_jordan"]
CLASSICAL = [(1.5, -0.5, 0.0)] * 12

SPECTRA = {
    "flat": np.ones(SIDE),
    "one over rank": 1 / np.arange(1.0, SIDE + 1),
    "six decades": np.logspace(0, -6, SIDE),
    "low rank and noise": np.r_[np.ones(3), np.full(SIDE - 3, 1e-3)],
}


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (SIDE, 90), (90, SIDE)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA, ids=str)
def test_the_gram_iteration_loses_no_small_singular_value(small_panels, shape, spectrum):
    x = with_singular_values(SPECTRA[spectrum], *shape)
    exact = reference.orthogonalized(x)
    plain, auto = (
        np.abs(orthogonalize(jnp.asarray(x, jnp.float32), gram=gram) - exact).max()
        for gram in (False, "auto")
    )
    assert auto <= max(
        4 * plain, bounds.gamma(4 * 90)
    )  # a plain error may be no more than a few roundings


def test_one_gram_matrix_for_all_steps_would_lose_them(small_panels):
    x = with_singular_values(SPECTRA["six decades"], SIDE, 90)
    exact = reference.orthogonalized(x)
    one, auto = (
        np.abs(orthogonalize(jnp.asarray(x, jnp.float32), gram=gram) - exact).max()
        for gram in (True, "auto")
    )
    assert one > 4 * auto


@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-6, 6),
)
def test_singular_values_end_near_one(rows, cols, seed, exponent):
    x = np.random.default_rng(seed).normal(size=(rows, cols))
    x = with_singular_values(np.linspace(1, 2, min(x.shape)), rows, cols, seed) * 10.0**exponent
    s = np.linalg.svd(orthogonalize(jnp.asarray(x, jnp.float32)), compute_uv=False)
    assert s.min() > 0.6 and s.max() < 1.3


@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 2**32 - 1))
def test_it_commutes_with_transposition_and_ignores_scale(rows, cols, seed):
    x = with_singular_values(np.linspace(1, 2, min(rows, cols)), rows, cols, seed)
    x = jnp.asarray(x, jnp.float32)
    o, bound = orthogonalize(x), bounds.iterated(spectrum(x), QUINTIC)
    np.testing.assert_allclose(orthogonalize(x.T), o.T, rtol=0, atol=bound)
    np.testing.assert_allclose(orthogonalize(64 * x), o, rtol=0, atol=bound)


@pytest.mark.parametrize("name", reference.COEFFICIENTS)
def test_float64_meets_the_oracle(name):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(7, 11))
        got = orthogonalize(jnp.asarray(x), coefficients=name, gram=True)
        bound = bounds.iterated_by_gram(spectrum(x), reference.COEFFICIENTS[name], "float64")
        expected = reference.orthogonalized(x, name)
        np.testing.assert_allclose(got, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("shape", [(7, 11), (11, 7), (SIDE, 90)], ids=str)
@pytest.mark.parametrize("how", ["schatten", "aol"])
def test_preconditioned_matrices_meet_the_oracle(small_panels, how, shape):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=shape)
        x[1] *= 1e-3
        got = orthogonalize(jnp.asarray(x), preconditioning=how)
        start = reference.preconditioned(x / np.linalg.norm(x), how)
        s = np.linalg.svd(start, compute_uv=False)
        expected = reference.orthogonalized(x, preconditioning=how)
        bound = bounds.iterated_by_gram(s, QUINTIC, "float64")
        np.testing.assert_allclose(got, expected, rtol=0, atol=bound)


@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-12, 12),
    how=st.sampled_from(["schatten", "aol"]),
)
def test_preconditioned_matrices_have_norms_from_frobenius_to_one(rows, cols, seed, exponent, how):
    """With the polynomial x what is handed on is X_0."""
    x = np.random.default_rng(seed).normal(size=(rows, cols)) * 10.0**exponent
    x = jnp.asarray(x, jnp.float32)
    start = orthogonalize(x, coefficients=(1.0, 0.0, 0.0), steps=1, preconditioning=how)
    largest = np.linalg.norm(start, 2)
    slack = bounds.gamma(8 * (rows + cols))
    assert largest <= 1 + slack
    if how == "schatten":
        assert largest >= np.linalg.norm(x, 2) / np.linalg.norm(x) * (1 - slack) - 1e-7


def test_a_zero_row_stays_zero_and_spoils_no_other():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)), jnp.float32)
    got = orthogonalize(x.at[2].set(0), coefficients="aol")
    kept = np.array([0, 1, 3])
    assert not got[2].any()
    bound = bounds.iterated(spectrum(x[kept]), reference.COEFFICIENTS["aol"])
    np.testing.assert_allclose(
        got[kept], orthogonalize(x[kept], coefficients="aol"), rtol=0, atol=bound
    )


def test_aol_is_its_table_one_step_fewer_and_its_preconditioner():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    table = COEFFICIENTS["aol"]
    written_out = orthogonalize(x, coefficients=table, steps=4, preconditioning="aol")
    np.testing.assert_array_equal(orthogonalize(x, coefficients="aol"), written_out)
    plain = orthogonalize(x, coefficients="aol", preconditioning="frobenius")
    np.testing.assert_array_equal(plain, orthogonalize(x, coefficients=table, steps=4))


def test_a_complex_matrix_is_preconditioned_by_magnitudes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8)) + 1j * rng.normal(size=(3, 8))
    expected = reference.orthogonalized(x, "aol")
    got = orthogonalize(jnp.asarray(x, jnp.complex64), coefficients="aol")
    bound = bounds.iterated(spectrum(x), reference.COEFFICIENTS["aol"])
    np.testing.assert_allclose(got, expected, rtol=0, atol=2 * bound)


def errors(name, steps):
    """The largest distance from one of singular values in [1e-3, 1] after each step."""
    s, found = np.geomspace(1e-3, 1, 20_001), []
    for step in range(steps):
        a, b, c = COEFFICIENTS[name][min(step, len(COEFFICIENTS[name]) - 1)]
        s = a * s + b * s**3 + c * s**5
        found.append(np.abs(s - 1).max())
    return found


# What the docstring says, rounded up.
@pytest.mark.parametrize(
    ("name", "five", "eight"),
    [
        ("keller_jordan", 0.53, 0.32),
        ("dion", 0.53, 0.022),
        ("polar_express", 0.154, 1e-10),
        ("cans", 0.1135, 1e-10),
        ("classical", 0.98, 0.85),
        ("cubic", 0.993, 0.975),
    ],
)
def test_coefficients_bring_singular_values_as_near_to_one_as_documented(name, five, eight):
    found = errors(name, 8)
    assert 0.95 * five < found[4] < five and found[7] < eight


def test_cans_is_the_best_of_all_after_every_step_and_polar_express_with_its_margin_the_next():
    found = {name: errors(name, 7) for name in COEFFICIENTS}
    cans, polar_express = (found.pop(name) for name in ("cans", "polar_express"))
    for step, (first, second) in enumerate(zip(cans, polar_express, strict=True)):
        assert first < second < min(own[step] for own in found.values())


def test_each_step_of_cans_is_the_best_quintic_on_what_the_one_before_leaves():
    """An odd quintic is best on an interval if its errors are equal, of changing sign, at both ends and two points
    between (Chebyshev)."""
    low, high = 1e-3, 1.0
    for a, b, c in COEFFICIENTS["cans"][:6]:
        inner = np.sort(np.sqrt(np.roots([5 * c, 3 * b, a]).real))  # where the slope is zero
        s = np.array([low, *inner, high])
        errors = a * s + b * s**3 + c * s**5 - 1
        size = abs(errors[0])
        # From where the slope is zero the polynomial is flat, and the coefficients have 16 digits.
        np.testing.assert_allclose(errors, size * np.array([-1, 1, -1, 1]), rtol=0, atol=1e-12)
        low, high = 1 - size, 1 + size


def test_the_interval_of_polar_express_shrinks_by_its_own_best_quintic():
    """A best odd quintic on an interval has equal errors of changing sign at its ends and two points between."""
    a, b, c = (
        x * 1.01**k for x, k in zip(COEFFICIENTS["polar_express"][4], (1, 3, 5), strict=True)
    )
    inner = np.sqrt(np.roots([5 * c, 3 * b, a]).real)  # where the slope is zero
    extremes = a * inner + b * inner**3 + c * inner**5 - 1
    assert extremes.sum() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("rank", [40, 80])
def test_the_recommended_coefficients_have_the_margin_that_half_precision_needs(rank):
    """Those of CANS, which have none, diverge on such a matrix."""
    s = np.r_[1 / np.arange(1.0, rank + 1), np.zeros(80 - rank)]
    x = jnp.asarray(with_singular_values(s, 80, 320), jnp.float32)
    largest = {
        name: np.abs(orthogonalize(x, coefficients=COEFFICIENTS[name], steps=8, dtype="bfloat16"))
        for name in ("polar_express", "cans")
    }
    # No entry of an orthonormal matrix is above 1, nor near it where there are 80 of 320.
    assert largest["polar_express"].max() < 1
    assert not largest["cans"].max() < 1e3  # or NaN


def test_classical_coefficients_converge_to_the_polar_factor():
    x = with_singular_values(np.array([1.0, 0.4, 0.1]), 3, 5)
    left, _, right = np.linalg.svd(x, full_matrices=False)
    got = orthogonalize(jnp.asarray(x, jnp.float32), coefficients="classical", steps=12)
    bound = bounds.iterated(spectrum(x), CLASSICAL)
    np.testing.assert_allclose(got, left @ right, rtol=0, atol=bound)


def test_the_last_triple_is_repeated():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    two = ((3.0, -4.0, 2.0), (1.5, -0.5, 0.0))
    np.testing.assert_array_equal(
        orthogonalize(x, coefficients=two, steps=4),
        orthogonalize(x, coefficients=(*two, two[1], two[1]), steps=4),
    )


def test_complex_matrices_use_the_conjugate_transpose():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8)) + 1j * rng.normal(size=(3, 8))
    left, _, right = np.linalg.svd(x, full_matrices=False)
    x = jnp.asarray(x, jnp.complex64)
    got = orthogonalize(x, coefficients="classical", steps=12)
    s = spectrum(x)
    np.testing.assert_allclose(got, left @ right, rtol=0, atol=bounds.iterated(s, CLASSICAL))
    # A Gram matrix holds the squares, which its rounding, that of the largest, blurs.
    bound = bounds.iterated(s, QUINTIC) / s.min() ** 2
    np.testing.assert_allclose(orthogonalize(x, gram=True), orthogonalize(x), rtol=0, atol=bound)
    assert orthogonalize(x, dtype="bfloat16").dtype == jnp.complex64


# Leaves


def test_leading_axes_are_batched():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 9)), jnp.float32)
    got = orthogonalize(x, scale="spectral")
    for index in itertools.product(range(2), range(3)):
        bound = bounds.iterated(spectrum(x[index]), QUINTIC)
        alone = orthogonalize(x[index], scale="spectral")
        np.testing.assert_allclose(got[index], alone, rtol=0, atol=bound)


DIMS = {
    "hwio": lambda x: x.reshape(-1, x.shape[-1]),
    "oihw": lambda x: x.reshape(x.shape[0], -1),
    "axes": lambda x: x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1),
}


@pytest.mark.parametrize("dims", DIMS)
def test_a_kernel_is_one_matrix(dims):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 2, 5)), jnp.float32)
    got = orthogonalize(x, dims=((1,), (0, -2, -1)) if dims == "axes" else dims)
    assert got.shape == x.shape
    read = DIMS[dims]
    bound = bounds.iterated(spectrum(read(x)), QUINTIC)
    np.testing.assert_allclose(read(got), orthogonalize(read(x)), rtol=0, atol=bound)


def test_axes_that_are_no_matrix_axes_are_batched():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 6)), jnp.float32)
    got = orthogonalize(x, dims=((0,), (2,)))
    for i in range(3):
        bound = bounds.iterated(spectrum(x[:, i]), QUINTIC)
        np.testing.assert_allclose(got[:, i], orthogonalize(x[:, i]), rtol=0, atol=bound)


def test_dims_may_depend_on_path_and_shape():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 5)), jnp.float32)
    tree = {"conv": {"kernel": x}, "stack": x}

    def dims(path, shape):
        assert shape == x.shape
        return "hwio" if path == "conv/kernel" else "batched"

    got = orthogonalize(tree, dims=dims)
    np.testing.assert_array_equal(got["conv"]["kernel"], orthogonalize(x, dims="hwio"))
    np.testing.assert_array_equal(got["stack"], orthogonalize(x))


SCALES = [
    ({"scale": "spectral"}, (8, 2), 1.0),
    ({"scale": "spectral"}, (2, 8), 2.0),
    ({"scale": "spectral", "scale_axes": "out_in"}, (8, 2), 2.0),
    ({"scale": "spectral", "scale_axes": "out_in"}, (2, 8), 1.0),
    ({"scale": "rms"}, (4, 9), 3.0),
    ({"scale": "rms", "scale_factor": 0.2}, (25, 4), 1.0),
    ({"scale": None, "scale_factor": 0.2}, (2, 8), 0.2),
    # A kernel's own axes, whatever matrix it is read as.
    ({"scale": "spectral", "scale_axes": (-2, -1), "dims": "oihw"}, (3, 3, 8, 2), 2.0),
    ({"scale": "spectral", "scale_axes": (-1, -2), "dims": "hwio"}, (3, 3, 8, 2), 1.0),
    ({"scale": "spectral", "dims": "hwio"}, (1, 2, 1, 8), 2.0),
]


@pytest.mark.parametrize(("settings", "shape", "factor"), SCALES)
def test_scales(settings, shape, factor):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    plain = orthogonalize(x, **{k: v for k, v in settings.items() if k == "dims"})
    np.testing.assert_allclose(
        orthogonalize(x, **settings), factor * plain, rtol=bounds.ELEMENTWISE
    )


def test_the_dual_norm_is_the_sum_of_singular_values():
    x = jnp.asarray(with_singular_values(np.array([3.0, 2.0]), 2, 4), jnp.float32)
    exact = {"coefficients": "classical", "steps": 12}
    got = orthogonalize(x, dual_norm=True, **exact)
    bound = (
        5.0 * bounds.iterated(spectrum(x), CLASSICAL) * 2
    )  # the norm is an inner product with the factor
    np.testing.assert_allclose(got, 5.0 * orthogonalize(x, **exact), rtol=0, atol=bound)


# Degenerate matrices and dtypes


@pytest.mark.parametrize("eps", [1e-7, 0.0])
@pytest.mark.parametrize("eps_scope", ["added", "clamped"])
@pytest.mark.parametrize("gram", [False, True])
def test_a_zero_matrix_stays_zero(eps, eps_scope, gram):
    x = jnp.zeros((2, 3, 4))
    x = x.at[1].set(jnp.eye(3, 4))
    got = orthogonalize(x, eps=eps, eps_scope=eps_scope, gram=gram)
    assert not np.any(got[0])
    assert np.all(np.isfinite(got)) and np.any(got[1])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0, 2, 3)], ids=str)
def test_no_elements(shape):
    assert orthogonalize(jnp.zeros(shape), scale="spectral").shape == shape


def test_rank_one_is_one_pair_of_singular_vectors():
    x = np.outer([1.0, -2.0, 2.0], [3.0, 4.0])
    got = orthogonalize(jnp.asarray(x, jnp.float32), coefficients="classical", steps=8)
    # After n steps a singular value that is only rounding is at most its size times 1.5^n.
    bound = bounds.iterated(np.array([0.0, 1.0]), CLASSICAL[:8])
    np.testing.assert_allclose(got, x / 15, rtol=0, atol=bound)


@pytest.mark.parametrize("eps_scope", ["added", "clamped"])
def test_eps_bounds_what_a_tiny_matrix_becomes(eps_scope):
    x = 1e-9 * jnp.eye(2)
    got = orthogonalize(x, eps_scope=eps_scope, eps=1e-2)
    # Its singular values are at most 1e-9 / 1e-2, and a step multiplies them by 3.4445 at most.
    assert np.abs(got).max() < 1e-7 * 3.4445**5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("gram", [False, "auto"])
def test_half_precision_iterations_are_near_float32(dtype, gram):
    x = jnp.asarray(with_singular_values(np.linspace(0.5, 1, 6), 6, 40), jnp.float32)
    got = orthogonalize(x, dtype=dtype, gram=gram)
    assert got.dtype == x.dtype
    assert np.abs(got - orthogonalize(x)).max() < bounds.RECORDED_BF16


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_updates_are_iterated_in_float32(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)), dtype)
    got = orthogonalize(x)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, orthogonalize(x.astype(jnp.float32)).astype(dtype))


@pytest.mark.parametrize("eps", [2.0**-7, 2.0**-10], ids=["bfloat16", "float16"])
def test_half_precision_keeps_a_gram_matrix_for_two_steps(eps):
    triples = [(3.4445, -4.7750, 2.0315)] * 5
    assert _gram_iteration.segments(768, 3072, triples, eps, "auto") == (2, 2, 1)


@pytest.mark.parametrize("decay", [0, 1, 2])
def test_two_steps_in_half_precision_lose_no_more_than_one_at_a_time(decay):
    rows, cols, triple = 392, 1200, (3.4445, -4.7750, 2.0315)
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.normal(size=(rows, rows)))[0]
    right = np.linalg.qr(rng.normal(size=(cols, rows)))[0]
    g = (left * np.arange(1.0, rows + 1) ** -decay) @ right.T
    exact = g / np.linalg.norm(g)
    a, b, c = triple
    for _ in range(5):
        gram = exact @ exact.T
        exact = a * exact + (b * gram + c * gram @ gram) @ exact

    def error(gram):
        x = jnp.asarray(g / np.linalg.norm(g), jnp.bfloat16)
        got = np.asarray(_gram_iteration.iterate(x, [triple] * 5, gram), np.float64)
        return np.linalg.norm(got - exact) / np.linalg.norm(exact)

    assert error("auto") <= 1.1 * error(False)


# In stacks; on several devices in tests/conformance/eight_devices.py


TOLERANCE = bounds.iterated(np.linspace(0.1, 1, 4), reference.COEFFICIENTS["keller_jordan"])


def over(*spec):
    return NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec(*spec))


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("settings", [{}, {"dual_norm": True}, {"dims": "hwio", "scale": "rms"}])
def test_a_stack_gives_what_its_matrices_give(settings, axes):
    """Leaves of one shape, of others, with batches, in other dtypes, and one that is read as a matrix."""
    shapes = {"a": (6, 4), "b": (6, 4), "c": (4, 6), "d": (2, 6, 4), "e": (2, 3, 4), "f": (6, 4)}
    rng = np.random.default_rng(0)
    tree = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    tree["f"] = tree["f"].astype(jnp.bfloat16)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(axes,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    tree = jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
    got = jax.jit(
        lambda g: newton_schulz(sharding=sharding, **settings).update(g, optax.EmptyState())[0]
    )(tree)
    want = newton_schulz(**settings).update(tree, optax.EmptyState())[0]
    for name, g in tree.items():
        own, alone = (np.asarray(tree[name], np.float32) for tree in (got, want))
        error = TOLERANCE + 4 * bounds.unit(str(g.dtype))
        np.testing.assert_allclose(own, alone, rtol=0, atol=error * np.abs(alone).max())
        assert got[name].dtype == g.dtype


@pytest.mark.parametrize(
    ("sharding", "error", "message"),
    [
        ("data", TypeError, r"`sharding` must be a `jax\.sharding\.NamedSharding`.*got 'data'"),
        (PartitionSpec("data"), TypeError, r"`sharding` must be a `jax\.sharding\.NamedSharding`"),
        (over(), ValueError, r"`sharding` must name axes of its mesh.*PartitionSpec\('data'\)"),
        (over(None, "data"), ValueError, r"`sharding` must name axes of its mesh"),
    ],
    ids=["name", "no mesh", "no axis", "another axis"],
)
def test_a_sharding_that_says_nothing_of_the_stack_is_refused(sharding, error, message):
    with pytest.raises(error, match=message):
        newton_schulz(sharding=sharding)


# What it refuses


@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_a_vector_is_refused_by_name_with_the_remedy(shape):
    tree = {"hidden": jnp.ones((2, 2)), "gain": jnp.ones(shape)}
    tx = newton_schulz()
    for call in (tx.init, lambda tree: tx.update(tree, optax.EmptyState())):
        with pytest.raises(ValueError, match=r"'gain' has shape .*chains\.muon.*optax\.partition"):
            call(tree)


def test_an_integer_leaf_is_refused():
    tx = newton_schulz()
    for call in (tx.init, lambda tree: tx.update(tree, optax.EmptyState())):
        with pytest.raises(TypeError, match=r"\['hidden'\] has dtype int32.*optax\.partition"):
            call({"hidden": jnp.ones((2, 2), jnp.int32)})


def test_holes_and_masked_leaves_pass():
    tree = {"a": None, "b": optax.MaskedNode(), "c": jnp.eye(2)}
    assert jax.tree.structure(orthogonalize(tree)) == jax.tree.structure(tree)
