"""State in 4 or 8 bits: the codes, what is held so, and what it costs a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
import chainrule
from chainrule.transforms import dequantize, quantize, quantized_state
from harness import assert_identical, random_tree, run

X = np.asarray(random_tree((3, 7), 0))
LARGEST = {4: 7, 8: 127}
GRADS = [random_tree({"b": (3,), "w": (8, 8)}, seed) for seed in range(6)]


def formula(x, bits, block):
    """The values that the codes stand for, block by block."""
    flat, out = x.reshape(-1).astype(np.float64), []
    for i in range(0, flat.size, block):
        part = flat[i : i + block]
        scale = np.abs(part).max() / LARGEST[bits] or 1.0
        out.append(np.clip(np.rint(part / scale), -LARGEST[bits], LARGEST[bits]) * scale)
    return np.concatenate(out).reshape(x.shape)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [1, 2, 5, 21, 256])
def test_a_round_trip_is_the_formula(bits, block):
    q = quantize(jnp.asarray(X), bits, block)
    assert q.codes.size == (-(-X.size // 2) if bits == 4 else X.size)
    assert q.scale.size == -(-X.size // block)
    np.testing.assert_allclose(dequantize(q), formula(X, bits, block), rtol=bounds.ELEMENTWISE)


def test_two_codes_share_a_byte_the_even_one_below():
    q = quantize(jnp.array([7.0, -7.0, 1.0]), 4, 3)
    assert q.codes.tolist() == [15 | 1 << 4, 9]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_zeros_stay_zero_in_their_dtype(dtype):
    back = dequantize(quantize(jnp.zeros((2, 3), dtype), 4, 4))
    assert back.dtype == dtype and back.shape == (2, 3) and not jnp.any(back)


def test_stochastic_rounding_is_right_on_average():
    x = jnp.array([7.0, 0.3, -2.6])
    keys = jax.random.split(jax.random.key(0), 4000)
    back = jax.vmap(lambda key: dequantize(quantize(x, 4, 3, key)))(keys)
    np.testing.assert_allclose(back.mean(0), x, atol=bounds.sampled(4000, 0.5))
    assert set(np.unique(back[:, 1])) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ({"block": 16}, ["mu.w", "nu.w"]),
        ({"block": 16, "smaller": "quantize"}, ["mu.b", "mu.w", "nu.b", "nu.w"]),
        ({"block": None, "fields": ("nu",)}, ["nu.b", "nu.w"]),
    ],
    ids=str,
)
def test_what_is_held_so(settings, held):
    state = quantized_state(optax.scale_by_adam(), **settings).init(GRADS[0]).inner_state
    assert held == [
        f"{field}.{name}"
        for field in ("mu", "nu")
        for name, x in sorted(getattr(state, field).items())
        if hasattr(x, "codes")
    ]


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.25), (8, 0.01)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_step_loses_only_what_the_next_one_reads(bits, bound, rounding):
    plain, _ = run(optax.trace(0.9), GRADS[0], GRADS)
    tx = quantized_state(optax.trace(0.9), bits, 8, rounding=rounding, seed=1)
    updates, _ = run(tx, GRADS[0], GRADS)
    assert_identical(updates[0], plain[0])
    error = np.abs(updates[-1]["w"] - plain[-1]["w"]).max() / np.abs(plain[-1]["w"]).max()
    assert 0 < error < bound * (2 if rounding == "stochastic" else 1)


def test_the_bytes():
    params = {"w": jnp.zeros((256, 64))}
    full, eight, four = (
        chainrule.metrics(quantized_state(optax.scale_by_adam(), bits).init(params))["state_bytes"]
        for bits in (None, 8, 4)
    )
    assert eight < 0.26 * full and four < 0.135 * full


def test_no_bits_is_the_transform_itself():
    tx = quantized_state(optax.scale_by_adam(), None)
    assert_identical(run(tx, GRADS[0], GRADS)[0], run(optax.scale_by_adam(), GRADS[0], GRADS)[0])


def test_later_links_see_the_moments_decoded():
    tx = quantized_state(chainrule.transforms.scale_by_adam(), 8, 16)
    _, state = run(tx, GRADS[0], GRADS[:2])
    mu = chainrule.transforms.posted(state)["mu"]
    np.testing.assert_allclose(
        mu["w"], dequantize(state.inner_state.mu["w"]), rtol=bounds.ELEMENTWISE
    )


def levels(bits):
    """What the logarithmic codes stand for, over the largest."""
    digits, exponents = (1, 8) if bits == 4 else (4, 16)
    d, k = np.arange(2**digits), np.arange(exponents)
    table = (1 + d / 2**digits) * 2.0 ** (k[:, None] - exponents + 1)
    return table.ravel() / table.max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [1, 5, 256])
def test_logarithmic_codes_are_the_nearest_numbers_of_the_formula(bits, block):
    x = np.asarray(X, np.float64).ravel() ** 4
    x[5:10] = 0
    q = quantize(jnp.asarray(x, jnp.float32), bits, block, logarithmic=True)
    want = []
    for i in range(0, x.size, block):
        part = x[i : i + block]
        numbers = part.max() * levels(bits)
        want.append(numbers[np.abs(part[:, None] - numbers).argmin(1)])
    np.testing.assert_allclose(dequantize(q), np.concatenate(want), rtol=bounds.ELEMENTWISE)


@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_logarithmic_codes_are_right_on_average(bits):
    x = jnp.array([1.0, 0.3, 0.011])
    keys = jax.random.split(jax.random.key(0), 4000)
    back = jax.vmap(lambda key: dequantize(quantize(x, bits, 3, key, logarithmic=True)))(keys)
    gaps = np.diff(levels(bits)).max()
    np.testing.assert_allclose(back.mean(0), x, atol=bounds.sampled(4000, gaps / 2))
    assert len(np.unique(back[:, 1])) == 2


@pytest.mark.parametrize("bits", [4, 8])
def test_a_second_moment_that_is_not_zero_does_not_become_zero(bits):
    grads = jnp.array([1.0, 1e-4, 1e-4, 1e-4])
    tx = quantized_state(optax.scale_by_adam(), bits, 4)
    _, state = tx.update(grads, tx.init(grads))
    nu = dequantize(state.inner_state.nu)
    assert state.inner_state.nu.logarithmic and not state.inner_state.mu.logarithmic
    # Steps of the small entries are smaller than Adam's: their root mean square is taken for larger than it is.
    assert np.all(np.asarray(nu)[1:] >= np.asarray(0.001 * grads**2)[1:])


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_block_with_what_is_not_finite_is_nan(logarithmic):
    x = jnp.array([1.0, jnp.inf, 2.0, 254.0])
    back = dequantize(quantize(x, 8, 2, logarithmic=logarithmic))
    assert np.isnan(back[:2]).all() and np.allclose(
        back[2:], [2.0, 254.0], rtol=bounds.ELEMENTWISE if not logarithmic else 2**-5
    )
