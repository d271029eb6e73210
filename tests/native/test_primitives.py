"""A primitive computes the same in the kernel, in its form, under every transformation, and on several devices."""

import os
import pathlib
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bounds
from chainrule import chains
from chainrule.native import coding, primitives, xla
from reference import kernel as oracle

SHAPES = [(), (0,), (7,), (33, 40)]
NUMBERS = {"b1": 0.9, "b2": 0.99, "eps": 1e-3, "mu_correction": 0.75, "nu_correction": 0.5}
EPS = float(jnp.finfo(jnp.float32).eps)


def draw(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in SHAPES]


def wide(*trees):
    return [[np.asarray(x, np.float64) for x in tree] for tree in trees]


def close(got, expected, scale=1.0):
    """Within the roundings of a dozen float32 operations on numbers up to `scale`."""
    np.testing.assert_allclose(got, expected, rtol=bounds.gamma(32), atol=bounds.gamma(32) * scale)


@pytest.mark.parametrize("denominator", ["root", "magnitude", "none"])
@pytest.mark.parametrize("kernel", ["xla", "native"])
def test_tier2_follows_the_equations(kernel, denominator):
    p, g, mu, long = draw(0), draw(1), draw(2), draw(3)
    nu = [jnp.abs(x) for x in draw(4)] if denominator == "root" else None
    new = xla.tier2(
        g, mu, nu, mu_long=long, b1_long=0.5, blend=0.25, denominator=denominator, kernel=kernel,
        learning_rate=0.1, weight_decay=0.2, parameters=p, **NUMBERS,
    )  # fmt: skip
    for i, update in enumerate(new.updates):
        pi, gi, mi, li = (x[i] for x in wide(p, g, mu, long))
        vi = np.asarray(nu[i], np.float64) if nu else 0.0
        want = oracle.tier2(
            gi, mi, vi, li, b1_long=0.5, blend=0.25, denominator=denominator, **NUMBERS
        )
        close(update, oracle.step(want.update, pi, learning_rate=0.1, weight_decay=0.2), 100.0)
        close(new.mu[i], want.mu)
        close(new.mu_long[i], want.mu_long)
        if nu:
            close(new.nu[i], want.nu)


@pytest.mark.parametrize("kernel", ["xla", "native"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("start", ["zero", "gradient"])
def test_tier2_in_codes_follows_the_equations(start, bits, kernel):
    g, nu = draw(1), [jnp.abs(x) for x in draw(4)]
    sizes = [x.size for x in g]
    fresh = xla.Codes(
        [jnp.full(xla.packed_size(n, bits), {4: 0x88, 8: 128}[bits], jnp.uint8) for n in sizes],
        [jnp.zeros(xla.block_count(n, 16)) for n in sizes],
    )
    new = xla.tier2_quantized(
        g, fresh, nu, block=16, bits=bits, start=start, kernel=kernel, **NUMBERS
    )
    decoded = xla.dequantize(new.mu, g, block=16, bits=bits)
    for i, (gi, vi) in enumerate(zip(*wide(g, nu), strict=True)):
        before = gi if start == "gradient" else np.zeros_like(gi)
        want = oracle.tier2(gi, before, vi, **NUMBERS)
        close(new.updates[i], want.update, 10.0)
        # Half a quantum, and the rounding of the scale.
        quantum = np.max(np.abs(want.mu), initial=0) / coding.LEVELS[bits]
        assert np.max(np.abs(decoded[i] - want.mu), initial=0) <= quantum * (0.5 + 256 * EPS)


@pytest.mark.parametrize("kernel", ["xla", "native"])
def test_tier1_follows_the_equations(kernel):
    g, p = draw(1), draw(0)
    c = jnp.linspace(0.1, 1.0, len(g))
    updates, new = xla.tier1(
        g, c, parameters=p, learning_rate=0.5, weight_decay=0.25, decay=0.75, kernel=kernel
    )
    for i, (gi, pi) in enumerate(zip(*wide(g, p), strict=True)):
        mean = np.abs(gi).mean() if gi.size else float(c[i])  # without entries, c stays
        want = 0.75 * float(c[i]) + 0.25 * mean
        close(new[i], want)
        close(updates[i], -0.5 * (want * np.sign(gi) + 0.25 * pi))


@pytest.mark.parametrize("kernel", ["xla", "native"])
def test_statistics_follow_the_equations(kernel):
    table = xla.statistics(draw(1), kernel=kernel)
    for row, (g,) in zip(table, zip(*wide(draw(1)), strict=True), strict=True):
        # A mean of n terms in float32: n roundings at worst.
        np.testing.assert_allclose(
            row, oracle.statistics(g), rtol=bounds.summed(g.size), atol=bounds.summed(4)
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_the_form_are_those_of_the_kernel(bits):
    values = draw(1)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), len(values)))
    in_kernel = xla.quantize(values, block=5, bits=bits, keys=keys)
    operation = primitives.OPERATIONS["chainrule_quantize"]
    flat = operation.form(keys, *values, block=5, bits=bits, stochastic=True, kernel="xla")
    for i, x in enumerate(values):
        scales = flat[len(values) + i]
        # XLA divides by the number of levels with a product: one rounding more.
        np.testing.assert_allclose(scales, in_kernel.scales[i], rtol=bounds.gamma(4))
        own = [
            coding.decode(c, scales, x.shape, coding.Format(bits, 5))
            for c in (flat[i], in_kernel.codes[i])
        ]
        # So a number on the edge between two codes may fall to either.
        steps = np.abs(own[0] - own[1]) / np.max(np.asarray(scales), initial=1e-30)
        assert np.all(steps <= 1 + 16 * EPS)
        assert np.mean(steps != 0) <= 0.01 if x.size else True


def test_a_chain_s_jaxpr_shows_the_primitives():
    from chainrule import chains

    text = str(jax.make_jaxpr(chains.stam().init)(jnp.ones(3)))
    assert "chainrule_alike" in text and "chainrule_sums" not in text
    tx, p = chains.stam(), jnp.ones(3)
    text = str(jax.make_jaxpr(tx.update)(p, tx.init(p), p))
    assert "chainrule_sums" in text and "ffi_call" not in text


def step(kernel, g, mu, nu):
    new = xla.tier2([g], [mu], [nu], kernel=kernel, **NUMBERS)
    return new.updates[0], new.mu[0], new.nu[0]


def test_the_derivative_of_a_step_is_that_of_its_form():
    g, mu, nu = jnp.array([0.5, -2.0]), jnp.ones(2), jnp.ones(2)
    slopes = {
        kernel: jax.grad(lambda g, k=kernel: sum(x.sum() for x in step(k, g, mu, nu)))(g)
        for kernel in ("native", "xla")
    }
    np.testing.assert_array_equal(slopes["native"], slopes["xla"])
    assert np.all(np.isfinite(slopes["xla"])) and np.any(slopes["xla"] != 0)


def test_vmap_of_a_step_that_shares_an_operand():
    g = jnp.stack([jnp.arange(4.0), -jnp.ones(4)])
    mu, nu = jnp.ones(4), jnp.ones(4)
    together = jax.vmap(partial(step, "native"), in_axes=(0, None, None))(g, mu, nu)
    for i in range(2):
        for a, b in zip(together, step("native", g[i], mu, nu), strict=True):
            np.testing.assert_array_equal(a[i], b)


def test_on_several_devices():
    """In another process, which has eight devices from the start."""
    here = pathlib.Path(__file__).parent
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(here.parent)}
    subprocess.run(
        [sys.executable, here / "several_devices.py"], env=environment, check=True, timeout=300
    )


def test_an_exported_program_makes_no_foreign_call():
    """It may run where the kernel is not: in TensorFlow, or from a file."""
    tx, params = chains.stam(), {"w": jnp.ones((8, 4))}
    step = jax.jit(tx.update)
    given = (params, tx.init(params), params)
    assert "chainrule_sums" in step.lower(*given).as_text()
    assert "chainrule_sums" not in jax.export.export(step)(*given).mlir_module()
